"""The plan: a recipe with every `auto` decided. What cannot work is refused here.

The plan is made once, when checkpoints and images are known and before anything slow starts. It has the fields of a
recipe, so `recipe.yaml` in a RUN is the plan written out.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from odcft.backbone.activation_memory import bytes_per_image
from odcft.backbone.frozen_stages import check_freezing
from odcft.backbone.input_resizing import USUAL_SIZE
from odcft.backbone.layers import LAST
from odcft.backbone.load import Loaded
from odcft.backbone.network import Backbone
from odcft.backbone.start_layer import refuse_unknown_layer
from odcft.data import jpeg_crops, shared_memory
from odcft.data.batches import steps_per_epoch
from odcft.data.images import Images
from odcft.data.intensity_range import choose_range, median_shorter_side
from odcft.data.view import View
from odcft.distributed import accelerator, dist
from odcft.errors import OdcftError
from odcft.precision import allow_tf32, has_bfloat16, has_fast_float16
from odcft.recipe import (
    MAX_IMAGE_SIZE,
    MAX_MEMBERS,
    CODCRecipe,
    DataRecipe,
    KMeansRecipe,
    MemberRecipe,
    MemoryRecipe,
    OptimRecipe,
    Recipe,
)
from odcft.suitable_recipe import recipe_of_few_images
from odcft.text import count_of, short_repr

IMAGES_PER_CLUSTER = 128  # what `auto` aims at
MAX_AUTO_CLUSTERS = 10_000  # the most that `auto` chooses (paper, sec. 3.4)
MIN_CLUSTER = 20  # the paper's threshold for small clusters (sec. 3.4)
FEW_IMAGES = 20  # per cluster: with fewer, DC's classifier has little to learn from
USABLE, MARGIN = 0.9, 1.25  # of a device's free memory; how much more than what it keeps a pass needs meanwhile
LEAST_EPOCHS, MOST_EPOCHS = 10, 300  # that `auto` chooses: labels need some to evolve; more were not tried


class DataPlan(DataRecipe):
    size: int
    range: Literal["full"] | tuple[float, float]
    bands: int
    workers: int
    mean: list[float] | None
    std: list[float] | None
    decoder: Literal["pil", "turbo"]


class MemoryPlan(MemoryRecipe):
    clusters: int
    start_epochs: float
    dtype: Literal["float16", "float32"]


class CODCPlan(CODCRecipe):
    members: list[MemberRecipe]


class KMeansPlan(KMeansRecipe):
    engine: Literal["torch", "faiss"]


class OptimPlan(OptimRecipe):
    epochs: int
    final_epochs: float
    accumulate: int
    precision: Literal["float32", "bfloat16", "float16"]
    sync_bn: Literal["on", "off"]


class Plan(Recipe):
    """A recipe with no `auto` left."""

    data: DataPlan
    memory: MemoryPlan
    codc: CODCPlan
    kmeans: KMeansPlan
    optim: OptimPlan

    @property
    def view(self) -> View:
        """How images are prepared when they are not augmented."""
        intensity = None if self.data.range == "full" else self.data.range
        return View(self.data.size, self.data.crop_fraction, intensity=intensity, bands=self.data.bands)

    @property
    def batch_of_rank(self) -> int:
        """Images per batch on each rank."""
        return max(1, self.optim.batch_size // dist.world_size())

    def allow_rounding(self) -> None:
        """Let this process round float32 products to TF32 on a GPU, or not, as `optim.tf32` says."""
        allow_tf32(self.optim.tf32)

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context in which the network runs in the plan's precision."""
        enabled = self.optim.precision != "float32"
        return torch.autocast(device.type, self.autocast_dtype if enabled else torch.bfloat16, enabled=enabled)

    @property
    def autocast_dtype(self) -> torch.dtype:
        """The type of numbers that the network computes with."""
        dtype: torch.dtype = getattr(torch, self.optim.precision)
        return dtype


