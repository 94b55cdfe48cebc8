"""Get ready to train: load checkpoints, find images, make the plan, fill both memories; start or resume a run.

Shapes: N images, S of them on this rank, K clusters, D embedding.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from odcft.backbone.frozen_stages import stages_by_depth
from odcft.backbone.layers import LAST
from odcft.backbone.load import Loaded, load_backbone
from odcft.backbone.network import Backbone
from odcft.backbone.start_layer import LastAndLayer
from odcft.clustering import odc
from odcft.clustering.clusters import Clusters
from odcft.clustering.kmeans import assign, kmeans
from odcft.clustering.methods import METHODS
from odcft.data.batches import Crops, steps_per_epoch
from odcft.data.feature_extraction import extract
from odcft.data.images import Images
from odcft.data.pixel_statistics import all_gray
from odcft.data.sources import find_images
from odcft.distributed import dist, ownership
from odcft.errors import OdcftError, refuse_not_finite
from odcft.model.members import joint_features, make_members, make_necks
from odcft.normalisation import decide_normalisation
from odcft.optim import lr_at
from odcft.plan import Plan, batch_in_parts, decide_members, make_plan, with_clusters_for
from odcft.progress import Progress
from odcft.recipe import MemberRecipe, Recipe, load_options, make_recipe
from odcft.run import memory_folder, output_checks, resume_checks, snapshot_files
from odcft.run.folder import RUN_FILES, Run, read_quarantine, write_image_lists
from odcft.run.run_json import note_epochs, write_run_json
from odcft.seeds import seed
from odcft.start_layer_choice import decide_start_layer
from odcft.state import Snapshot, State, new_state, restore, versions
from odcft.suitable_recipe import suggest_recipe
from odcft.text import command, count_of, duration


@dataclass
class Start:
    """What training starts from. The same on every rank, except for the rows of the samples memory."""

    plan: Plan
    loaded: list[Loaded]  # one for each member
    necks: list[nn.Module]
    dim: int  # D, the length of a neck's output
    images: Images  # those that can be read
    clusters: Clusters
    unreadable: dict[str, str]  # the images that cannot be read: name to reason

    @property
    def backbones(self) -> list[Backbone]:
        """One for each member."""
        return [one.backbone for one in self.loaded]


# ---------------------------------------------------------------- checkpoints, images, memories


def prepare_start(
    run: Run, recipe: Recipe, progress: Progress, *, memory: Path | None = None, training: bool = True
) -> Start:
    """Load the checkpoints, find the images, and fill both memories, by K-Means or from a folder of `init-memory`.

    Args:
        run: checkpoints and images.
        recipe: as the user gave it; its `auto` fields are decided here.
        progress: where to report.
        memory: a folder written by `init-memory`.
        training: whether training follows; if not, nothing about training is reported.
    """
    planned = load_and_plan(run, recipe, progress, memory=memory, training=training)
    plan, loaded, images, stored = planned.plan, planned.loaded, planned.images, planned.stored
    backbones = [one.backbone for one in loaded]
    necks, dim = make_necks(backbones, plan)
    if stored is not None:
        clusters = _from_memory(stored, plan, loaded[0], necks[0], dim)
        return Start(plan, loaded, necks, dim, images, clusters, stored.unreadable)
    features_SD, unreadable = _extract(backbones, necks, images, plan, progress)
    _refuse_not_finite(features_SD, len(images) - len(unreadable), run)
    if unreadable:
        images = images.without(set(unreadable))
        plan, notes = with_clusters_for(plan, planned.requested, len(images))
        _say_notes(notes, progress)
    clusters = _cluster(features_SD, dim, images, plan, progress)
    return Start(plan, loaded, necks, dim, images, clusters, dict(unreadable.values()))


@dataclass
class Planned:
    """What is known before anything slow starts."""

    requested: Recipe  # as the user gave it, with a member for each checkpoint
    plan: Plan
    loaded: list[Loaded]  # one for each member
    images: Images  # those that were found; with a memory, those it was made from
    stored: memory_folder.StoredMemory | None


def load_and_plan(
    run: Run, recipe: Recipe, progress: Progress, *, memory: Path | None = None, training: bool = True
) -> Planned:
    """Load the checkpoints, find the images and make the plan; the arguments are those of `prepare_start`."""
    images = find_images(run.data, progress, run.reader)
    requested = recipe = decide_members(recipe, run.ckpts)
    stored = memory_folder.read_memory(memory, run.ckpts, images) if memory is not None else None
    if stored is not None:
        recipe, images = memory_folder.recipe_for_memory(recipe, stored), stored.images
    loaded = _load(run, recipe, progress)
    backbones = [one.backbone for one in loaded]
    plan, notes = make_plan(recipe, backbones, images)
    plan.allow_rounding()
    for backbone in backbones:
        backbone.resize(plan.data.size)
    plan, measured = decide_normalisation(recipe, plan, loaded, images)
    plan, layer = decide_start_layer(plan, recipe, backbones, images, progress)
    frozen = training and plan.optim.freeze
    if frozen and any(one.family == "scratch" and stages_by_depth(one.backbone.net) for one in loaded):
        notes.append("The frozen stages have random weights, and will keep them. Pass --set optim.freeze=0.")
    notes += [*measured, *layer, *(_note_on_gray_images(plan, images) if training else [])]
    _describe(loaded, images, plan, notes, progress, training)
    dist.wait_for_all()
    return Planned(requested, plan, loaded, images, stored)


def _note_on_gray_images(plan: Plan, images: Images) -> list[str]:
    """Suggest the preset for gray images if the augmentation changes colours and there are none."""
    changed = [name for name in ("hue", "saturation", "gray") if getattr(plan.augment, name)]
    if not changed or dist.rank() > 0 or not all_gray(images, plan.view):
        return []
    fields = ", ".join(f"augment.{name}" for name in changed)
    return [f"The images are all gray, so {fields} only cost time. --preset gray turns them off."]


def _load(run: Run, recipe: Recipe, progress: Progress) -> list[Loaded]:
    """Load the checkpoint of each member, with the options of the recipe."""
    with progress.waiting(f"Loading     {', '.join(run.ckpts)} …"):
        return [
            load_backbone(
                *(ckpt, run.arch), **load_options(recipe, member, len(run.ckpts)), seed=recipe.seed, member=member
            )
            for member, ckpt in enumerate(run.ckpts)
        ]


def _describe(
    loaded: list[Loaded], images: Images, plan: Plan, notes: list[str], progress: Progress, training: bool
) -> None:
    """Report what was found and what will be done, before anything slow starts."""
    for one in loaded:
        match = one.match
        source = f"{len(match.tensors)}/{match.expected} tensors under {match.where}" if match else one.source
        progress.say(
            f"Checkpoint  {one.family} · {one.backbone.arch} · {one.backbone.input.describe_color()}, {source}"
        )
        _say_notes(one.notes, progress)
    if plan.method == "codc" and plan.codc.members == [MemberRecipe()]:
        progress.say("Note        A single plain member has nobody to collaborate with: this is ODC.")
    progress.say(f"Images      {len(images):,} in {images.source}")
    if images.skipped:
        progress.say(f"Not read    {images.skipped_summary()}")
    optim, ranks = plan.optim, dist.world_size()
    parts = [plan.method.upper(), count_of(optim.epochs, "epoch"), batch_in_parts(plan)] if training else []
    parts += [f"{plan.data.size} px", f"{ranks} process{'es' if ranks > 1 else ''}", optim.precision]
    progress.say(f"Plan        {' · '.join(parts)}")
    _say_notes(notes, progress)
    if training and (suggestion := suggest_recipe([one.backbone for one in loaded], len(images), plan)):
        _say_notes([suggestion.note], progress)


def _say_notes(notes: list[str], progress: Progress) -> None:
    for note in notes:
        progress.say(f"Note        {note}")


def extracts_layer(plan: Plan) -> bool:
    """Whether the features of `memory.start_layer` are extracted besides those of the neck."""
    return plan.memory.start_layer != LAST or plan.starts_with_layer


def feature_network(backbones: list[Backbone], necks: list[nn.Module], plan: Plan) -> Callable[[Tensor], Tensor]:
    """A function from images (B, 3, H, W) to the joint features (B, D) that are clustered; on this rank's device.

    If a layer gives the first labels or features, those of that layer follow: (B, D + L).
    """
    if extracts_layer(plan):
        (neck,), device = necks, dist.this_device()
        neck.to(device).eval()
        both = LastAndLayer(backbones[0], plan.memory.start_layer).to(device).eval()

        def features_and_layer(images: Tensor) -> Tensor:
            last_BF, layer_BL = both(images)
            return torch.cat([neck(last_BF), layer_BL], 1)

        return features_and_layer
    networks = [nn.Sequential(*parts).to(dist.this_device()).eval() for parts in zip(backbones, necks, strict=True)]
    return lambda images: joint_features([network(images) for network in networks])


def _extract(
    backbones: list[Backbone], necks: list[nn.Module], images: Images, plan: Plan, progress: Progress
) -> tuple[Tensor, dict[int, tuple[str, str]]]:
    """Features (S, D) of this rank's readable images; and all unreadable ones: index to name and reason."""
    device, network = dist.this_device(), feature_network(backbones, necks, plan)
    crops = Crops(images, plan.view)
    features_SD, mine = extract(network, crops, plan.batch_of_rank, plan.data.workers, device, progress)
    unreadable = {index: (images.names[index], why) for index, why in sorted(dist.gather_dict(mine).items())}
    if len(unreadable) == len(images):
        name, why = next(iter(unreadable.values()))
        raise OdcftError(
            f"None of the {len(images):,} images in {images.source} can be read. The first is {name}: {why}."
        )
    if unreadable:
        features_SD = ownership.remove_images(features_SD, set(unreadable), len(images))
        names = [name for name, _ in unreadable.values()]
        some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        progress.say(f"            {len(names):,} unreadable and skipped: {some} (all in quarantine.csv)")
    return features_SD, unreadable


