"""The programs `init-memory` and `finetune`: what a run starts from, the loop, and what it leaves behind.

Shapes: N images, S of them on this rank, B batch, K clusters, D embedding.
"""

import json
import math
import os
import socket
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from odcft import dist, folders, seeds, snapshot, stopping
from odcft.advice import explained
from odcft.augment import augment_batch
from odcft.backbone import Backbone, Loaded, load_backbone, loading_line
from odcft.card import about_run
from odcft.data import Crops, Images, TrainingOrder, automatic_size, find_images, loader, own_range, usual_side
from odcft.description import read_json
from odcft.errors import OdcftError
from odcft.exports import write_timm
from odcft.features import extract, to_float
from odcft.health import Window, all_finite, cluster_figures, finite_gradients, nmi, summary, warnings
from odcft.inputs import View
from odcft.kmeans import assign, kmeans
from odcft.late import LateReader
from odcft.log import Metrics, Progress, count_of, duration, now, read_lines
from odcft.methods import METHODS, codc, odc
from odcft.model import Members, Model
from odcft.optim import lr_at, make_optimizer, set_lr
from odcft.optim import restore as restore_optimizer
from odcft.optim import stored as stored_optimizer
from odcft.precision import allow_tf32, has_bfloat16
from odcft.recipe import MemberRecipe, Recipe, dump, flat, load_recipe, make_recipe, taken_as
from odcft.resume import (
    read_about,
    read_quarantine,
    refuse_odd_state,
    refuse_other_checkpoint,
    resumed_recipe,
    same_images,
)
from odcft.stopping import Stopped

MOST_CLUSTERS = 10_000  # that `auto` takes (paper, sec. 3.4)
FEW_STEPS, LARGE_BATCH = 200, 256  # an epoch of fewer steps with larger batches: the recipe is for more images
FEW = 20  # images a cluster: with fewer, DC's classifier has little to learn from


@dataclass
class Start:
    """What training starts from: the same on every rank but for the rows of the memory."""

    loaded: list[Loaded]  # of each member: one, but for codc
    necks: list[nn.Module]
    dim: int  # of what a neck gives
    images: Images  # those that can be read
    recipe: Recipe  # resolved
    state: odc.State
    device: torch.device
    unreadable: dict[str, str] = field(default_factory=dict)  # name: reason


# ---------------------------------------------------------------- what a run starts from