def make_plan(
    recipe: Recipe, backbones: Sequence[Backbone], images: Images, *, clustered: bool = True
) -> tuple[Plan, list[str]]:
    """Decide every `auto` of a recipe.

    Args:
        recipe: as the user gave it; not changed.
        backbones: one for each member.
        images: all that were found.
        clustered: whether the images will be clustered; for a pretext task they are not.

    Returns:
        The plan, and notes on its decisions for the user.

    Raises:
        OdcftError: the recipe cannot work with these backbones and images.
    """
    notes: list[str] = []
    clusters, min_cluster = 2, recipe.memory.min_cluster
    if clustered:
        clusters, min_cluster, notes = decide_clusters(recipe, len(images))
    batch = min(recipe.optim.batch_size, len(images))
    if batch < 2 * dist.world_size():
        raise OdcftError(
            f"A batch of {batch} for {dist.world_size()} processes is fewer than 2 images each. "
            "Raise optim.batch_size, or use fewer processes."
        )
    if recipe.data.decoder == "turbo" and not jpeg_crops.is_available():
        raise OdcftError(
            "data.decoder=turbo needs simplejpeg, which is not installed. `pip install simplejpeg`, or, for a new run, "
            "--set data.decoder=pil."
        )
    size = _decide_size(recipe, backbones, images)
    bands = _decide_bands(recipe, backbones)
    intensity, note = _decide_range(recipe, images, bands)
    if recipe.optim.checkpointing:
        for backbone in backbones:
            backbone.save_activations_at_blocks_only()
    for backbone in backbones:
        notes += check_freezing(backbone, recipe.optim.freeze)
        _refuse_size(backbone, size)
        if backbone.fixed_size and size != backbone.size:
            notes.append(
                f"{backbone.arch} was made for images of {backbone.size} pixels: it is built for {size}, "
                "and its position embedding is resampled."
            )
    notes += _notes_on_machine(recipe)
    epochs = automatic_epochs(recipe.optim, len(images))
    plan = fill_autos(recipe, clusters, size, intensity, len(backbones), min_cluster, bands=bands, epochs=epochs)
    if bands != 3 and any((plan.augment.saturation, plan.augment.hue, plan.augment.gray)):
        notes.append(f"Images of {bands} bands have no colours: augment.saturation, hue and gray are not applied.")
    _refuse_contradictions(plan)
    notes += _check_first_labels(plan, backbones) if clustered else []
    plan, more = decide_parts(plan, recipe, backbones, len(images))
    return plan, [*([note] if note else []), *notes, *notes_on_queue(plan), *more]


def _refuse_contradictions(plan: Plan) -> None:
    """Refuse settings that do not go together."""
    if plan.augment.quarter_turns and any(member.rotation for member in plan.codc.members):
        raise OdcftError(
            "augment.quarter_turns turns images at random, so no member can predict how a copy was rotated. Pass "
            "--set augment.quarter_turns=false, or set the member's weight for rotation to 0."
        )
    optim = plan.optim
    if optim.schedule == "step" and optim.final_epochs >= optim.epochs:
        raise OdcftError(
            f"optim.final_epochs={optim.final_epochs:g} of {optim.epochs} epochs leaves none at the full learning "
            "rate. Choose more epochs, or, for a new run, --set optim.final_epochs=auto: a sixth of them."
        )