def _refuse_not_finite(features_SX: Tensor, count: int, run: Run) -> None:
    """Refuse features, of `count` images on all ranks, that cannot be clustered because some are not finite."""
    # Most often all are, which takes no copy to see.
    bad_S = features_SX.new_zeros(1)
    if len(features_SX) and not torch.stack(features_SX.aminmax(dim=0)).isfinite().all():
        bad_S = ~features_SX.isfinite().all(1)
    refuse_not_finite(int(dist.all_sum(bad_S.sum().to(features_SX.dtype))), count, ", ".join(run.ckpts))


def split_features(features_SX: Tensor, dim: int, plan: Plan) -> tuple[Tensor, Tensor]:
    """What `feature_network` gave, as the features (S, D) of the memory and those that K-Means clusters.

    They are the same, unless a layer gives the first labels only.
    """
    method = METHODS[plan.method]
    if plan.starts_with_layer:
        layer_SD = odc.features_of_start_layer(features_SX[:, dim:], plan)
        return layer_SD, layer_SD
    if not extracts_layer(plan):
        features_SD = method.features_for_kmeans(features_SX, plan)
        return features_SD, features_SD
    features_SD = method.features_for_kmeans(features_SX[:, :dim].contiguous(), plan)
    return features_SD, odc.features_of_start_layer(features_SX[:, dim:], plan)


