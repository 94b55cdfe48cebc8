"""Presets: fields that suit a kind of images, between the recipe and `--set`."""

import pytest
import timm
import torch

from odcft.errors import OdcftError
from odcft.presets import PRESETS
from odcft.recipe import load_recipe


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_valid_recipe_that_says_what_it_does(name):
    preset = load_recipe("small", preset=name)
    plain = load_recipe("small")
    assert preset.optim == plain.optim
    assert preset.memory == plain.memory
    assert (preset.augment == plain.augment) is (name == "photo")
    assert preset.data.mean == preset.data.std == (None if name == "photo" else "auto")
    assert len(PRESETS[name].what) > 40


def test_set_overrides_a_preset_and_a_preset_the_recipe():
    recipe = load_recipe("small", ["augment.hue=0.3"], preset="satellite")
    assert (recipe.augment.hue, recipe.augment.gray, recipe.augment.vertical_flip) == (0.3, 0, 0.5)
    assert recipe.augment.brightness == load_recipe("small").augment.brightness


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(OdcftError, match=r"--preset satelite: no such preset\. Did you mean satellite\?"):
        load_recipe("small", preset="satelite")


def test_a_run_with_a_preset_says_what_it_means_and_keeps_its_values(odcft_command, tmp_path, make_images):
    images, checkpoint = make_images(tmp_path / "images"), tmp_path / "c.pth"
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), checkpoint)
    quick = [f"--set={s}" for s in ("optim.epochs=1", "optim.batch_size=4", "neck.dim=8", "log.tensorboard=false")]
    given = [checkpoint, images, "--recipe", "small", *quick, "--set", "optim.precision=float32"]
    code, _, told = odcft_command("finetune", *given, "--out", tmp_path / "run", "--preset", "microscopy")
    assert code == 0, told
    assert "Preset      microscopy: vertical flips and quarter turns on, because a slide has no up" in told
    assert "measured on 12 images, because the checkpoint states none" in told
    kept = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert (kept.augment.vertical_flip, kept.augment.quarter_turns, kept.augment.hue) == (0.5, True, 0)
    assert len(kept.data.mean) == len(kept.data.std) == 3
    resumed = ["--out", tmp_path / "run", "--resume", "--epochs", 2]
    assert odcft_command("finetune", checkpoint, images, *resumed)[0] == 0
    code, _, told = odcft_command("finetune", *given, *resumed, "--preset", "document")
    assert code == 2
    assert "was started with augment." in told