def _check_first_labels(plan: Plan, backbones: Sequence[Backbone]) -> list[str]:
    """Refuse fields on the start of the memory where they have no meaning; notes on them for the user."""
    layer, epochs = plan.memory.start_layer, plan.memory.start_epochs
    notes = []
    if plan.starts_with_layer and plan.neck.relu:
        raise OdcftError(
            "memory.start_features=layer: half of these features are negative, which the neck cannot reach with a ReLU "
            "at its end. Pass --set neck.relu=false."
        )
    if plan.method != "odc" and (plan.memory.start_features == "layer" or plan.memory.instance_share):
        better = recipe_of_few_images(backbones, plan.method)
        notes.append(
            "memory.start_features and memory.instance_share are for --method odc, and not used here"
            + (f": --recipe {better} is made for --method {plan.method}." if better else ".")
        )
    if layer == "auto":  # decided when images have been looked at
        return notes
    if layer != LAST and plan.method == "codc":
        raise OdcftError(
            f"memory.start_layer={short_repr(layer)} is for --method odc or dc: the members of codc have layers of "
            "their own. Pass --set memory.start_layer=last."
        )
    if layer != LAST:
        refuse_unknown_layer(backbones[0], layer)
    return notes if layer == LAST and not epochs and not plan.starts_with_layer else [first_labels_note(plan), *notes]


def first_labels_note(plan: Plan, why: str = "") -> str:
    """Tell the user which layer gives the first labels or features, and for how long they stay."""
    layer, epochs = plan.memory.start_layer, plan.memory.start_epochs
    name = "the last layer" if layer == LAST else layer
    how_long = f"For {epochs:g} of {plan.optim.epochs} epochs" if epochs < plan.optim.epochs else "To the end"
    if plan.starts_with_layer:
        learned = f" {how_long} the network learns to find each image's own among them." if epochs else ""
        return f"The memory starts with features of {name}{why}.{learned}"
    kept = f" {how_long} images keep them." if epochs else ""
    return f"The first labels are clusters of {name}{why}.{kept}"


def _notes_on_machine(recipe: Recipe) -> list[str]:
    """What this machine cannot do as the recipe would have it."""
    notes = []
    if recipe.data.decoder == "auto" and not jpeg_crops.is_available():
        notes.append(
            "simplejpeg is not installed, so Pillow decodes the training crops (data.decoder=pil). "
            "`pip install simplejpeg` to decode JPEGs faster in a new run."
        )
    if recipe.optim.sync_bn == "on" and dist.world_size() > 1 and dist.this_device().type == "cpu":
        notes.append(
            "optim.sync_bn=on has no effect without GPUs: torch cannot synchronise batch norm on CPUs, so each process "
            "normalises over its own images."
        )
    return notes


def fill_autos(
    recipe: Recipe,
    clusters: int = 2,
    size: int = 224,
    intensity: Literal["full"] | tuple[float, float] = "full",
    members: int = 1,
    min_cluster: int | None = None,
    *,
    bands: int = 3,
    epochs: int = 120,
) -> Plan:
    """The plan of a recipe: fill in these values wherever it says `auto`, and what suits this machine for the rest.

    Args:
        recipe: not changed.
        clusters: K.
        size: pixels of the input.
        intensity: `data.range`.
        members: how many networks; each gets the plain loss if the recipe does not list them.
        min_cluster: overrides the recipe's.
        bands: of the images.
        epochs: of training.
    """
    epochs = epochs if recipe.optim.epochs == "auto" else recipe.optim.epochs
    device = dist.this_device()
    gpu = device.type != "cpu"
    another_start = recipe.method != "codc" and (recipe.memory.start_layer != LAST or recipe.starts_with_layer)
    choices: dict[str, dict[str, Any]] = {
        "data": {
            **{"size": size, "range": intensity, "bands": bands, "workers": _workers(gpu), "mean": None, "std": None},
            "decoder": "turbo" if jpeg_crops.is_available() else "pil",
        },
        "memory": {
            **{"clusters": clusters, "dtype": "float16" if gpu else "float32"},
            "start_layer": LAST if recipe.method == "codc" else "auto",  # start_layer_choice.py decides
            "start_epochs": epochs / 2 if another_start else 0.0,
        },
        "codc": {"members": [MemberRecipe().model_dump() for _ in range(members)]},
        "kmeans": {"engine": "torch"},  # always installed, on any device, and divided among the ranks
        "optim": {
            **{"epochs": epochs, "final_epochs": epochs / 6},
            "accumulate": 1,  # make_plan may decide otherwise
            "precision": automatic_precision(device),
            "sync_bn": "on" if gpu else "off",
        },
    }
    fields = recipe.model_dump()
    for group, values in choices.items():
        fields[group] |= {name: value for name, value in values.items() if fields[group][name] == "auto"}
    if isinstance(recipe.data.range, str):  # also for "full": its numbers are known now
        fields["data"]["range"] = intensity
    if min_cluster is not None:
        fields["memory"]["min_cluster"] = min_cluster
    return Plan.model_validate(fields)


