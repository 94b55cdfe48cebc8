"""Mean and std that are measured where recipe and checkpoint state none."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from odcft.backbone.load import load_backbone
from odcft.errors import OdcftError
from odcft.exports import export
from odcft.files import read_json
from odcft.first_memory import init_memory
from odcft.normalisation import is_assumed
from odcft.recipe import load_recipe
from odcft.train import fine_tune

QUICK = [
    *("optim.epochs=1", "optim.batch_size=4", "neck.dim=8", "neck.hidden=8", "log.tensorboard=false"),
    *("data.crop_fraction=1.0", "data.size=32"),
]
AUTO = ["data.mean=auto", "data.std=auto"]


@pytest.fixture
def images(tmp_path):
    """Half of the pixels of each channel have one value, half another."""
    (tmp_path / "images").mkdir()
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = (51, 102, 0)
    pixels[16:] = (153, 102, 255)
    for i in range(12):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    return str(tmp_path / "images")


@pytest.fixture
def checkpoint(tmp_path):
    """A file that says nothing of its input: without a classifier it is not from timm."""
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "c.pth")
    return str(tmp_path / "c.pth")


MEAN, STD = [0.4, 0.4, 0.5], [0.2, 0.001, 0.5]


def test_what_is_measured_travels_with_memory_run_and_backbone(tmp_path, images, checkpoint):
    recipe = load_recipe("small", [*QUICK, *AUTO])
    init_memory(checkpoint, images, tmp_path / "m", recipe)
    about = read_json(tmp_path / "m" / "memory.json")["recipe"]["data"]
    assert (about["mean"], about["std"]) == (MEAN, STD)
    fine_tune(checkpoint, images, tmp_path / "run", recipe, memory=tmp_path / "m")
    kept = load_recipe(tmp_path / "run" / "recipe.yaml").data
    assert (kept.mean, kept.std) == (MEAN, STD)
    seen = load_backbone(tmp_path / "run").backbone.input
    assert (list(seen.mean), list(seen.std)) == (MEAN, STD)
    export(str(tmp_path / "run"), tmp_path / "out")
    assert list(load_backbone(tmp_path / "out").backbone.input.mean) == MEAN
    fine_tune(str(tmp_path / "run"), images, tmp_path / "again", recipe)  # states its own: nothing is measured
    assert load_recipe(tmp_path / "again" / "recipe.yaml").data.mean is None


def test_null_keeps_imagenets_and_one_of_the_two_can_be_given(tmp_path, images, checkpoint):
    fine_tune(checkpoint, images, tmp_path / "plain", load_recipe("small", QUICK))
    assert load_backbone(tmp_path / "plain").backbone.input.mean == (0.485, 0.456, 0.406)
    half = load_recipe("small", [*QUICK, "data.mean=[0.1, 0.2, 0.3]", "data.std=auto"])
    fine_tune(checkpoint, images, tmp_path / "half", half)
    seen = load_backbone(tmp_path / "half").backbone.input
    assert (list(seen.mean), list(seen.std)) == ([0.1, 0.2, 0.3], STD)


def test_every_rank_has_the_same(tmp_path, images, on_threads):
    from odcft.data.sources import find_images
    from odcft.normalisation import decide_normalisation
    from odcft.plan import make_plan

    recipe = load_recipe("small", [*QUICK, *AUTO])

    def work():
        loaded, found = [load_backbone("scratch:test_resnet", input="gray")], find_images(images)
        plan, _ = make_plan(recipe, [loaded[0].backbone], found)
        plan, notes = decide_normalisation(recipe, plan, loaded, found)
        return plan.data.mean, loaded[0].backbone.input.mean, notes

    one, two = on_threads(2, work)
    assert one == two
    assert one[0] == pytest.approx([0.299 * 0.4 + 0.587 * 0.4 + 0.114 * 0.5], abs=1e-4)


def test_members_that_need_different_numbers_are_refused(tmp_path, images, checkpoint):
    members = [checkpoint, "scratch:alexnet_deepcluster"]
    recipe = load_recipe("small", [*QUICK, *AUTO, "method=codc", "data.size=64"])
    with pytest.raises(OdcftError, match=r"data\.mean and data\.std: the members need different numbers"):
        fine_tune(members, images, tmp_path / "run", recipe)


def test_lightness_and_gradients_keep_the_conventions_of_their_papers():
    assert not is_assumed(load_backbone("scratch:resnet18", input="lab_l").backbone)
    assert is_assumed(load_backbone("scratch:resnet18").backbone)
