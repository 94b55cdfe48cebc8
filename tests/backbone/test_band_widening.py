"""Networks for images of n bands: widened from RGB or as they are, in a whole run, and as they are exported."""

import numpy as np
import pytest
import timm
import torch
from image_files import write_tiff

from odcft.backbone.load import load_backbone
from odcft.backbone.timm_folder import write_timm
from odcft.data.sources import find_images
from odcft.errors import OdcftError
from odcft.evaluation.comparison import evaluate
from odcft.exports import export
from odcft.first_memory import init_memory
from odcft.normalisation import decide_normalisation
from odcft.plan import make_plan, view_for_evaluation
from odcft.pretexts.training import train_pretext
from odcft.recipe import load_recipe
from odcft.train import fine_tune

QUICK = ["optim.batch_size=8", "neck.hidden=16", "neck.dim=8", "log.tensorboard=false", "optim.epochs=1"]


def images_of_bands(folder, bands=5, count=16, dtype=np.uint16):
    """Write TIFFs of two classes, of 12 bits in 16, each band of another brightness."""
    for i in range(count):
        values = np.random.default_rng(i).integers(0, 500, (40, 36, bands)) + 700 * np.arange(bands)
        values[: 20 if i % 2 else 5] = 10 * np.arange(bands)
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        write_tiff(folder / "ab"[i % 2] / f"{i:02d}.tif", values.astype(dtype), 1, [0] * (bands - 1))
    return folder


@pytest.mark.parametrize("arch", ["test_resnet", "test_vit", "alexnet"])
@pytest.mark.parametrize("bands", [2, 4, 13])
def test_a_widened_network_gives_bands_that_are_alike_the_features_of_gray(arch, bands, tmp_path):
    torch.manual_seed(0)
    plain = load_backbone(f"scratch:{arch}").backbone
    write_timm(plain, tmp_path / "x")
    wide = load_backbone(tmp_path / "x", bands=bands)
    assert (
        f"takes {bands} bands instead of RGB: each filter is the mean of its three, times 3/{bands}" in wide.notes[-1]
    )
    assert wide.backbone.arch_args["in_chans"] == bands
    assert not wide.backbone.input.measured
    gray = torch.randn(2, 1, plain.size, plain.size)
    with torch.no_grad():
        wanted = plain.net(gray.expand(-1, 3, -1, -1))
        found = wide.backbone.net(gray.expand(-1, bands, -1, -1))
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))


def test_rgb_needs_no_widening_and_other_colours_cannot_be_widened(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "c.pth")
    same = load_backbone(checkpoint, bands=3)
    assert same.backbone.input == load_backbone(checkpoint).backbone.input
    assert "in_chans" not in same.backbone.arch_args
    with pytest.raises(OdcftError, match=r"data\.bands=5: test_resnet takes gray, and there is no way"):
        load_backbone(checkpoint, input="gray", bands=5)
    wide = load_backbone("scratch:test_resnet", bands=5).backbone
    assert wide.input.channels == 5
    filters = next(wide.net.parameters())
    assert not torch.equal(filters[:, 0], filters[:, 1])  # random, not repeated


def test_a_checkpoint_of_n_channels_loads_as_such(tmp_path):
    net = timm.create_model("test_resnet", in_chans=4, num_classes=0)
    torch.save(net.state_dict(), tmp_path / "four.pth")
    loaded = load_backbone(tmp_path / "four.pth", "test_resnet")
    input = loaded.backbone.input
    assert (input.color, input.channels, input.bands, input.measured) == ("bands", 4, 4, False)
    assert load_backbone(tmp_path / "four.pth", "test_resnet", bands=4).notes == loaded.notes
    with pytest.raises(OdcftError, match=r"data\.bands=3: test_resnet takes 4 bands"):
        load_backbone(tmp_path / "four.pth", "test_resnet", bands=3)
    export(tmp_path / "four.pth", tmp_path / "out", arch="test_resnet")
    assert not load_backbone(tmp_path / "out").backbone.input.measured
    assert "these are placeholders" in (tmp_path / "out" / "README.md").read_text()
    images = find_images(images_of_bands(tmp_path / "set", 4))
    recipe = load_recipe("small", QUICK)
    plan, _ = make_plan(recipe, [loaded.backbone], images)
    assert plan.data.bands == plan.view.bands == 4
    plan, notes = decide_normalisation(recipe, plan, [loaded], images)
    assert any("measured on 16 images, because the checkpoint states none" in note for note in notes)
    assert loaded.backbone.input.mean == tuple(plan.data.mean)
    assert loaded.backbone.input.measured