def automatic_epochs(recipe: OptimRecipe, count: int) -> int:
    """As many epochs as make `auto_steps` steps: fewer images are seen more often (docs/small_data.md)."""
    epochs = round(recipe.auto_steps / steps_per_epoch(count, recipe.batch_size))
    return min(max(epochs, LEAST_EPOCHS), MOST_EPOCHS)


def with_start_layer(plan: Plan, recipe: Recipe, layer: str) -> Plan:
    """The plan with `memory.start_layer` decided, and with it `memory.start_epochs` if the recipe leaves it `auto`."""
    chosen: dict[str, Any] = {"start_layer": layer}
    if layer == LAST and not plan.starts_with_layer and recipe.memory.start_epochs == "auto":
        chosen["start_epochs"] = 0.0
    return plan.model_copy(update={"memory": plan.memory.model_copy(update=chosen)})


def with_clusters_for(plan: Plan, recipe: Recipe, count: int) -> tuple[Plan, list[str]]:
    """Update the plan after some images turned out to be unreadable: K depends on those that are left.

    Args:
        plan: made for all images that were found.
        recipe: what it was made from.
        count: how many images can be read.

    Returns:
        The plan, and notes for the user.
    """
    clusters, min_cluster, notes = decide_clusters(recipe, count)
    memory = plan.memory.model_copy(update={"clusters": clusters, "min_cluster": min_cluster})
    return plan.model_copy(update={"memory": memory}), notes


# ---------------------------------------------------------------- members


def decide_members(recipe: Recipe, ckpts: list[str]) -> Recipe:
    """The recipe with one member for each checkpoint.

    Raises:
        OdcftError: several checkpoints for a method that takes one, or not as many as the recipe lists.
    """
    members = recipe.codc.members if recipe.method == "codc" else "auto"
    if recipe.method != "codc" and len(ckpts) > 1:
        raise OdcftError(
            f"{recipe.method} takes one checkpoint and then the images; {len(ckpts)} checkpoints were given "
            f"({', '.join(ckpts)}). Several are for --method codc."
        )
    if members != "auto" and len(members) != len(ckpts):
        raise OdcftError(
            f"The recipe lists {len(members)} members under codc.members, and {len(ckpts)} "
            f"checkpoint{'s were' if len(ckpts) > 1 else ' was'} given. Give one for each (you may repeat one; "
            "scratch:NAME starts from random weights), or pass --set codc.members=auto."
        )
    if len(ckpts) > MAX_MEMBERS:
        raise OdcftError(f"codc takes at most {MAX_MEMBERS} checkpoints, not {len(ckpts)}.")
    recipe = recipe.model_copy(deep=True)
    recipe.codc.members = [MemberRecipe() for _ in ckpts] if members == "auto" else members
    return recipe


# ---------------------------------------------------------------- clusters


