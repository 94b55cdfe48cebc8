"""A shipped recipe that suits the networks and the number of images better is named to the user."""

import pytest

from odcft.backbone.load import load_backbone
from odcft.recipe import load_recipe
from odcft.suitable_recipe import suggest_recipe


@pytest.mark.parametrize(
    ("arch", "count", "recipe", "better", "words"),
    [
        (
            "test_resnet",
            20_000,
            "odc_r50_finetune",
            "small",
            "20,000 images make 39 steps an epoch with batches of 512",
        ),
        ("test_resnet", 300, "dc_r50_finetune", "dc_small", "300 images make 1 step an epoch"),
        ("test_resnet", 300, "codc_r50", "odc_small", "--recipe odc_small is made for thousands of images"),
        ("test_vit", 20_000, "small", "small_vit", "--recipe small_vit is made for transformers"),
        ("test_vit", 20_000, "odc_vit", "small_vit", "--recipe small_vit is made for thousands of images"),
        ("test_vit", 1_281_167, "odc_r50_finetune", "odc_vit", "--recipe odc_vit is made for transformers"),
        ("test_vit", 20_000, "dc_small", None, "suits convolutional networks: pass --set optim.optimizer=adamw"),
    ],
)
def test_what_fits_better_is_suggested(arch, count, recipe, better, words):
    backbones = [load_backbone(f"scratch:{arch}").backbone]
    suggestion = suggest_recipe(backbones, count, load_recipe(recipe))
    assert suggestion.recipe == better
    assert words in suggestion.note
    if better:  # which is then the end of it
        assert suggest_recipe(backbones, count, load_recipe(better, [f"method={load_recipe(recipe).method}"])) is None


@pytest.mark.parametrize(
    ("arch", "count", "recipe"),
    [
        ("test_resnet", 1_281_167, "odc_r50_finetune"),
        ("test_resnet", 2_000, "small"),
        ("test_vit", 1_281_167, "odc_vit"),
    ],
)
def test_nothing_is_suggested_where_the_recipe_fits(arch, count, recipe):
    assert suggest_recipe([load_backbone(f"scratch:{arch}").backbone], count, load_recipe(recipe)) is None


@pytest.mark.parametrize("preset", [None, "gray", "satellite"])
@pytest.mark.parametrize(
    ("arch", "recipe"),
    [("test_resnet", "small"), ("test_resnet", "dc_small"), ("test_resnet", "fast"), ("test_vit", "small_vit")],
)
def test_a_recipe_is_not_told_to_be_itself_with_larger_batches(arch, recipe, preset):
    backbones = [load_backbone(f"scratch:{arch}").backbone]
    larger = load_recipe(recipe, ["optim.batch_size=512"], preset=preset)
    assert suggest_recipe(backbones, 20_000, larger) is None
