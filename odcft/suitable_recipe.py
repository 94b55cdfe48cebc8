"""Which shipped recipe suits the networks, and so many images."""

from collections.abc import Sequence
from typing import NamedTuple

from odcft.backbone.network import Backbone
from odcft.recipe import Recipe, load_recipe
from odcft.text import count_of

RECIPES_OF_FEW_IMAGES = {"odc": "small", "dc": "dc_small", "codc": "odc_small"}  # by method
ADAMW = "--set optim.optimizer=adamw --set optim.lr=3e-4 --set optim.weight_decay=0.05"  # as in small_vit
FEW_STEPS, LARGE_BATCH = 200, 256  # fewer steps an epoch with such a batch: the recipe is meant for more images


class Suggestion(NamedTuple):
    """A note for the user, and the shipped recipe it names; None if it names settings instead."""

    note: str
    recipe: str | None


def suitable_recipe(backbones: Sequence[Backbone], count: int) -> str | None:
    """The shipped recipe of ODC that suits these networks and this many images; None for the default."""
    if count < FEW_STEPS * load_recipe().optim.batch_size:
        return recipe_of_few_images(backbones, "odc")
    return "odc_vit" if _transformers(backbones) else None


def recipe_of_few_images(backbones: Sequence[Backbone], method: str) -> str | None:
    """The shipped recipe of this method that suits these networks and thousands of images; None if there is none."""
    if _transformers(backbones):
        return "small_vit" if method == "odc" else None
    return RECIPES_OF_FEW_IMAGES[method]


def suggest_recipe(backbones: Sequence[Backbone], count: int, recipe: Recipe) -> Suggestion | None:
    """What would suit these networks, or so few images, better than this recipe; None if nothing shipped does."""
    if (transformers := _transformers(backbones)) and recipe.optim.optimizer == "sgd":
        better = suitable_recipe(backbones, count) if recipe.method == "odc" else None
        instead = f"--recipe {better} is made for transformers." if better else f"pass {ADAMW}."
        return Suggestion(
            f"{transformers[0]} is a transformer, and this recipe trains with SGD, which suits convolutional networks: "
            f"{instead}",
            better,
        )
    steps, better = count // recipe.optim.batch_size, recipe_of_few_images(backbones, recipe.method)
    if (
        steps < FEW_STEPS
        and recipe.optim.batch_size >= LARGE_BATCH
        and better
        and not _is_of_few_images(recipe, better)
    ):
        return Suggestion(
            f"{count:,} images make {count_of(max(1, steps), 'step')} an epoch with batches of "
            f"{recipe.optim.batch_size}: --recipe {better} is made for thousands of images.",
            better,
        )
    return None


def _is_of_few_images(recipe: Recipe, shipped: str) -> bool:
    """Whether a recipe is this shipped one with other settings, say larger batches.

    A recipe does not know its name; its colour jitter, which no preset changes in brightness, tells it from those for
    many images.
    """
    return recipe.augment.brightness == load_recipe(shipped).augment.brightness


def _transformers(backbones: Sequence[Backbone]) -> list[str]:
    return [backbone.arch for backbone in backbones if backbone.is_transformer]
