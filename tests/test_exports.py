"""Exports in every format give the features of the checkpoint, and load in other software."""

import json
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from odcft.backbone.load import load_backbone
from odcft.backbone.network_input import input_from_json as load_input
from odcft.backbone.non_timm_networks import build
from odcft.data.batches import Crops
from odcft.data.feature_extraction import to_float
from odcft.data.sources import find_images
from odcft.data.view import View
from odcft.errors import OdcftError
from odcft.exports import export
from odcft.files import file_sha256
from odcft.plan import view_for_evaluation
from odcft.recipe import load_recipe
from odcft.train import fine_tune


@pytest.fixture
def finished_run(tmp_path, make_checkpoint, make_images):
    """A function that fine-tunes on a dozen images with some overrides and returns the RUN."""

    def run(*overrides):
        quick = ["optim.batch_size=4", "optim.epochs=1", "neck.hidden=16", "neck.dim=8", "log.tensorboard=false"]
        checkpoint, images = make_checkpoint(tmp_path / "start.pth.tar"), make_images(tmp_path / "images")
        fine_tune(str(checkpoint), str(images), tmp_path / "run", load_recipe("small", [*quick, *overrides]))
        return tmp_path / "run"

    return run


@pytest.mark.parametrize("arch", ["test_resnet", "test_vit", "test_convnext"])
def test_timm_loads_the_exported_folder(tmp_path, arch):
    torch.manual_seed(3)
    torch.save({"state_dict": timm.create_model(arch).state_dict(), "arch": arch}, tmp_path / "c.pth")
    export(tmp_path / "c.pth", tmp_path / "out")
    ours = load_backbone(tmp_path / "c.pth").backbone
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0).eval()
    images = torch.rand(2, 3, ours.size, ours.size)
    with torch.no_grad():
        assert torch.allclose(ours.net(images), theirs(images), atol=1e-5)
    assert timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=7)(images).shape == (2, 7)
    assert tuple(theirs.pretrained_cfg["mean"]) == ours.input.mean


def alexnet_with_sobel():
    net = build("alexnet_deepcluster")
    return {f"features.module.{name}": tensor for name, tensor in as_deepcluster(net.state_dict())}


def as_deepcluster(state):
    places = {
        f"{kind}{n}": place + (kind == "bn") for n, place in enumerate((0, 4, 8, 11, 14), 1) for kind in ("conv", "bn")
    }
    for name, tensor in state.items():
        layer, leaf = name.split(".")
        yield f"{places[layer]}.{leaf}", tensor


def resnet_of_lightness():
    net = build("resnet50", in_chans=1)
    return {f"_feature_blocks.{name}": tensor for name, tensor in net.state_dict().items()}


KINDS = {
    "timm resnet": lambda: timm.create_model("resnet18").state_dict(),
    "timm vit": lambda: timm.create_model("vit_tiny_patch16_224").state_dict(),
    "timm convnext": lambda: timm.create_model("convnext_atto").state_dict(),
    "alexnet with sobel": alexnet_with_sobel,
    "resnet50 of lightness": resnet_of_lightness,
}


@pytest.mark.parametrize(
    ("kind", "format"),
    [
        pytest.param(kind, format, marks=[pytest.mark.slow] if format == "onnx" and kind != "timm resnet" else [])
        for kind in KINDS
        for format in ("timm", "safetensors", "onnx")
    ],
)
def test_reloaded_features_are_those_of_the_checkpoint(kind, format, tmp_path):
    torch.manual_seed(1)
    torch.save({"model_state_dict": KINDS[kind]()}, tmp_path / "c.pth")
    ours = load_backbone(tmp_path / "c.pth").backbone
    export(tmp_path / "c.pth", tmp_path / "out", format)
    images = torch.rand(4, 3, ours.size, ours.size)
    with torch.no_grad():
        features = ours(images)
        if format == "onnx":
            onnxruntime = pytest.importorskip("onnxruntime")
            session = onnxruntime.InferenceSession(str(tmp_path / "out"))
            again = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
            assert (again - features).abs().max() <= 1e-4 * features.abs().max()
            return
        backbone = load_backbone(tmp_path / "out").backbone
        assert backbone.input == ours.input
        assert backbone.arch_args == ours.arch_args
        assert (backbone(images) - features).abs().max() <= 1e-5 * features.abs().max()
    if format == "timm":
        card = (tmp_path / "out" / "README.md").read_text()
        assert ("odcft.load_backbone" in card) == (kind in ("alexnet with sobel", "resnet50 of lightness"))


