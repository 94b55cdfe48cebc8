"""The mean and standard deviation that images are normalised with, where the recipe leaves them `auto`."""

from collections.abc import Sequence

from odcft.backbone.load import Loaded, set_mean_and_std
from odcft.backbone.network import Backbone
from odcft.backbone.network_input import default_input
from odcft.data.images import Images
from odcft.data.pixel_statistics import measure
from odcft.distributed import dist
from odcft.errors import OdcftError
from odcft.plan import Plan
from odcft.recipe import Recipe
from odcft.text import count_of


def decide_normalisation(recipe: Recipe, plan: Plan, loaded: list[Loaded], images: Images) -> tuple[Plan, list[str]]:
    """Measure mean and std on the images if the recipe says `auto` and the checkpoint states none.

    For a network of n bands they are also measured if the recipe gives none: there are no usual ones.

    Args:
        recipe: as the user gave it.
        plan: made from it.
        loaded: the networks; what is measured is set in their adapters.
        images: all images.

    Returns:
        The plan, in which what was measured is written as numbers; and notes for the user.

    Raises:
        OdcftError: several networks need different numbers.
    """
    unknown = [one for one in loaded if not one.backbone.input.measured]
    wanted = ("auto", None) if unknown else ("auto",)
    fields = [name for name in ("mean", "std") if getattr(recipe.data, name) in wanted]
    assumed = unknown or [one for one in loaded if fields and not one.states_view and is_assumed(one.backbone, fields)]
    if not (assumed and fields):
        return plan, []
    if len(assumed) < len(loaded) or len({one.backbone.input.color for one in loaded}) > 1:
        raise OdcftError(
            "data.mean and data.std: the members need different numbers, and a recipe has one for all. "
            "Pass --set data.mean=null --set data.std=null to keep those of each checkpoint."
        )
    values, count = _measured(images, plan, assumed[0].backbone.input.color)
    if not count:
        return plan, []  # nothing can be read, which is reported soon
    chosen = {name: values[name] for name in fields}
    for one in assumed:
        set_mean_and_std(one.backbone, chosen.get("mean"), chosen.get("std"))
    numbers = " and ".join(f"{name} {chosen[name]}" for name in fields)
    note = f"{numbers}, measured on {count_of(count, 'image')}, because the checkpoint states none."
    return plan.model_copy(update={"data": plan.data.model_copy(update=chosen)}), [note[0].upper() + note[1:]]


def is_assumed(backbone: Backbone, fields: Sequence[str] = ("mean", "std")) -> bool:
    """Whether a network has ImageNet's mean and std (or one of them) because its checkpoint does not say otherwise."""
    input = backbone.input
    usual = default_input(input.color, input.size)
    same = all(getattr(input, name) == getattr(usual, name) for name in fields)
    return same and input.color in ("rgb", "bgr", "gray") and input.range == 1


def _measured(images: Images, plan: Plan, color: str) -> tuple[dict[str, list[float]], int]:
    """Mean and std, and of how many images; the same on every rank."""
    mine = {}
    if dist.rank() == 0:
        found = measure(images, plan.view, color, plan.data.workers)
        mean, std = found.mean_and_std()
        mine = {0: ({"mean": mean, "std": std}, found.images)}
    return dist.gather_dict(mine)[0]