def _cluster(features_SX: Tensor, dim: int, images: Images, plan: Plan, progress: Progress) -> Clusters:
    """Both memories, from one K-Means over the features of all ranks."""
    began, method, K = time.monotonic(), METHODS[plan.method], plan.memory.clusters
    with progress.waiting(f"K-Means     {K:,} clusters of {len(images):,} images …"):
        features_SD, clustered_SP = split_features(features_SX, dim, plan)
        centroids_KP = kmeans(clustered_SP, K, seed(plan.seed, "kmeans", 0), plan.kmeans.iterations, plan.kmeans.engine)
        labels_S = assign(clustered_SP, centroids_KP)[0]
    filled = int((dist.all_sum(torch.bincount(labels_S, minlength=K)) > 0).sum())
    clusters: Clusters = method.start(features_SD, labels_S, plan)
    sizes_K = clusters.memory.sizes_K
    progress.say(
        f"K-Means     {K:,} clusters · {plan.kmeans.iterations} iterations · "
        f"sizes {int(sizes_K.min()):,} … {int(sizes_K.max()):,} · {duration(time.monotonic() - began)}"
    )
    if filled < K:
        _say_notes([_not_filled(filled, K, images)], progress)
    return clusters


def _not_filled(filled: int, K: int, images: Images) -> str:
    """What to tell the user when K-Means left clusters empty: it does so where there are hardly any other features."""
    have = "has" if filled == 1 else "have"
    listed = check_data_command(images, duplicates=True)
    return (
        f"Only {filled:,} of {K:,} clusters {have} images: most of the {len(images):,} have the same features as "
        f"others. Either they are copies (`{listed}` lists them), or the checkpoint does not tell them apart."
    )


def check_data_command(images: Images, *, duplicates: bool = False) -> str:
    """The command that looks at these images, with the reader of the run."""
    reader = images.reader and images.reader.name
    return command("check-data", images.source, duplicates=duplicates, reader=reader)


def _from_memory(stored: memory_folder.StoredMemory, plan: Plan, loaded: Loaded, neck: nn.Module, dim: int) -> Clusters:
    """Both memories, from a folder of `init-memory`; load the weights that made its features into the neck."""
    random_weights = loaded.match is None or bool(loaded.match.missing)
    memory_folder.refuse_other_features(stored, plan, dim, random_weights)
    try:
        neck.load_state_dict(stored.neck)
    except RuntimeError:
        raise OdcftError(
            f"{stored.folder / 'neck.safetensors'} is not the neck of this recipe. Make the memory again."
        ) from None
    device = dist.this_device()
    features_SD, labels_S = (tensor.to(device) for tensor in stored.rows_of_rank())
    clusters: Clusters = METHODS[plan.method].start(features_SD, labels_S, plan)
    return clusters


