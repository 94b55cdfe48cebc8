"""The recipe with every `auto` decided."""

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from odcft.backbone.load import Loaded
from odcft.data.intensity_range import own_range, usual_side
from odcft.data.sources import Images
from odcft.data.view import View
from odcft.distributed import dist
from odcft.errors import OdcftError
from odcft.files import read_json
from odcft.precision import has_bfloat16
from odcft.progress import Progress
from odcft.recipe import MemberRecipe, Recipe
from odcft.run.folder import BACKBONES
from odcft.text import count_of

if TYPE_CHECKING:
    from odcft.backbone.load import Loaded
    from odcft.data.sources import Images
    from odcft.data.view import View


MOST_CLUSTERS = 10_000  # that `auto` takes (paper, sec. 3.4)
FEW = 20  # images a cluster: with fewer, DC's classifier has little to learn from


def resolve_members(recipe: Recipe, ckpts: list[str]) -> Recipe:
    """The recipe with a member for every checkpoint.

    Raises:
        OdcftError: several checkpoints for a method that takes one, or another number than the recipe lists.
    """
    recipe = recipe.model_copy(deep=True)
    members = recipe.codc.members
    if recipe.method != "codc":
        if len(ckpts) > 1:
            raise OdcftError(
                f"{recipe.method} takes one checkpoint and then the images; {len(ckpts)} checkpoints were given "
                f"({', '.join(ckpts)}). Several are for --method codc."
            )
        members = "auto"
    if members != "auto" and len(members) != len(ckpts):
        raise OdcftError(
            f"The recipe lists {len(members)} members under codc.members, and {len(ckpts)} "
            f"checkpoint{'s were' if len(ckpts) > 1 else ' was'} given. Give one for each (the same may come twice, "
            "scratch:NAME starts from random weights), or --set codc.members=auto."
        )
    if len(ckpts) > len(BACKBONES):
        raise OdcftError(f"{len(ckpts)} members are more than the {len(BACKBONES)} that codc takes.")
    recipe.codc.members = [MemberRecipe() for _ in ckpts] if members == "auto" else members
    return recipe


