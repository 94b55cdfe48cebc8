"""The memory that `init-memory` wrote, read back."""

import json
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from odcft import files, members, seeds
from odcft.backbone.load import Loaded, load_backbone
from odcft.backbone.network import Backbone
from odcft.clustering import odc
from odcft.clustering.kmeans import assign, kmeans
from odcft.clustering.methods import METHODS
from odcft.data.batches import Crops
from odcft.data.feature_extraction import extract
from odcft.data.intensity_range import own_range
from odcft.data.sources import Images, find_images
from odcft.distributed import dist, ownership
from odcft.errors import OdcftError
from odcft.files import read_json
from odcft.optim import lr_at
from odcft.plan import _number, resolve, resolve_clusters, resolve_members, view_of
from odcft.precision import allow_tf32
from odcft.progress import Progress
from odcft.recipe import MemberRecipe, Recipe, flat, load_recipe, make_recipe, taken_as
from odcft.run import output_checks, snapshot_files
from odcft.run.folder import RUN_FILES, write_image_lists
from odcft.run.identity import checksums, made_by, made_from
from odcft.run.resume_checks import (
    read_about,
    read_quarantine,
    refuse_odd_state,
    refuse_other_checkpoint,
    resumed_recipe,
    same_images,
)
from odcft.text import count_of, duration

FEW_STEPS, LARGE_BATCH = 200, 256  # an epoch of fewer steps with larger batches: the recipe is for more images


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
        return members.side_by_side([network(images) for network in networks])

    batch = max(1, recipe.optim.batch_size // dist.world_size())
    crops = Crops(images, view_of(recipe))
    features_SD, bad_here = extract(network, crops, batch, _number(recipe.data.workers), device, progress)
    bad = dist.gather_dict(bad_here)
    unreadable = {images.names[i]: reason for i, reason in sorted(bad.items())}
    if len(bad) == len(images):
        name, reason = next(iter(unreadable.items()))
        raise OdcftError(f"None of the {len(images):,} images in {data} can be read. The first is {name}: {reason}.")
    if bad:
        features_SD = ownership.without(features_SD, set(bad), len(images))
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
        output_checks.clear(out, RUN_FILES)
        about = made_from(ckpts, [one.backbone.arch for one in start.loaded], data, start.images)
        about |= {"asked": recipe.model_dump(mode="json"), "sample": checksums(start.images)}
        about |= {"arch_given": arch, **made_by(ckpts)}
        files.write_whole(out / "run.json", json.dumps(about, indent=2))
        write_image_lists(start.images, start.unreadable, out)
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
) -> tuple[Start, snapshot_files.State]:
    """Where a RUN that was interrupted goes on: its own recipe, images and checkpoint, and its newest state.

    Raises:
        OdcftError: no intact state; another recipe, checkpoint or data than the run was started with.
    """
    saved = snapshot_files.load(snapshot_files.newest(out, progress.say))
    refuse_odd_state(out, saved.about)
    about = read_about(out)
    arch = arch or about.get("arch_given")
    recipe = resumed_recipe(recipe, epochs, out, about, saved.about)
    if dist.rank() == 0 and recipe.optim.epochs != saved.about["recipe"]["optim"]["epochs"]:
        # A later --resume need not say it again.
        files.write_whole(out / "run.json", json.dumps({**about, "epochs": recipe.optim.epochs}, indent=2))
    refuse_other_checkpoint(ckpts, out, about)
    with progress.waiting(f"Loading     {', '.join(ckpts)} …"):
        loaded = load_members(ckpts, arch, recipe)
    images = same_images(data, out, about)
    recipe, device = resolve(recipe, loaded, images)
    allow_tf32(recipe.optim.tf32)
    necks, dim = make_necks(loaded, recipe)
    rows = len(ownership.owned(len(images)))
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


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("odcft", "torch", "timm", "safetensors")}


def _other_versions(then: dict[str, str]) -> list[tuple[str, str, str]]:
    return [(name, then[name], now) for name, now in _versions().items() if then.get(name, now) != now]


# ---------------------------------------------------------------- from a folder of init-memory


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
        names = files.read_column(folder / "images.csv", "path")
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
    if sha256 != files.sha256(ckpt):
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
    owned = torch.tensor(ownership.owned(len(images)))
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
