"""The layer that gives the first labels is the one in which augmented images keep their neighbours."""

import pytest
import torch
from PIL import Image

from odcft import start_layer_choice
from odcft.backbone.load import load_backbone
from odcft.data.batches import Batch
from odcft.data.sources import find_images
from odcft.files import read_json
from odcft.first_memory import init_memory
from odcft.plan import make_plan
from odcft.progress import Progress
from odcft.recipe import load_recipe
from odcft.start_layer_choice import decide_start_layer
from odcft.train import fine_tune

AUTO = ["memory.start_layer=auto", "optim.batch_size=4", "optim.epochs=8", "data.size=32"]


@pytest.fixture
def images(tmp_path):
    """Twenty images, each of one gray, and a file that is none."""
    (tmp_path / "images").mkdir()
    for i in range(20):
        Image.new("RGB", (32, 32), (12 * i,) * 3).save(tmp_path / "images" / f"{i:02}.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    return str(tmp_path / "images")


def decide(monkeypatch, images, features, *overrides, fewest=20):
    """The plan and notes where the layers give `features(pixels)`."""
    monkeypatch.setattr(start_layer_choice, "FEWEST", fewest)
    monkeypatch.setattr(start_layer_choice, "pooled_layers", lambda backbone, pixels: features(pixels))
    backbone = load_backbone("scratch:test_resnet").backbone
    recipe, found = load_recipe("odc_small", [*AUTO, *overrides]), find_images(images)
    plan, _ = make_plan(recipe, [backbone], found)
    return decide_start_layer(plan, recipe, [backbone], found, Progress(quiet=True))


def layers(last):
    """`stem` is noise, `middle` the gray of an image, and `last` what is given."""
    draw = torch.Generator().manual_seed(0)

    def features(pixels):
        gray_B1 = pixels.mean((1, 2, 3)).unsqueeze(1)
        middle_B2 = torch.cat([torch.cos(3 * gray_B1), torch.sin(3 * gray_B1)], 1)
        noise_B9 = torch.randn(len(pixels), 9, generator=draw)
        return {"stem": noise_B9, "middle": middle_B2, "last": {"middle": middle_B2, "noise": noise_B9}[last]}

    return features


SMALL_CHANGES = ["augment.brightness=0", "augment.contrast=0", "augment.rotation=0"]


def test_the_layer_is_chosen_in_which_most_neighbours_stay(monkeypatch, images):
    plan, (note,) = decide(monkeypatch, images, layers("noise"), *SMALL_CHANGES)
    assert (plan.memory.start_layer, plan.memory.start_epochs) == ("middle", 4)
    assert "The first labels are clusters of middle: 100.0% of an image's neighbours" in note
    assert note.endswith("% in the last layer. For 4 of 8 epochs images keep them.")


def test_of_layers_as_good_as_each_other_the_deepest_is_chosen(monkeypatch, images):
    plan, (note,) = decide(monkeypatch, images, layers("middle"), *SMALL_CHANGES)
    assert (plan.memory.start_layer, plan.memory.start_epochs) == ("last", 0)
    assert "clusters of the last layer: 100.0% of" in note
    found = ["memory.start_features=layer", "neck.relu=false"]
    plan, _ = decide(monkeypatch, images, layers("middle"), *SMALL_CHANGES, *found)
    assert (plan.memory.start_layer, plan.memory.start_epochs) == ("last", 4)
    plan, _ = decide(monkeypatch, images, layers("middle"), *SMALL_CHANGES, "memory.start_epochs=3")
    assert plan.memory.start_epochs == 3  # asked for


@pytest.mark.parametrize("why", ["few", "unreadable"])
def test_the_last_layer_stays_where_images_are_too_few_and_a_note_says_so(monkeypatch, images, tmp_path, why):
    if why == "unreadable":
        (tmp_path / "images" / "00.png").write_bytes(b"no image")
    fewest = 22 if why == "few" else 20
    plan, (note,) = decide(monkeypatch, images, layers("noise"), *SMALL_CHANGES, fewest=fewest)
    assert (plan.memory.start_layer, plan.memory.start_epochs) == ("last", 0)
    assert note.startswith(f"The first labels are clusters of the last layer (fewer than {fewest} images can be read")


def test_dc_may_start_with_another_layer_and_codc_keeps_the_last(monkeypatch, images):
    plan, _ = decide(monkeypatch, images, layers("noise"), *SMALL_CHANGES, "method=dc")
    assert (plan.memory.start_layer, plan.memory.start_epochs) == ("middle", 4)
    plan, notes = decide(monkeypatch, images, layers("noise"), "method=codc")
    assert (plan.memory.start_layer, plan.memory.start_epochs, notes) == ("last", 0, [])


def test_an_image_that_can_be_read_for_one_view_only_is_left_out_of_both(monkeypatch, images):
    """A store that fails at one time: image 3 of the first view, 7 of the second."""
    found, lost = start_layer_choice.make_loader, iter([3, 7])

    def loader(*arguments):
        gone = next(lost)
        for batch in found(*arguments):
            keep_B = batch.index_B != gone
            yield Batch(batch.pixels[keep_B], batch.index_B[keep_B], batch.unreadable)

    monkeypatch.setattr(start_layer_choice, "make_loader", loader)
    plan, (note,) = decide(monkeypatch, images, layers("noise"), *SMALL_CHANGES, fewest=18)
    assert plan.memory.start_layer == "middle"
    assert ": 100.0% of an image's neighbours" in note


def test_what_was_chosen_travels_with_a_memory(monkeypatch, images, tmp_path):
    monkeypatch.setattr(start_layer_choice, "FEWEST", 20)
    agreement = iter([0.1, 0.9, 0.85, 0.8, 0.4, 0.1])  # of stem to `last`
    monkeypatch.setattr(start_layer_choice, "neighbour_agreement", lambda one, other: next(agreement))
    recipe = load_recipe("odc_small", [*AUTO, "memory.min_cluster=1", "neck.dim=8", "neck.hidden=8"])
    checkpoint = "scratch:test_resnet"
    init_memory(checkpoint, images, tmp_path / "m", recipe)
    assert read_json(tmp_path / "m" / "memory.json")["recipe"]["memory"]["start_layer"] == "layer2"
    fine_tune(checkpoint, images, tmp_path / "run", recipe, memory=tmp_path / "m")
    kept = load_recipe(tmp_path / "run" / "recipe.yaml").memory
    assert (kept.start_layer, kept.start_epochs) == ("layer2", 4)