def test_n_bands_from_memory_to_export(tmp_path, make_checkpoint, capfd):
    """Measured once; memory, run, resumed run, evaluation and export normalise alike, and in_chans stays."""
    data, checkpoint = str(images_of_bands(tmp_path / "set")), str(make_checkpoint(tmp_path / "c.pth"))
    recipe = load_recipe("small", [*QUICK, "data.bands=5", "data.range=set"])
    init_memory(checkpoint, data, tmp_path / "memory", recipe)
    said = capfd.readouterr().err
    assert "16 images of 16 bits: scaled by data.range=set, their smallest and largest value: 0 is black" in said
    assert "measured on 16 images" in said
    assert "Images of 5 bands have no colours: augment.saturation, hue and gray are not applied" in said
    (tmp_path / "set" / "a" / "zz.tif").write_bytes(b"")  # would change which images are measured
    (tmp_path / "set" / "a" / "zz.tif").unlink()
    fine_tune(checkpoint, data, tmp_path / "run", recipe, memory=tmp_path / "memory")
    fine_tune(checkpoint, data, tmp_path / "run", recipe, resume=True, epochs=2)
    data_fields = load_recipe(tmp_path / "run" / "recipe.yaml").data
    made = load_recipe(tmp_path / "run" / "recipe.yaml").data.mean
    assert len(made) == 5
    assert sorted(made) == made  # each band is brighter than the one before
    assert data_fields.range[1] > 3200
    run = load_backbone(tmp_path / "run").backbone
    assert (run.input.color, run.input.bands, run.input.mean) == ("bands", 5, tuple(made))
    assert view_for_evaluation(load_backbone(tmp_path / "run"), find_images(data), None).intensity == data_fields.range
    results = evaluate(str(tmp_path / "run"), data, None, ["knn"])
    assert "before" in results  # the starting checkpoint, widened in the same way
    assert "5 bands seen at" in capfd.readouterr().err
    export(tmp_path / "run", tmp_path / "out")
    net = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0)
    assert next(net.parameters()).shape[1] == 5
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The bands of the image, in their order, 5 bands seen at" in card
    export(tmp_path / "run", tmp_path / "out.safetensors", "safetensors")
    again = load_backbone(tmp_path / "out.safetensors").backbone
    assert again.input == run.input
    images = torch.rand(2, 5, 32, 32)
    assert torch.allclose(again(images), run(images), atol=1e-6)


def test_images_of_another_number_of_bands_are_refused_by_name(tmp_path, make_checkpoint):
    data, recipe = str(images_of_bands(tmp_path / "set", 4)), load_recipe("small", [*QUICK, "data.bands=5"])
    refusal = r"None of the 16 images .* a TIFF of 4 bands of 16 bits .*; the network takes 5"
    with pytest.raises(OdcftError, match=refusal):
        fine_tune(str(make_checkpoint(tmp_path / "c.pth")), data, tmp_path / "run", recipe)


def test_pretext_tasks_take_rgb_only(tmp_path, make_images):
    data = str(make_images(tmp_path / "set"))
    with pytest.raises(OdcftError, match="odcft pretext trains on RGB images"):
        train_pretext("rotation", data, "test_resnet", tmp_path / "p.pth", load_recipe("pretext", ["data.bands=4"]))