# ---------------------------------------------------------------- a run, new or resumed


def new_run(run: Run, recipe: Recipe, progress: Progress, *, memory: Path | None = None) -> tuple[Start, State]:
    """Start a run: prepare it, and write the files that must exist before its first state."""
    start = prepare_start(run, recipe, progress, memory=memory)
    if dist.rank() == 0:
        output_checks.clear_folder(run.out, RUN_FILES)
        write_run_json(run, recipe, [backbone.arch for backbone in start.backbones], start.images)
        write_image_lists(start.images, start.unreadable, run.out)
    dist.barrier()
    network = make_members(start.backbones, start.necks, start.dim, start.plan)
    return start, new_state(network, start.clusters, start.plan)


def resumed_run(run: Run, recipe: Recipe, epochs: int | None, progress: Progress) -> tuple[Start, State]:
    """Resume an interrupted run from its newest state, with its own recipe, images and checkpoint.

    Args:
        run: checkpoints and images as given now.
        recipe: as given now.
        epochs: the new total, to prolong the run.
        progress: where to report.

    Raises:
        OdcftError: no state is intact, or recipe, checkpoint or data differ from those the run was started with.
    """
    snapshot = snapshot_files.load(snapshot_files.newest(run.out, progress.say))
    dist.wait_for_all()
    resume_checks.refuse_malformed_state(run.out, snapshot.about)
    about = resume_checks.read_run_json(run.out)
    recipe = resume_checks.resumed_recipe(recipe, epochs, run.out, about, snapshot.about, progress.say)
    assert recipe.optim.epochs != "auto", "the recipe is resolved by now"
    if dist.rank() == 0 and recipe.optim.epochs != snapshot.about["recipe"]["optim"]["epochs"]:
        note_epochs(run.out, recipe.optim.epochs)  # so that a later --resume need not repeat --epochs
    resume_checks.refuse_other_checkpoint(run.ckpts, run.out, about)
    arch = run.arch or about.get("arch_given")
    loaded = _load(Run(run.out, run.ckpts, run.data, arch), recipe, progress)
    images = resume_checks.find_same_images(run.data, run.out, about, progress, run.reader)
    backbones = [one.backbone for one in loaded]
    plan, _ = make_plan(recipe, backbones, images)
    plan.allow_rounding()
    for backbone in backbones:
        backbone.resize(plan.data.size)
    necks, dim = make_necks(backbones, plan)
    clusters = _empty_clusters(len(images), len(necks) * dim, plan)
    unreadable = read_quarantine(run.out)
    state = new_state(make_members(backbones, necks, dim, plan), clusters, plan)
    restore(state, snapshot, steps_per_epoch(len(images), plan.optim.batch_size))
    progress.say(f"Resuming    {run.out} after {snapshot.about['step']:,} steps")
    _say_notes([*_rate_notes(snapshot, plan), *_version_notes(snapshot)], progress)
    return Start(plan, loaded, necks, dim, images, clusters, unreadable), state


def _empty_clusters(images: int, dim: int, plan: Plan) -> Clusters:
    """Clusters with tensors of the right shapes, for a snapshot to be restored into."""
    rows, device = len(ownership.my_images(images)), dist.this_device()
    labels_S = torch.zeros(rows, dtype=torch.int32, device=device)
    clusters: Clusters = METHODS[plan.method].start(torch.zeros(rows, dim, device=device), labels_S, plan)
    return clusters


def _rate_notes(snapshot: Snapshot, plan: Plan) -> list[str]:
    """How the learning rate continues if the run was prolonged."""
    about, then = snapshot.about, make_recipe(snapshot.about["recipe"]).optim
    if then.epochs == plan.optim.epochs:
        return []
    step = max(0, about["step"] - 1)
    was, now = (lr_at(step, about["steps_per_epoch"], optim) for optim in (then, plan.optim))
    rate = f"goes from {was:.3g} to {now:.3g}" if was != now else f"stays at {now:.3g}"
    return [f"{plan.optim.epochs} epochs instead of {then.epochs}: the learning rate {rate}."]


def _version_notes(snapshot: Snapshot) -> list[str]:
    """Which packages have changed since the state was saved."""
    then = snapshot.about["versions"]
    changed = [
        f"{name} was {then[name]}, is now {now}" for name, now in versions().items() if then.get(name, now) != now
    ]
    return [f"{'; '.join(changed)}: the run continues, but may not end with the same bits."] if changed else []