def resolve(
    recipe: Recipe,
    loaded: list[Loaded],
    images: Images,
    progress: Progress | None = None,
    memory: Path | None = None,
) -> tuple[Recipe, torch.device]:
    """Replace every `auto` but the number of clusters, and choose the device."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", dist.local_rank()) if gpu else torch.device("cpu")
    recipe = recipe.model_copy(deep=True)
    backbones = [one.backbone for one in loaded]
    if min(recipe.optim.batch_size, len(images)) < 2 * dist.world_size():
        raise OdcftError(
            f"A batch of {min(recipe.optim.batch_size, len(images))} for {dist.world_size()} processes is less than 2 "
            "images each. Raise optim.batch_size, or use fewer processes."
        )
    if recipe.data.size == "auto":
        side = usual_side(images)
        sizes = {b.size for b in backbones if b.fixed_size} or {automatic_size(b.size, False, side) for b in backbones}
        recipe.data.size = min(sizes)
    _resolve_range(recipe, images, progress, memory)
    for backbone in backbones:
        if backbone.fixed_size and recipe.data.size != backbone.size:
            raise OdcftError(
                f"{backbone.arch} takes images of {backbone.size} pixels only, not {recipe.data.size}. "
                f"Pass --set data.size={backbone.size}, or auto; members of codc all see the same images."
            )
        if not backbone.takes(_number(recipe.data.size)):
            raise OdcftError(
                f"{backbone.arch} cannot look at images of {recipe.data.size} pixels. "
                f"It was made for {backbone.size}: try --set data.size={backbone.size}."
            )
    if recipe.data.workers == "auto":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", dist.world_size()))
        recipe.data.workers = min(16, cores // local_ranks) if gpu else 0
    if recipe.optim.final_epochs == "auto":
        recipe.optim.final_epochs = recipe.optim.epochs / 6
    if recipe.optim.schedule == "step" and recipe.optim.final_epochs >= recipe.optim.epochs:
        raise OdcftError(
            f"optim.final_epochs={recipe.optim.final_epochs:g} of {recipe.optim.epochs} epochs leaves none at the full "
            "learning rate. Choose more epochs, or, for a new run, --set optim.final_epochs=auto: a sixth of them."
        )
    if recipe.kmeans.engine == "auto":
        recipe.kmeans.engine = "torch"  # always there, on any device, divided among the ranks
    if recipe.memory.dtype == "auto":
        recipe.memory.dtype = "float16" if gpu else "float32"
    if recipe.optim.precision == "auto":
        recipe.optim.precision = "bfloat16" if gpu and has_bfloat16(device) else "float32"
    return recipe, device


def _resolve_range(recipe: Recipe, images: Images, progress: Progress | None, memory: Path | None) -> None:
    """Settle data.range: as the features of an `init-memory` folder were made, or by the images.

    Numbers are written even for the full range of a type, so that nobody who sees the backbone's images later has to
    guess; `full` is left where no image has more than 8 bits.
    """
    if memory is not None and recipe.data.range == "auto":
        # `_read_memory` says what is wrong with the folder.
        with suppress(OdcftError, ValueError, KeyError, TypeError, AttributeError):
            about = read_json(memory / "memory.json")
            recipe.data.range = about["recipe"]["data"].get("range", "full")
    if recipe.data.range in ("auto", "full"):
        looked = {0: own_range(images, recipe.data.range == "full")} if dist.rank() == 0 else {}
        found, words = dist.gather_dict(looked)[0]  # one answer for all ranks
        recipe.data.range = found or "full"
        if progress and words:
            progress.say(f"Note        {words}")


def resolve_clusters(recipe: Recipe, count: int, progress: Progress | None = None) -> Recipe:
    """The recipe with a number of clusters that can work for `count` images.

    `auto` is count / 128, at least 2, at most 10,000 (which the paper has for ImageNet), and no more than leaves every
    cluster above the small-cluster threshold. Where even two clusters would be below it, the threshold is lowered.

    Raises:
        OdcftError: a given number of clusters that leaves some of them small whatever happens.
    """
    recipe = recipe.model_copy(deep=True)
    memory = recipe.memory
    if count < 4:
        few = f"{count_of(count, 'image')} {'is' if count == 1 else 'are'}"
        raise OdcftError(f"{few} too few to cluster; give at least 4, better thousands.")
    if recipe.method == "dc":  # clusters are small or not as K-Means finds them; only none is left empty
        memory.min_cluster = 0
    if count < 2 * (memory.min_cluster + 1):
        lowered = count // 4 - 1
        if progress:
            progress.say(
                f"Note        {count} images cannot make clusters of more than {memory.min_cluster}: "
                f"memory.min_cluster lowered to {lowered}."
            )
        memory.min_cluster = lowered
    most = count // (memory.min_cluster + 1) if memory.min_cluster >= 0 else count
    automatic = max(2, min(count // 128, MOST_CLUSTERS, most))
    if memory.clusters == "auto":
        memory.clusters = automatic
    elif memory.clusters > most:
        why = (
            f"each needs more than {memory.min_cluster} images"
            if most < count
            else "there would be more clusters than images"
        )
        raise OdcftError(
            f"{memory.clusters:,} clusters for {count:,} images cannot work: {why}. "
            f"--clusters auto would use {automatic}; {most} is the most."
        )
    elif progress and recipe.method == "dc" and memory.clusters * FEW > count:
        progress.say(
            f"Note        {count:,} images leave {count // memory.clusters} for each of {memory.clusters:,} clusters, "
            f"few to learn from: --clusters auto would use {automatic}. For thousands of images: --recipe dc_small."
        )
    elif progress and memory.clusters * 2 * (memory.min_cluster + 1) > count:
        progress.say(
            f"Note        {count:,} images leave {count // memory.clusters} for each of {memory.clusters:,} clusters, "
            f"little more than memory.min_cluster={memory.min_cluster}: many will be refilled again and again."
        )
    return recipe


def view_of(recipe: Recipe) -> View:
    """How a resolved recipe has images seen where they are not augmented."""
    assert recipe.data.range != "auto", "the recipe is resolved by now"
    intensity = None if recipe.data.range == "full" else recipe.data.range
    return View(_number(recipe.data.size), recipe.data.crop_fraction, intensity=intensity)


def _number(value: Any) -> int:
    assert isinstance(value, int), "the recipe is resolved by now"
    return value


def automatic_size(network_size: int, fixed: bool, side: int) -> int:
    """Pixels of the input where nothing else says: the network's own size, or the images' where they are smaller.

    Small images are not blown up, but brought to the next multiple of 8, unless the network takes one size only.

    Args:
        network_size: pixels of the input that the network was made for.
        fixed: whether it takes no other.
        side: of the images (`usual_side`), 0 if unknown.
    """
    return network_size if fixed or side == 0 else min(network_size, max(32, -(-side // 8) * 8))


def view_for_evaluation(loaded: "Loaded", images: "Images", size: int | None, run: "View | None" = None) -> "View":
    """How labelled images are seen: as the recipe that trained the backbone says, where its file tells.

    A network that was made for larger images is not shown small ones enlarged, but whole and as they are, unless its
    file says so.

    Args:
        loaded: the backbone.
        images: those to see.
        size: the user's word.
        run: how the RUN it is of saw its images.
    """
    from odcft.data.intensity_range import own_range, usual_side

    backbone = loaded.backbone
    view = run or backbone.input.view
    if view.intensity is None:  # it was trained on images of 8 bits, or somewhere else
        view = replace(view, intensity=own_range(images)[0])
    if size is not None or run is not None or loaded.told:
        return replace(view, size=size or view.size)
    size = automatic_size(view.size, backbone.fixed_size, usual_side(images))
    return replace(view, size=size, crop_fraction=1.0 if size < view.size else view.crop_fraction)