def decide_clusters(recipe: Recipe, count: int) -> tuple[int, int, list[str]]:
    """Decide how many clusters there are, and up to which size a cluster counts as small.

    `auto` is images / 128, at least 2, at most 10,000 (the paper's number for ImageNet), and few enough that every
    cluster can be larger than the threshold. If even two clusters could not be, the threshold is lowered. A threshold
    that was raised above the paper's 20 may be larger than images / K, as in fig. 4.

    Args:
        recipe: as the user gave it.
        count: how many images there are.

    Returns:
        K, the threshold (`memory.min_cluster`), and notes for the user.

    Raises:
        OdcftError: there are hardly any images, or so many clusters were requested that some would always be small.
    """
    if count < 4:
        few = f"{count_of(count, 'image')} {'is' if count == 1 else 'are'}"
        raise OdcftError(f"{few} too few to cluster; give at least 4, better thousands.")
    K, notes = recipe.memory.clusters, []
    # DC uses the clusters as K-Means finds them, except that none is left empty.
    min_cluster = 0 if recipe.method == "dc" else recipe.memory.min_cluster
    if count < 2 * (min_cluster + 1):
        lowered = count // 4 - 1
        notes.append(
            f"{count} images cannot make two clusters of more than {min_cluster}: "
            f"memory.min_cluster lowered to {lowered}."
        )
        min_cluster = lowered
    most = count // (min_cluster + 1) if min_cluster >= 0 else count
    automatic = max(2, min(count // IMAGES_PER_CLUSTER, MAX_AUTO_CLUSTERS, most))
    if K == "auto":
        return automatic, min_cluster, notes
    if most < K and (count < K or min_cluster <= MIN_CLUSTER):
        why = (
            f"each needs more than {min_cluster} images" if most < count else "there would be more clusters than images"
        )
        raise OdcftError(
            f"{K:,} clusters for {count:,} images cannot work: {why}. "
            f"--clusters auto would use {automatic}; {most} is the maximum."
        )
    if most < K:
        notes.append(
            f"{count:,} images leave {count // K} for each of {K:,} clusters, no more than "
            f"memory.min_cluster={min_cluster}: at most {most:,} clusters can be larger. The others stay small, and "
            "are refilled only when a cluster is large enough to split. The paper's fig. 4 finds that worse."
        )
    elif recipe.method == "dc" and count < K * FEW_IMAGES:
        notes.append(
            f"{count:,} images leave only {count // K} for each of {K:,} clusters, too few to learn well: "
            f"--clusters auto would use {automatic}. For thousands of images: --recipe dc_small."
        )
    elif K * 2 * (min_cluster + 1) > count:
        notes.append(
            f"{count:,} images leave only {count // K} for each of {K:,} clusters, little more than "
            f"memory.min_cluster={min_cluster}: many will be refilled again and again."
        )
    return K, min_cluster, notes


# ---------------------------------------------------------------- images


def automatic_size(backbone: Backbone, side: int) -> int:
    """The default input size in pixels: the network's own, or that of the images if they are smaller.

    Small images are not enlarged to the network's size, only rounded up to a multiple of 8 (at least 32), or of what
    suits a transformer (its patch). A transformer made for more than 224 pixels gets 224, because its cost grows faster
    than the number of pixels. A network that timm cannot build for another size keeps its own.

    Args:
        backbone: the network.
        side: the median shorter side of the images (`median_shorter_side`), 0 if unknown.
    """
    own = backbone.size
    if not backbone.fixed_size:
        return own if side == 0 else min(own, max(32, _round_up(side, 8)))
    most = min(own, USUAL_SIZE)
    size = min(own, _round_up(min(most, max(32, side)) if side else most, backbone.size_step))
    return size if size == own or not backbone.why_not(size) else own


def _round_up(pixels: int, step: int) -> int:
    return -(-pixels // step) * step


def _decide_size(recipe: Recipe, backbones: Sequence[Backbone], images: Images) -> int:
    """Decide `data.size`; `auto` is the smallest size that suits the members and that all transformers can have."""
    if recipe.data.size != "auto":
        return recipe.data.size
    side = median_shorter_side(images)
    size = min(automatic_size(b, side) for b in backbones)
    fixed = [b for b in backbones if b.fixed_size]
    if len(backbones) > 1 and any(size != b.size for b in fixed):
        size = _round_up(size, math.lcm(*(b.size_step for b in fixed)))
        return min((b.size for b in fixed if b.why_not(size)), default=size)
    return size


def _refuse_size(backbone: Backbone, size: int) -> None:
    if why := backbone.why_not(size):
        raise OdcftError(
            f"{why.rstrip('.')} (or --set data.size={backbone.size}, its own size, or auto). "
            "Members of codc all see the same images."
        )


def _decide_bands(recipe: Recipe, backbones: Sequence[Backbone]) -> int:
    """The bands of the images, which must suit every member."""
    found = {backbone.input.bands for backbone in backbones}
    if len(found) > 1:
        lists = ", ".join(f"{backbone.arch} {backbone.input.bands}" for backbone in backbones)
        raise OdcftError(
            f"The members take images of different numbers of bands ({lists}), but members of codc all see the same "
            "images. --set data.bands=… widens those for RGB."
        )
    return found.pop()


def _decide_range(recipe: Recipe, images: Images, bands: int) -> tuple[Literal["full"] | tuple[float, float], str]:
    """Decide `data.range` from the images, the same on every rank; also returns a note for the user.

    The full range of a type is written as numbers, too, so that whoever uses the backbone later need not guess it;
    "full" stays only if no image has more than 8 bits a channel.
    """
    if not isinstance(recipe.data.range, str):
        return recipe.data.range, ""
    mine = {0: _range_or_reason(images, recipe.data.range, bands)} if dist.rank() == 0 else {}
    intensity, note = dist.gather_dict(mine)[0]
    if isinstance(note, OdcftError):
        raise note
    return intensity or "full", note


def _range_or_reason(images: Images, rule: str, bands: int) -> tuple[tuple[float, float] | None, str | OdcftError]:
    """The range and the note about it, or why there is none, to be raised on every rank."""
    try:
        return choose_range(images, rule, bands=bands)
    except OdcftError as error:
        return None, error


def view_for_evaluation(loaded: Loaded, images: Images, size: int | None, run: View | None = None) -> View:
    """How labelled images are prepared: as in training, if the checkpoint records that.

    If it does not, images smaller than the network's size are used whole and not enlarged to it.

    Args:
        loaded: the backbone.
        images: the labelled images.
        size: given by the user.
        run: the view of the RUN that the backbone belongs to.

    Raises:
        OdcftError: the size is none that images can have.
    """
    if size is not None and not 8 <= size <= MAX_IMAGE_SIZE:
        raise OdcftError(f"--size {size}: give 8 to {MAX_IMAGE_SIZE:,} pixels.")
    backbone = loaded.backbone
    view = run or backbone.input.view
    if view.intensity is None:  # trained on 8-bit images, or by other code
        view = replace(view, intensity=choose_range(images, bands=view.bands)[0])
    if size is not None or run is not None or loaded.states_view:
        return replace(view, size=size or view.size)
    size, usual = automatic_size(backbone, median_shorter_side(images)), automatic_size(backbone, 0)
    return replace(view, size=size, crop_fraction=1.0 if size < usual else view.crop_fraction)


# ---------------------------------------------------------------- memory of the device


def decide_parts(plan: Plan, recipe: Recipe, backbones: Sequence[Backbone], images: int) -> tuple[Plan, list[str]]:
    """The plan with `optim.accumulate` decided if it is `auto`, and a note if that is more than one part.

    Raises:
        OdcftError: the recipe asks for more parts than there can be, with 2 images each.
    """
    batch = min(plan.optim.batch_size, images) // dist.world_size()
    most, asked = batch // 2, recipe.optim.accumulate
    if asked != "auto":
        if asked > max(1, most):
            raise OdcftError(
                f"optim.accumulate={asked} needs 2 images for each part, and a process has {batch} images of a batch. "
                f"Choose at most {most}."
            )
        return plan, []
    free = accelerator.free_memory()
    if free is None:  # also on a CPU
        return plan, []
    needed = bytes_of_step(plan, backbones, images, batch)
    an_image = (needed - bytes_of_step(plan, backbones, images, 0)) / batch
    parts = next((n for n in range(1, most) if needed - an_image * (batch - -(-batch // n)) < USABLE * free), most)
    parts = max(dist.gather_dict({dist.rank(): parts}).values())
    note = (
        f"A step with {batch} images on each device needs about {needed / 1e9:.0f} GB of its memory, and "
        f"{free / 1e9:.0f} GB are free: they are computed in {parts} parts (optim.accumulate={parts}; batch norm sees "
        "one part at a time)."
    )
    optim = plan.optim.model_copy(update={"accumulate": parts})
    return plan.model_copy(update={"optim": optim}), [note] if parts > 1 else []


def batch_in_parts(plan: Plan) -> str:
    """The batch of a plan as text: "batch 512", or "batch 512 in 4 parts"."""
    parts = plan.optim.accumulate
    return f"batch {plan.optim.batch_size}" + (f" in {parts} parts" if parts > 1 else "")


def bytes_of_step(plan: Plan, backbones: Sequence[Backbone], images: int, part: int) -> int:
    """About how many bytes of a device a training step needs, measured on the shapes of its tensors.

    Args:
        plan: of the run.
        backbones: one for each member.
        images: N, of the run.
        part: images of this rank that are computed at once.
    """
    weights = sum(p.numel() for backbone in backbones for p in backbone.parameters())
    K, D, ranks = plan.memory.clusters, plan.neck.dim * len(backbones), dist.world_size()
    copies = 2 + (2 if plan.optim.optimizer == "adamw" else 1) + (ranks > 1)  # weights, gradients, momentum, buckets
    # Features; sums, centroids, and the copy of these in bfloat16 that only a CPU makes.
    memory = images // ranks * D * (2 if plan.memory.dtype == "float16" else 4) + K * D * 14
    seen = 1 + max(bool(one.rotation) + bool(one.mixup) for one in plan.codc.members)  # each image, with its copies
    pixels = 4 * plan.data.bands * plan.data.size**2 * plan.batch_of_rank * (2 + seen)
    kept = sum(bytes_per_image(backbone, plan.data.size, plan.autocast_dtype) for backbone in backbones)
    logits = 12 * K * len(backbones)  # in float32, with their gradient and the softmax
    return int(4 * weights * copies + memory + pixels + part * seen * (MARGIN * kept + logits))


# ---------------------------------------------------------------- the machine


def notes_on_queue(plan: Plan) -> list[str]:
    """A note if the loader processes read fewer batches ahead than usual, because shared memory is small."""
    workers, batch = plan.data.workers, plan.data.bands * plan.data.size**2 * plan.batch_of_rank
    ahead, shared = shared_memory.fitting_queue(workers, batch)
    if not workers or (ahead == shared_memory.AHEAD and shared):
        return []
    return [
        f"{shared_memory.SHARED_MEMORY} is small for {workers * dist.local_world_size()} loader processes: each reads "
        f"{ahead} instead of {shared_memory.AHEAD} batches ahead{'' if shared else ', through a pipe'}. "
        f"{shared_memory.REMEDY}."
    ]


def automatic_precision(device: torch.device) -> Literal["float32", "bfloat16", "float16"]:
    """The precision that `auto` stands for: of 16 bits on a GPU that is faster with them."""
    if device.type != "cpu" and has_bfloat16(device):
        return "bfloat16"
    return "float16" if has_fast_float16(device) else "float32"


def _workers(gpu: bool) -> int:
    """Data loader processes for each rank: its share of this machine's cores if a GPU trains, else none."""
    return min(16, cores_of_rank()) if gpu else 0


def loader_workers(device: torch.device) -> int:
    """Data loader processes for each rank while features are extracted: on a CPU, the network needs most cores."""
    return _workers(True) if device.type != "cpu" else min(4, cores_of_rank() // 4)


def cores_of_rank() -> int:
    """This rank's share of the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores // dist.local_world_size()