def begin(
    ckpts: list[str],
    data: str,
    recipe: Recipe,
    progress: Progress,
    arch: str | None = None,
    memory: Path | None = None,
    training: bool = True,
) -> Start:
    """Load the checkpoints, find the images, and build both memories, by K-Means or from an `init-memory` folder."""
    images = find_images(data)
    recipe = resolve_members(recipe, ckpts)
    with progress.waiting(f"Loading     {', '.join(ckpts)} …"):
        loaded = load_members(ckpts, arch, recipe)
    resolve_clusters(recipe, len(images))  # refuse what cannot work before anything slow is done
    recipe, device = resolve(recipe, loaded, images, progress, memory)
    allow_tf32(recipe.optim.tf32)
    method = METHODS[recipe.method]
    necks, dim = make_necks(loaded, recipe)
    _describe(loaded, images, recipe, progress, training)

    if memory is not None:
        return _read_memory(memory, ckpts, loaded, necks, dim, images, recipe, device)

    networks = [nn.Sequential(one.backbone, neck).to(device).eval() for one, neck in zip(loaded, necks, strict=True)]

    def network(images: Tensor) -> Tensor:
        return codc.side_by_side([network(images) for network in networks])

    batch = max(1, recipe.optim.batch_size // dist.world_size())
    crops = Crops(images, view_of(recipe))
    features_SD, bad_here = extract(network, crops, batch, _number(recipe.data.workers), device, progress)
    bad = dist.gather_dict(bad_here)
    unreadable = {images.names[i]: reason for i, reason in sorted(bad.items())}
    if len(bad) == len(images):
        name, reason = next(iter(unreadable.items()))
        raise OdcftError(f"None of the {len(images):,} images in {data} can be read. The first is {name}: {reason}.")
    if bad:
        features_SD = dist.without(features_SD, set(bad), len(images))
        images = images.without(set(bad))
    if unreadable:
        some = ", ".join(list(unreadable)[:3]) + (", …" if len(unreadable) > 3 else "")
        progress.say(f"            {len(unreadable):,} unreadable and skipped: {some} (all in quarantine.csv)")

    recipe = resolve_clusters(recipe, len(images), progress)
    started = time.monotonic()
    K = _number(recipe.memory.clusters)
    seed = seeds.seed(recipe.seed, "kmeans", 0)
    with progress.waiting(f"K-Means     {K:,} clusters of {len(images):,} images …"):
        features_SD = method.compact(features_SD, recipe)
        centroids_KD = kmeans(features_SD, K, seed, recipe.kmeans.iterations, recipe.kmeans.engine)
        labels_S = assign(features_SD, centroids_KD)[0]
    state = method.start(features_SD, labels_S, recipe)
    sizes_K = state.memory.sizes_K
    progress.say(
        f"K-Means     {K:,} clusters · {recipe.kmeans.iterations} iterations · "
        f"sizes {int(sizes_K.min()):,} … {int(sizes_K.max()):,} · {duration(time.monotonic() - started)}"
    )
    return Start(loaded, necks, dim, images, recipe, state, device, unreadable)


def load_members(ckpts: list[str], arch: str | None, recipe: Recipe) -> list[Loaded]:
    """The backbone of each checkpoint, as the recipe wants them taken."""
    return [
        load_backbone(ckpt, arch, **taken_as(recipe), seed=recipe.seed, member=member)
        for member, ckpt in enumerate(ckpts)
    ]


def make_necks(loaded: list[Loaded], recipe: Recipe) -> tuple[list[nn.Module], int]:
    """A neck for each member, and the length of what each gives."""
    made = []
    for member, one in enumerate(loaded):
        with seeds.weights(recipe.seed, "neck", member):
            made.append(METHODS[recipe.method].neck(one.backbone.width, recipe))
    return [neck for neck, _ in made], made[0][1]


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
    if len(ckpts) > len(folders.BACKBONES):
        raise OdcftError(f"{len(ckpts)} members are more than the {len(folders.BACKBONES)} that codc takes.")
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


def _describe(loaded: list[Loaded], images: Images, recipe: Recipe, progress: Progress, training: bool) -> None:
    """Say what was found and what will be done, before anything slow is."""
    for one in loaded:
        found = one.match
        cover = f"{len(found.tensors)}/{found.expected} tensors under {found.where}" if found else one.source
        progress.say(f"Checkpoint  {one.family} · {one.backbone.arch} · {one.backbone.input.color}, {cover}")
        for note in one.notes:
            progress.say(f"Note        {note}")
    if recipe.method == "codc" and len(loaded) == 1 and recipe.codc.members == [MemberRecipe()]:
        progress.say("Note        One plain member has no one to collaborate with: this is ODC.")
    progress.say(f"Images      {len(images):,} in {images.source}")
    if images.skipped:
        progress.say(f"Not read    {images.not_read()}")
    optim, ranks = recipe.optim, dist.world_size()
    plan = [recipe.method.upper(), count_of(optim.epochs, "epoch"), f"batch {optim.batch_size}"] if training else []
    plan += [f"{recipe.data.size} px", f"{ranks} process{'es' if ranks > 1 else ''}", optim.precision]
    progress.say(f"Plan        {' · '.join(plan)}")
    if training:
        for note in unfit(loaded, len(images), recipe):
            progress.say(f"Note        {note}")


def fitting_recipe(backbones: list[Backbone], count: int) -> str | None:
    """The shipped recipe that suits such networks and so many images; None for the default."""
    if any(backbone.is_transformer for backbone in backbones):
        return "odc_vit"
    return "small" if count < FEW_STEPS * load_recipe().optim.batch_size else None


def unfit(loaded: list[Loaded], count: int, recipe: Recipe) -> list[str]:
    """Where another recipe is made for such networks or so few images, a sentence each."""
    notes = []
    transformers = [one.backbone.arch for one in loaded if one.backbone.is_transformer]
    if transformers and recipe.optim.optimizer == "sgd":
        notes.append(
            f"{transformers[0]} is a transformer, and this recipe trains by SGD, which suits convolutional networks: "
            "--recipe odc_vit is made for transformers."
        )
    steps = count // recipe.optim.batch_size
    if steps < FEW_STEPS and recipe.optim.batch_size >= LARGE_BATCH and not transformers:
        notes.append(
            f"{count:,} images are {count_of(max(1, steps), 'step')} an epoch with batches of "
            f"{recipe.optim.batch_size}: --recipe {'dc_small' if recipe.method == 'dc' else 'small'} is made for "
            "thousands of images."
        )
    return notes


# ---------------------------------------------------------------- init-memory


def init_memory(
    ckpt: str,
    data: str,
    out: Path,
    recipe: Recipe,
    arch: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Features of all images, K-Means, both memories on disk (INTERFACE: DIR).

    Args:
        ckpt: what `load_backbone` takes.
        data: what `find_images` takes.
        out: the folder to write.
        recipe: its `auto` fields are resolved here.
        arch: a timm name, where the checkpoint's own is not to be followed.
        overwrite: replace an earlier memory.
        progress: where to speak.

    Returns:
        What was made: out, images, unreadable, clusters, smallest, largest.

    Raises:
        OdcftError: for anything the user can mend; nothing has been written by then.
    """
    progress = progress or Progress()
    folders.refuse_full(out, folders.MEMORY_FILES, overwrite)
    with folders.locked(out, progress.say), explained(recipe):
        start = begin([ckpt], data, recipe, progress, arch, training=False)
        memory, count = start.state.memory, len(start.images)
        tensors = {
            "features": dist.in_dataset_order(memory.features_SD, count),
            "labels": dist.in_dataset_order(memory.labels_S, count),
            "centroids": memory.centroids_KD,
        }
        if dist.rank() == 0:
            about = folders.about([ckpt], [start.loaded[0].backbone.arch], data, start.images)
            about |= {"seed": start.recipe.seed, "recipe": start.recipe.model_dump(mode="json"), **identity([ckpt])}
            folders.clear(out, folders.MEMORY_FILES)
            with folders.filling(out) as unfinished:
                for name, part in {"memory": tensors, "neck": start.necks[0].state_dict()}.items():
                    part = {key: tensor.cpu().contiguous() for key, tensor in part.items()}
                    folders.save_file(part, unfinished / f"{name}.safetensors")
                folders.write_image_lists(start.images, start.unreadable, unfinished)
                folders.write_whole(unfinished / "memory.json", json.dumps(about, indent=2))
        dist.barrier()
    sizes_K = start.state.memory.sizes_K
    return {
        "out": str(out),
        "images": len(start.images),
        "unreadable": len(start.unreadable),
        "clusters": len(sizes_K),
        "smallest": int(sizes_K.min()),
        "largest": int(sizes_K.max()),
    }


def _read_memory(
    folder: Path,
    ckpts: list[str],
    loaded: list[Loaded],
    necks: list[nn.Module],
    dim: int,
    images: Images,
    recipe: Recipe,
    device: torch.device,
) -> Start:
    """The start that `init-memory` wrote, for the same checkpoint and images."""
    if len(ckpts) > 1:
        raise OdcftError(
            f"{folder} holds the memory of one checkpoint; several checkpoints make theirs together. Drop --memory."
        )
    (ckpt,), (neck,) = ckpts, necks
    try:
        for name in ("memory.safetensors", "neck.safetensors"):
            if (folder / name).exists() and not (folder / name).is_file():
                raise ValueError(f"{name} is no file")
        about = read_json(folder / "memory.json")
        made_from, sha256 = str(about["checkpoint"]), str(about["sha256"])
        made_with = make_recipe(about["recipe"], str(folder / "memory.json"))
        tensors = load_file(folder / "memory.safetensors")
        neck_tensors = load_file(folder / "neck.safetensors")
        names = folders.read_column(folder / "images.csv", "path")
        (count, length), (clusters, _) = tensors["features"].shape, tensors["centroids"].shape
        if tensors["labels"].dtype != torch.int32 or tensors["features"].dtype not in (torch.float16, torch.float32):
            raise ValueError("its tensors are of other types")
        if not (tensors["labels"].shape == (count,) == (len(names),) and tensors["centroids"].shape[1] == length):
            raise ValueError("its tensors do not fit each other")
        if not (count and 0 <= int(tensors["labels"].min()) <= int(tensors["labels"].max()) < clusters):
            raise ValueError("its labels are not those of its clusters")
        if not tensors["features"].isfinite().all():
            raise ValueError("its features are not finite")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise OdcftError(
            f"{folder} is not a complete folder of `odcft init-memory` ({error}). Make it again."
        ) from None
    if sha256 != folders.sha256(ckpt):
        raise OdcftError(
            f"{folder} was made from another checkpoint ({made_from}), not from {ckpt}. "
            "Make it again with `odcft init-memory`."
        )
    known = set(names)
    unreadable = {name: "unreadable for init-memory" for name in images.names if name not in known}
    images = images.without({i for i, name in enumerate(images.names) if name not in known})
    if images.names != names:
        raise OdcftError(
            f"{folder} was made from {len(names):,} images that are not those of {images.source} now. "
            "Make it again with `odcft init-memory`."
        )
    if made_with.data.range == "auto":  # of before there was a range: all of the type's
        made_with.data.range = own_range(images, full=True)[0] or "full"
    random_weights = loaded[0].match is None or bool(loaded[0].match.missing)
    _refuse_other_features(folder, made_with, recipe, random_weights)
    if recipe.memory.clusters not in ("auto", clusters):
        raise OdcftError(
            f"{folder} has {clusters:,} clusters, and {recipe.memory.clusters:,} are asked for. "
            "Drop --clusters, or make the memory again."
        )
    recipe.memory.clusters = clusters
    recipe = resolve_clusters(recipe, len(images))
    try:
        neck.load_state_dict(neck_tensors)
    except RuntimeError:
        raise OdcftError(
            f"{folder / 'neck.safetensors'} is not the neck of this recipe. Make the memory again."
        ) from None
    if recipe.method != "dc" and length != dim:
        raise OdcftError(
            f"{folder} has features of {length} numbers, and this recipe's neck gives {dim}. Make it again."
        )
    neck.to(device)
    loaded[0].backbone.to(device)
    owned = torch.tensor(dist.owned(len(images)))
    state = METHODS[recipe.method].start(
        tensors["features"][owned].to(device), tensors["labels"][owned].to(device), recipe
    )
    return Start(loaded, necks, dim, images, recipe, state, device, unreadable)


# What the features in a memory depend on, besides checkpoint and images; `dc.pca` for dc, the neck for odc.
FEATURES = (
    *("method", "data.size", "data.crop_fraction", "data.range", "data.mean", "data.std", "backbone.input"),
    *("backbone.arch_args", "neck.hidden", "neck.dim", "dc.pca"),
)


def _refuse_other_features(folder: Path, made_with: Recipe, recipe: Recipe, random_weights: bool) -> None:
    """Refuse a memory whose features this recipe would not have made."""
    then, now = flat(made_with.model_dump(mode="json")), flat(recipe.model_dump(mode="json"))
    others = "neck." if recipe.method == "dc" else "dc."
    names = [name for name in FEATURES if name in then and not name.startswith(others)]
    for name in [*names, *(["seed"] if random_weights else [])]:
        if then[name] != now[name]:
            raise OdcftError(
                f"{folder} was made with {name}={then[name]}, and this run has {name}={now[name]}: its features would "
                "be others. Give the same recipe and settings as for `odcft init-memory`, or make the memory again."
            )


# ---------------------------------------------------------------- finetune


def fine_tune(
    ckpt: str | list[str],
    data: str,
    out: Path,
    recipe: Recipe,
    arch: str | None = None,
    memory: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    epochs: int | None = None,
) -> dict[str, Any]:
    """Fine-tune a checkpoint on unlabelled images, and write a RUN with the backbone.

    Args:
        ckpt: what `load_backbone` takes; for `codc` a list, of a checkpoint for each member.
        data: what `find_images` takes; labels are never read.
        out: the RUN to write.
        recipe: its `auto` fields are resolved here. A resumed run keeps its own, and refuses another.
        arch: a timm name, where the checkpoint's own is not to be followed.
        memory: a folder of `init_memory`, instead of making the memories here.
        resume: go on with the RUN in `out`, or begin it where there is no state yet.
        overwrite: replace the RUN in `out`.
        progress: where to speak.
        epochs: other than the recipe's; a resumed run may be prolonged by it.

    Returns:
        Of the run: out, backbone, load (a line of Python), images, clusters, epochs, steps, loss, change_ratio,
        seconds.

    Raises:
        OdcftError: for anything the user can mend, and for a loss that is not finite (the last good state is kept).
        Stopped: within `stopping.listening()`, asked to stop by a signal; the state is saved.
    """
    progress = progress or Progress()
    ckpts = [ckpt] if isinstance(ckpt, str) else ckpt
    if epochs is not None:
        recipe = recipe.model_copy(deep=True)
        recipe.optim.epochs = epochs
    folders.refuse_unreachable(out)
    begun = resume and folders.only_begun(out)
    if begun or not resume:
        folders.refuse_full(out, folders.RUN_FILES, overwrite or resume)
    else:
        folders.refuse_strange(out, folders.RUN_FILES, resumed=True)
    folders.require_parquet()
    try:
        with folders.locked(out, progress.say), explained(recipe):
            if begun:
                progress.say(f"Note        {out} has no state to resume from yet: it begins.")
            if resume and not begun:
                start, saved = _resume_point(ckpts, data, out, recipe, epochs, progress, arch)
                return _train(start, saved, ckpts, data, out, progress)
            start = _new_run(ckpts, data, out, recipe, progress, arch, memory)
            return _train(start, None, ckpts, data, out, progress)
    except Stopped as stopped:
        if not stopped.args:
            stopped.args = ("The last state is kept." if snapshot.exists(out) else "There was nothing to save yet.",)
        raise


def identity(ckpts: list[str]) -> dict[str, Any]:
    """By which, where, when and from which files something is made: for run.json and memory.json."""
    paths = [str(Path(ckpt).absolute()) if Path(ckpt).exists() else ckpt for ckpt in ckpts]
    return {
        "odcft": version("odcft"),
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "started": now(),
        "checkpoint_path": paths if len(paths) > 1 else paths[0],
    }


def _new_run(
    ckpts: list[str],
    data: str,
    out: Path,
    recipe: Recipe,
    progress: Progress,
    arch: str | None,
    memory: Path | None,
) -> Start:
    """The start of a RUN, and what is written of it before its first state."""
    start = begin(ckpts, data, recipe, progress, arch, memory)
    if dist.rank() == 0:
        folders.clear(out, folders.RUN_FILES)
        about = folders.about(ckpts, [one.backbone.arch for one in start.loaded], data, start.images)
        about |= {"asked": recipe.model_dump(mode="json"), "sample": folders.sample(start.images)}
        about |= {"arch_given": arch, **identity(ckpts)}
        folders.write_whole(out / "run.json", json.dumps(about, indent=2))
        folders.write_image_lists(start.images, start.unreadable, out)
    dist.barrier()
    return start


def _resume_point(
    ckpts: list[str],
    data: str,
    out: Path,
    recipe: Recipe,
    epochs: int | None,
    progress: Progress,
    arch: str | None,
) -> tuple[Start, snapshot.State]:
    """Where a RUN that was interrupted goes on: its own recipe, images and checkpoint, and its newest state.

    Raises:
        OdcftError: no intact state; another recipe, checkpoint or data than the run was started with.
    """
    saved = snapshot.load(snapshot.newest(out, progress.say))
    refuse_odd_state(out, saved.about)
    about = read_about(out)
    arch = arch or about.get("arch_given")
    recipe = resumed_recipe(recipe, epochs, out, about, saved.about)
    if dist.rank() == 0 and recipe.optim.epochs != saved.about["recipe"]["optim"]["epochs"]:
        # A later --resume need not say it again.
        folders.write_whole(out / "run.json", json.dumps({**about, "epochs": recipe.optim.epochs}, indent=2))
    refuse_other_checkpoint(ckpts, out, about)
    with progress.waiting(f"Loading     {', '.join(ckpts)} …"):
        loaded = load_members(ckpts, arch, recipe)
    images = same_images(data, out, about)
    recipe, device = resolve(recipe, loaded, images)
    allow_tf32(recipe.optim.tf32)
    necks, dim = make_necks(loaded, recipe)
    rows = len(dist.owned(len(images)))
    nothing_SD = torch.zeros(rows, len(necks) * dim, device=device)
    state = METHODS[recipe.method].start(nothing_SD, torch.zeros(rows, dtype=torch.int32, device=device), recipe)
    unreadable = dict.fromkeys(read_quarantine(out), "")
    progress.say(f"Resuming    {out} after {saved.about['step']:,} steps")
    _tell_new_rate(saved.about, recipe, progress)
    changed = [f"{name} {then} then, {now} now" for name, then, now in _other_versions(saved.about["versions"])]
    if changed:
        progress.say(f"Note        {'; '.join(changed)}: it goes on, but perhaps not to the same bits.")
    return Start(loaded, necks, dim, images, recipe, state, device, unreadable), saved


def _tell_new_rate(saved: dict[str, Any], recipe: Recipe, progress: Progress) -> None:
    """Say how a prolonged schedule goes on."""
    before, epochs = make_recipe(saved["recipe"]).optim, recipe.optim.epochs
    if before.epochs != epochs:
        was, now = (
            lr_at(max(0, saved["step"] - 1), saved["steps_per_epoch"], optim) for optim in (before, recipe.optim)
        )
        rate = f"goes from {was:.3g} to {now:.3g}" if was != now else f"stays at {now:.3g}"
        progress.say(f"Note        {epochs} epochs instead of {before.epochs}: the learning rate {rate}.")


def _train(
    start: Start, saved: snapshot.State | None, ckpts: list[str], data: str, out: Path, progress: Progress
) -> dict[str, Any]:
    """The loop, from the start or from where it was saved, and what it leaves behind."""
    began = time.monotonic()
    if dist.rank() == 0:
        folders.write_whole(out / "recipe.yaml", dump(start.recipe))  # also when resumed: the epochs may be others
    recipe, device, state, images = start.recipe, start.device, start.state, start.images
    K, optim = _number(recipe.memory.clusters), recipe.optim
    assert isinstance(recipe.codc.members, list)
    models = []
    for m, (one, neck, losses) in enumerate(zip(start.loaded, start.necks, recipe.codc.members, strict=True)):
        with seeds.weights(recipe.seed, "head", m):
            models.append(Model(one.backbone, neck, start.dim, K, losses))
    network = Members(models).to(device)
    if optim.channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = dist.parallel(network, device)
    _rehearse(model, recipe, K, device)
    optimizer = make_optimizer(
        [p for member in network for p in member.body()], [p for member in network for p in member.heads()], optim
    )
    method = METHODS[recipe.method]
    crops = Crops(images, view_of(recipe), recipe.augment, recipe.seed)
    order = TrainingOrder(
        *(len(images), optim.batch_size // dist.world_size(), optim.epochs, recipe.seed),
        draw=lambda generator: method.draw(state, generator),
    )
    if saved is not None and _finished(out) == order.steps:
        progress.say(f"Finished    {out} has all of its {order.steps:,} steps; nothing is left to do.")
        return _result(start, out, order.steps, time.monotonic() - began)
    window = Window(device)
    labels_before_S = state.memory.labels_S.clone()
    skipped = 0  # steps in a row
    if saved is not None:
        network.load_state_dict(snapshot.under("model.", saved.same))
        restore_optimizer(optimizer, snapshot.under("optimizer.", saved.same))
        method.restore(state, saved.rows, snapshot.under("method.", saved.same))
        window.restore(saved.own, saved.about["window"])
        labels_before_S.copy_(saved.rows["labels_before"])
        order.first_step, skipped = _same_place(saved.about, order.steps_per_epoch), saved.about["skipped"]
    metrics = Metrics(out, recipe.log.tensorboard, saved.about["step"] if saved else 0)
    pace = snapshot.Pace(recipe.log.snapshot_minutes, recipe.log.snapshot_share)
    late = LateReader()

    def save(done: int) -> bool:
        """Write the state after so many steps, and say so if that fails; nothing is lost by it."""
        saving = time.monotonic()
        rows, ours = method.stored(state)
        own, counts = window.state()
        same = {f"method.{name}": tensor for name, tensor in ours.items()}
        same |= {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
        same |= {f"optimizer.{name}": tensor for name, tensor in stored_optimizer(optimizer).items()}
        if not all_finite(same.values()):
            raise _not_finite(done - 1, optimizer, out)
        about = {
            **{"step": done, "steps_per_epoch": order.steps_per_epoch, "images": len(images), "skipped": skipped},
            **{"window": counts, "recipe": recipe.model_dump(mode="json"), "versions": _versions()},
        }
        rows = {**rows, "labels_before": labels_before_S}
        failed = snapshot.together(metrics.sync) or snapshot.save(out, snapshot.State(same, rows, own, about))
        pace.wrote(saving)
        if failed:
            progress.say(
                f"Warning     Step {done}: the state could not be saved ({failed}). The run goes on; what was saved "
                "before is kept, and it is tried again later."
            )
        return not failed

    def save_and_stop(done: int) -> NoReturn:
        saved_at = done if save(done) else saved_step
        metrics.close()
        raise Stopped(f"Saved after {saved_at:,} of {order.steps:,} steps.")

    def embed() -> Tensor:
        """Backbone features (S, F) of this rank's images as they are, in evaluation mode."""
        (only,) = network
        plain = Crops(images, view_of(recipe))
        batch, workers = max(1, optim.batch_size // dist.world_size()), _number(recipe.data.workers)
        network.eval()
        with torch.autocast(device.type, torch.bfloat16, enabled=optim.precision == "bfloat16"):
            features_SF, _ = extract(
                *(only.backbone, plain, batch, workers, device, Progress(quiet=True)), stop=stopping.asked
            )
        network.train()
        if _asked_anywhere(device):
            save_and_stop(step)
        return features_SF

    if saved is None and not save(0):  # from the first step on there is a way back
        raise OdcftError(f"{out} cannot hold a state to resume from. Make room, or choose another --out.")
    saved_step = order.first_step

    network.train()
    with stopping.deferred(), progress.phase("Fine-tuning", len(order) * order.batch * dist.world_size()) as advance:
        batches = iter(loader(crops, order, _number(recipe.data.workers), device))
        for step in range(order.first_step, order.steps):
            epoch, begun = divmod(step, order.steps_per_epoch)
            if begun == 0 and method.begin_epoch(state, epoch, embed):  # dc: labels are new
                for m, member in enumerate(network):
                    member.new_head(optimizer, recipe.seed, m, step)
                order.first_step = step
                batches = iter(loader(crops, order, _number(recipe.data.workers), device))
            window.waiting()
            batch = next(batches)
            window.working()
            if batch.unreadable:
                progress.say(
                    f"Step {step}: {', '.join(images.names[i] for i in batch.unreadable)} "
                    "can no longer be read; skipped."
                )
            if len(batch.index_B) < 2:
                raise OdcftError(
                    f"Step {step}: hardly any image can still be read. Is {data} still there? --resume goes on."
                )
            set_lr(optimizer, lr_at(step, order.steps_per_epoch, optim))
            place = dist.rank(), step
            torch.manual_seed(seeds.seed(recipe.seed, "dropout", *place))
            row_B = (batch.index_B // dist.world_size()).to(device, non_blocking=True)
            pixels = to_float(batch.pixels, device)
            image_B = augment_batch(pixels, recipe.augment, seeds.generator(recipe.seed, "augmentation", *place))
            if optim.channels_last:
                image_B = image_B.contiguous(memory_format=torch.channels_last)
            # None, but for members of codc that learn from such.
            made = codc.copies(image_B, recipe.codc, seeds.generator(recipe.seed, "copies", *place))
            buffers = [buffer.clone() for buffer in network.buffers()] if optim.skip_non_finite else []

            # 1. forward, 2. read the labels and train (eq. 1)
            with torch.autocast(device.type, torch.bfloat16, enabled=optim.precision == "bfloat16"):
                outputs = model(image_B, made.turned, made.mixed)
            label_B, weight_K = method.targets(state, row_B)
            loss, shown = codc.losses(outputs, recipe.codc, label_B, weight_K, made)
            optimizer.zero_grad()
            loss.backward()
            if optim.skip_non_finite and not finite_gradients(network):  # here the host waits for the device
                skipped += 1
                if skipped > optim.skip_non_finite:
                    raise _not_finite(step, optimizer, out)
                progress.say(f"Warning     Step {step}: a gradient is not finite; the step is skipped.")
                for buffer, before in zip(network.buffers(), buffers, strict=True):
                    buffer.copy_(before)
                loss = torch.zeros_like(loss)  # of a step that was not taken
            else:
                skipped = 0
                optimizer.step()
                # 3. the samples memory (eq. 2, 3), 4. the centroids memory
                features_BD = codc.side_by_side([output.features_BD.detach().float() for output in outputs])
                stats = method.update(state, row_B, features_BD, step)
                window.add(shown.detach(), stats["change_ratio"], len(batch.index_B) * dist.world_size())

            epoch_ends = (step + 1) % order.steps_per_epoch == 0
            broken, stop, due = _agreed(late, loss.detach(), bool(stopping.asked()), pace.due(epoch_ends))
            if broken:
                raise _not_finite(step - late.delay(device), optimizer, out)
            note = ""
            if window.steps and (epoch_ends or (step + 1) % recipe.log.interval == 0):
                figures: dict[str, Any] = {
                    "epoch": (step + 1) / order.steps_per_epoch,
                    **window.close(K),
                    **cluster_figures(state.memory.sizes_K, state.memory.centroids_KD),
                }
                if not math.isfinite(figures["loss"]):
                    raise _not_finite(step, optimizer, out)
                figures["lr"] = optimizer.param_groups[0]["lr"]
                # dc's first labels have none before them.
                if epoch_ends and not (recipe.method == "dc" and torch.equal(labels_before_S, state.memory.labels_S)):
                    figures["nmi_previous"] = nmi(labels_before_S, state.memory.labels_S)
                    labels_before_S = state.memory.labels_S.clone()
                troubles = warnings([*metrics.lines(), {"step": step, **figures}], K, recipe.method)
                for trouble, what in troubles.items():
                    if trouble not in metrics.last().get("warnings", []):
                        progress.say(f"Warning     Step {step}: {what}")
                if troubles:
                    figures["warnings"] = sorted(troubles)
                metrics.write(step, figures)
                note = f"epoch {math.ceil(figures['epoch'])}/{optim.epochs} · {summary(figures, recipe.method)}"
            advance(len(batch.index_B) * dist.world_size(), note)
            if stop:
                save_and_stop(step + 1)
            if due and save(step + 1):
                saved_step = step + 1
    if saved_step < order.steps:
        save(order.steps)
    if _asked_anywhere(device):
        raise Stopped("All steps are done and saved; the backbone is still to be written.")

    metrics.sync()
    if dist.rank() == 0:
        for m, (member, name) in enumerate(zip(network, folders.BACKBONES, strict=False)):
            member.backbone.show(view_of(recipe))
            write_timm(member.backbone, out / name, about_run(out, m))
    write_clusters(state, images, out / "clusters.parquet")
    metrics.close()
    if dist.rank() == 0:
        for name in folders.BACKBONES[: len(ckpts)]:
            for file in (out / name).iterdir():
                folders.sync(file)
        about = {**json.loads((out / "run.json").read_text()), "finished": order.steps, "ended": now()}
        folders.write_whole(out / "run.json", json.dumps(about, indent=2))
    dist.barrier()
    return _result(start, out, order.steps, time.monotonic() - began)


def _finished(out: Path) -> int | None:
    """After how many steps a RUN was completed, backbone and all, if it was."""
    there = (out / "clusters.parquet").exists() and (out / "backbone" / "model.safetensors").exists()
    return read_json(out / "run.json").get("finished") if there else None


def _result(start: Start, out: Path, steps: int, seconds: float) -> dict[str, Any]:
    """What `fine_tune` returns."""
    last, members = (read_lines(out / "metrics.jsonl") or [{}])[-1], len(start.loaded)
    return {
        "out": str(out),
        "backbone": str(out / "backbone"),
        "load": loading_line(start.loaded[0].backbone, str(out / "backbone")),
        **({"backbones": [str(out / name) for name in folders.BACKBONES[:members]]} if members > 1 else {}),
        "images": len(start.images),
        "unreadable": len(start.unreadable),
        "clusters": start.recipe.memory.clusters,
        "epochs": start.recipe.optim.epochs,
        "steps": steps,
        "loss": last.get("loss"),
        "change_ratio": last.get("change_ratio"),
        "seconds": round(seconds, 1),
    }


def _rehearse(model: nn.Module, recipe: Recipe, K: int, device: torch.device) -> None:
    """With several ranks, a backward pass that nothing comes of.

    The first one decides how torch sorts the gradients into the buckets that travel, and so in which order three ranks
    and more add them up. A run that goes on has to have had it as one that began.
    """
    if dist.world_size() == 1:
        return
    size = _number(recipe.data.size)
    images = torch.zeros(2, 3, size, size, device=device)
    made = codc.copies(images, recipe.codc, torch.Generator())
    model.eval()  # leaves the running statistics alone
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.optim.precision == "bfloat16"):
        outputs = model(images, made.turned, made.mixed)
    label_B, weight_K = torch.zeros(2, dtype=torch.int64, device=device), torch.ones(K, device=device)
    codc.losses(outputs, recipe.codc, label_B, weight_K, made)[0].backward()
    model.zero_grad()
    model.train()


def _agreed(late: LateReader, loss: Tensor, stop: bool, due: bool) -> tuple[bool, bool, bool]:
    """Whether on any rank the loss is not finite, someone asked to stop, or a state is due (rank 0's clock counts).

    Every rank gets the same answer in the same step, and the host never waits: on an accelerator the answer is that of
    the step before.
    """
    device = loss.device
    flags = torch.stack(
        [
            loss.isfinite().logical_not().float(),
            torch.full((), float(stop), device=device),
            torch.full((), float(due and dist.rank() == 0), device=device),
        ]
    )
    dist.all_sum_(flags)
    answer = late.read(flags)
    broken, stop_any, due_any = answer.tolist() if answer is not None else (0, 0, 0)
    return bool(broken), bool(stop_any), bool(due_any)


def _asked_anywhere(device: torch.device) -> bool:
    """Whether some rank was asked to stop. The host waits for the device."""
    asked = torch.full((), float(bool(stopping.asked())), device=device)
    dist.all_sum_(asked)
    return bool(asked)


def _not_finite(step: int, optimizer: torch.optim.Optimizer, out: Path) -> OdcftError:
    """What to say when numbers are no numbers any more."""
    lr = optimizer.param_groups[0]["lr"]
    return OdcftError(
        f"The loss is not finite at step {step} (learning rate {lr:.3g}). The states in {out / 'checkpoints'} are of "
        "before, and finite. Start again with a lower rate (--set optim.lr=…) or a warm-up "
        "(--set optim.warmup_epochs=1), or let single steps be skipped (--set optim.skip_non_finite=3)."
    )


def _same_place(about: dict[str, Any], steps_per_epoch: int) -> int:
    """The step that a state is at where an epoch has another number of steps now, as another number of ranks can bring
    about: in the same epoch, equally far."""
    epoch, rest = divmod(about["step"], about["steps_per_epoch"])
    return epoch * steps_per_epoch + rest * steps_per_epoch // about["steps_per_epoch"]


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("odcft", "torch", "timm", "safetensors")}


def _other_versions(then: dict[str, str]) -> list[tuple[str, str, str]]:
    return [(name, then[name], now) for name, now in _versions().items() if then.get(name, now) != now]


# ---------------------------------------------------------------- files


def write_clusters(state: odc.State, images: Images, path: Path) -> None:
    """clusters.parquet: path, cluster, and distance of the stored feature to the cluster's centroid.

    Rows are those of images.csv. Parquet's text is UTF-8: bytes of a path that are not are written as \\xNN.
    """
    memory = state.memory
    distances = [
        (memory.features_SD[rows].float() - memory.centroids_KD[memory.labels_S[rows].long()]).norm(dim=1)
        for rows in torch.arange(len(memory.labels_S), device=memory.labels_S.device).split(65536)
    ]
    labels_N = dist.in_dataset_order(memory.labels_S, len(images))
    distance_N = dist.in_dataset_order(torch.cat(distances), len(images))
    if dist.rank() == 0:
        import pyarrow as pa
        import pyarrow.parquet as pq

        paths = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in images.names]
        columns = {"path": paths, "cluster": labels_N.cpu().numpy(), "distance": distance_N.cpu().numpy()}
        with folders.whole(path) as unfinished:
            pq.write_table(pa.table(columns), unfinished)


def _number(value: Any) -> int:
    assert isinstance(value, int), "the recipe is resolved by now"
    return value