def test_timm_refuses_a_network_it_would_build_wrongly(tmp_path):
    """timm has no option for a last stage of stride 1; it must not silently build the usual network."""
    torch.save({"model_state_dict": resnet_of_lightness()}, tmp_path / "c.pth")
    export(tmp_path / "c.pth", tmp_path / "out")
    with pytest.raises(TypeError, match="last_stride"):
        timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)


def test_exported_folder_is_a_checkpoint_again(tmp_path, make_checkpoint):
    export(make_checkpoint(tmp_path / "c.pth"), tmp_path / "out")
    first, second = (load_backbone(p).backbone.net.state_dict() for p in (tmp_path / "c.pth", tmp_path / "out"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("format", ["safetensors", "torchvision"])
def test_files_carry_the_networks_names(tmp_path, format):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "c.pth")
    export(tmp_path / "c.pth", tmp_path / f"out.{format}", format)
    assert load_backbone(tmp_path / f"out.{format}").match.coverage == 1
    if format == "torchvision":
        import torchvision

        missing = torchvision.models.resnet18().load_state_dict(torch.load(tmp_path / "out.torchvision"), strict=False)
        assert missing.missing_keys == ["fc.weight", "fc.bias"]
        assert not missing.unexpected_keys


def test_impossible_exports_are_refused_and_nothing_is_overwritten(tmp_path, make_checkpoint):
    checkpoint = make_checkpoint(tmp_path / "c.pth")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(OdcftError, match="exists"):
        export(checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "mine"
    with pytest.raises(OdcftError, match="torchvision has no test_resnet"):
        export(checkpoint, tmp_path / "o.pth", "torchvision")
    with pytest.raises(OdcftError, match="no such format"):
        export(checkpoint, tmp_path / "o.pth", "tensorflow")
    assert not (tmp_path / "o.pth").exists()
    with pytest.raises(OdcftError, match="cannot be written"):
        export(checkpoint, checkpoint / "inside" / "a file")


def photograph(path, size=(50, 40)):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def as_evaluation_sees(path, source):
    """The tensor that evaluation gives to the network."""
    loaded = load_backbone(source)
    crops = Crops(find_images(path.parent), view_for_evaluation(loaded, find_images(path.parent), None))
    with torch.no_grad():
        return loaded.backbone.adapter(to_float(crops[(0, 0)][0].unsqueeze(0), torch.device("cpu")))[0]


@pytest.mark.parametrize("source", ["run", "out", "again"])
def test_timms_transform_for_an_exported_folder_equals_what_evaluation_does(tmp_path, finished_run, source):
    """Trained at 24 pixels, not at 64, the network's own size."""
    from timm.data import create_transform, resolve_model_data_config

    run = finished_run("data.size=24", "data.crop_fraction=0.75")
    export(run, tmp_path / "out")
    export(tmp_path / "out", tmp_path / "again")
    folder = {"run": run / "backbone", "out": tmp_path / "out", "again": tmp_path / "again"}[source]
    net = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    config = resolve_model_data_config(net)
    assert (tuple(config["input_size"]), config["crop_pct"], config["interpolation"]) == ((3, 24, 24), 0.75, "bilinear")
    (tmp_path / "one").mkdir()
    image = photograph(tmp_path / "one" / "x.png")
    theirs = create_transform(**config)(Image.open(image))
    for told in (run, folder):
        assert torch.allclose(as_evaluation_sees(image, told), theirs, atol=1e-6)


SMALL_VIT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}


def write_folder_of_transformers(folder):
    """A small MSN of Hugging Face's transformers, with what an image processor needs."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTMSNConfig(**SMALL_VIT, image_size=48, patch_size=8, layer_norm_eps=1e-6)
    net = transformers.ViTMSNModel(config)
    for name, tensor in net.state_dict().items():
        if tensor.ndim < 2 or "token" in name:
            tensor.uniform_(0.5, 1)
    net.save_pretrained(folder)
    told = {"size": {"shortest_edge": 54}, "crop_size": {"height": 48, "width": 48}, "resample": 3}
    told |= {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("size", ["auto", "32"])
def test_a_folder_of_transformers_is_fine_tuned_and_goes_back(size, tmp_path, make_images):
    """AutoModel and AutoImageProcessor of the result give the features that evaluation sees."""
    theirs = write_folder_of_transformers(tmp_path / "theirs")
    images = make_images(tmp_path / "images")
    quick = ["optim.batch_size=4", "optim.epochs=1", "neck.hidden=16", "neck.dim=8", "log.tensorboard=false"]
    recipe = load_recipe("small", [*quick, f"data.size={size}"])
    fine_tune(str(theirs), str(images), tmp_path / "run", recipe)
    backbone = export(tmp_path / "run", tmp_path / "out", "transformers")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["image_size"]) == ("vit_msn", backbone.size)
    assert not equal_tensors(load_backbone(theirs).backbone, load_backbone(tmp_path / "out").backbone)

    transformers = pytest.importorskip("transformers")
    net = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    (tmp_path / "one").mkdir()
    image = photograph(tmp_path / "one" / "x.png", (90, 80))
    for source in (tmp_path / "run", tmp_path / "out"):
        ours = as_evaluation_sees(image, source).unsqueeze(0)
        with torch.no_grad():
            features = net(pixel_values=ours).last_hidden_state[:, 0]
            assert (backbone.net(ours) - features).abs().max() <= 1e-6 * features.abs().max()
    pixels = processor(Image.open(image), return_tensors="pt")["pixel_values"]
    assert pixels.shape == ours.shape
    assert (pixels - ours).abs().mean() < 0.05  # their resizing rounds, ours is PIL's


def equal_tensors(first, second):
    second = second.net.state_dict()
    return all(second[name].equal(tensor) for name, tensor in first.net.state_dict().items())


def test_a_family_of_transformers_survives_a_timm_folder_and_a_file(tmp_path):
    theirs = write_folder_of_transformers(tmp_path / "theirs")
    export(theirs, tmp_path / "timm")
    export(tmp_path / "timm", tmp_path / "file", "safetensors")
    export(tmp_path / "file", tmp_path / "back", "transformers")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "vit_msn"
    assert equal_tensors(load_backbone(theirs).backbone, load_backbone(tmp_path / "back").backbone)
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    config["odcft"]["model_type"] = ["not", "a", "name"]
    (tmp_path / "timm" / "config.json").write_text(json.dumps(config))
    export(tmp_path / "timm", tmp_path / "again", "transformers")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "vit"


def test_a_folder_of_another_format_is_replaced_only_if_odcft_wrote_it(tmp_path):
    theirs, out = write_folder_of_transformers(tmp_path / "theirs"), tmp_path / "out"
    with pytest.raises(OdcftError, match="was not written by odcft"):
        export(theirs, theirs, "transformers", overwrite=True)
    export(theirs, out, "transformers")
    with pytest.raises(OdcftError, match="--overwrite"):
        export(theirs, out)
    export(theirs, out, overwrite=True)
    assert {path.name for path in out.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    export(theirs, out, "transformers", overwrite=True)
    assert (out / "preprocessor_config.json").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OdcftError, match="is a file; --format transformers writes a folder"):
        export(theirs, tmp_path / "file", "transformers", overwrite=True)


def test_a_refused_export_leaves_what_was_there(tmp_path, make_checkpoint):
    export(write_folder_of_transformers(tmp_path / "theirs"), tmp_path / "out", "transformers")
    before = {path.name: file_sha256(path) for path in (tmp_path / "out").iterdir()}
    with pytest.raises(OdcftError, match="odcft knows no network of transformers"):
        export(make_checkpoint(tmp_path / "c.pth"), tmp_path / "out", "transformers", overwrite=True)
    assert {path.name: file_sha256(path) for path in (tmp_path / "out").iterdir()} == before


def test_the_backbone_of_a_run_is_not_replaced_by_another_format(tmp_path):
    export("scratch:test_vit", tmp_path / "run" / "backbone")
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(OdcftError, match="belongs to a RUN"):
        export("scratch:test_vit", tmp_path / "run" / "backbone", "transformers", overwrite=True)


def test_what_transformers_does_not_know_of_deep_images_is_said(tmp_path, odcft_command):
    export("scratch:test_vit", tmp_path / "net", "safetensors")
    tensors = load_file(tmp_path / "net")
    backbone = load_backbone(tmp_path / "net").backbone
    told = {**backbone.input.dump(), "intensity": [100.0, 3000.0]}
    metadata = {"architecture": "test_vit", "arch_args": "{}", "input": json.dumps(told)}
    save_file(tensors, tmp_path / "deep", {"format": "pt", **metadata})
    code, out, told = odcft_command("export", tmp_path / "deep", tmp_path / "out", "--format", "transformers")
    assert code == 0
    assert "AutoModel.from_pretrained" in out + told
    assert "give it images of 8 bits" in out + told
    assert "100 is black and 3000 is white" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("format", ["timm", "safetensors", "torchvision", "onnx"])
def test_size_and_crop_are_stored_in_every_format(tmp_path, format):
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet18", num_classes=0).state_dict(), tmp_path / "c.pth")
    export(tmp_path / "c.pth", tmp_path / "out", format, size=64)
    if format == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(str(tmp_path / "out"))
        told = load_input(json.loads(session.get_modelmeta().custom_metadata_map["input"]))
        assert session.run(None, {"images": np.zeros((2, 3, 64, 64), np.float32)})[0].shape == (2, 512)
    else:
        loaded = load_backbone(tmp_path / "out")
        told = loaded.backbone.input
        assert loaded.states_view
    assert told == load_backbone(tmp_path / "c.pth").backbone.input.with_view(View(64))


def test_a_size_that_a_network_cannot_take_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(OdcftError, match=r"a multiple of 16 pixels, not 60: try 48 or 64"):
        export("scratch:test_vit", tmp_path / "out", size=60)
    assert not (tmp_path / "out").exists()


def test_the_card_of_a_run_has_title_figures_recipe_and_hash_and_no_path_of_this_machine(tmp_path, finished_run):
    run = finished_run()
    export(run, tmp_path / "out")
    for folder in (run / "backbone", tmp_path / "out"):
        card = (folder / "README.md").read_text()
        assert card.startswith("# test_resnet, fine-tuned by ODC\n")
        assert "12 unlabelled images" in card
        assert "| loss |" in card
        assert "centroid_interval:" in card
        assert file_sha256(tmp_path / "start.pth.tar") in card
        assert str(tmp_path) not in card.replace("THIS_FOLDER", "")
        assert str(tmp_path) not in (folder / "config.json").read_text()


def test_the_card_of_a_run_says_before_and_after_and_links_its_report():
    from odcft.backbone.model_card import make_card

    backbone = load_backbone("scratch:test_resnet").backbone
    first, last = {"loss_over_ln_k": 0.98, "change_ratio": 0.61}, {"loss_over_ln_k": 0.49, "change_ratio": float("inf")}
    about = {
        "checkpoint": "c.pth",
        "method": "odc",
        "first_figures": first,
        "figures": last,
        "report": "../report.html",
    }
    text = make_card(backbone, about)
    assert "Training moved the loss, relative to ln K, from 0.98 to 0.49; these figures do not say whether" in text
    assert "[report.html](../report.html)" in text
    assert "\nimport timm\nnet = timm.create_model(" in text
    assert "## Licence" in text
    kept = {"loss_over_ln_k": 0.9, "change_ratio": 0.0}  # at first, images keep their labels (memory.start_epochs)
    assert "labels" not in make_card(backbone, {**about, "first_figures": kept}).split("## How the training ended")[0]
    alone = make_card(backbone, {"checkpoint": "c.pth"})
    assert "Before and after" not in alone
    assert "report.html" not in alone


@pytest.mark.parametrize(
    "name", ["a`b", "``` </code>", "x\n# Not a title", "<script>alert(1)</script>", "``", "[a](b)"]
)
def test_no_name_breaks_out_of_the_card(name):
    from odcft.backbone.model_card import make_card

    backbone = load_backbone("scratch:test_resnet").backbone
    text = make_card(
        backbone, {"checkpoint": name, "data": name, "method": "odc", "sha256": name, "recipe": f"x: {name}"}
    )
    for block in re.split(r"(?s)(`{3,})(?:yaml|python)\n.*?\n\1", text)[0::2]:
        spans_left_out = re.sub(r"(?s)(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", block)
        assert not set("<[") & set(spans_left_out), spans_left_out
        titles = [line for line in block.splitlines() if line.startswith("# ")]
        assert titles in ([], ["# test_resnet, fine-tuned by ODC"])
