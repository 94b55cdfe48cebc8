"""The program behind `odcft finetune --dry-run`: what a run would do, need and take; nothing is written.

Everything is what the run itself would use: the checkpoint, the images, the plan, the loader processes, the network and
memories of full size. A few batches are extracted and a few steps taken, and their time is scaled to the whole run.

Shapes: S images of this rank, M of them whose features are extracted, K clusters, D embedding.
"""

import itertools
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from odcft.backbone.network import Backbone
from odcft.backbone.one_pixel_maps import OnePixelConv2d
from odcft.clustering import deepcluster
from odcft.clustering.kmeans import kmeans
from odcft.clustering.methods import METHODS
from odcft.data import shared_memory
from odcft.data.batches import Batch, Crops, TrainingBatches, make_loader
from odcft.data.custom_reader import Reader, make_reader
from odcft.data.decoded_cache import DecodedCache
from odcft.data.feature_extraction import to_float
from odcft.data.host_memory import free_host_memory
from odcft.distributed import accelerator, dist, ownership
from odcft.errors import OdcftError
from odcft.model.backpropagation import backpropagate
from odcft.model.members import make_members, make_necks, on_all_ranks
from odcft.optim import lr_at, set_lr
from odcft.plan import Plan, batch_in_parts, bytes_of_step
from odcft.precision import has_bfloat16
from odcft.prepare import (
    Start,
    check_data_command,
    extracts_layer,
    feature_network,
    load_and_plan,
    prepare_start,
    split_features,
)
from odcft.progress import Progress
from odcft.recipe import Recipe
from odcft.run.clusters_parquet import require_parquet
from odcft.run.failure_messages import explain_failures, more_parts, smaller_batch
from odcft.run.folder import Run
from odcft.seeds import seed
from odcft.state import State, new_state, stored
from odcft.suitable_recipe import suggest_recipe
from odcft.text import count_of, duration
from odcft.train import check_output, training_crops, training_order

SECONDS = 10.0  # spent on timing features, and again on timing steps, unless a single one takes longer
WARM_UP = 2  # batches that are not timed
MOST_BATCHES = 40  # that are timed
KMEANS_ROWS = 20_000  # clustered to estimate the time of all
PIECE = 65_536  # rows filled at a time
STATES = 3  # on the disk at once: two are kept while the next is written
TIGHT = 0.95  # of what is free: more than this does not count as fitting
GB = 1e9


def dry_run(
    ckpt: str | list[str],
    data: str,
    out: Path,
    recipe: Recipe,
    *,
    arch: str | None = None,
    reader: str | Callable[[Any], Any] | Reader | None = None,
    memory: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Say what `fine_tune` with these arguments would do; nothing is written, and what it refuses is refused here.

    Returns:
        archs, method, images, clusters, size, epochs, steps, batch_size, batch_of_rank, parts (of a batch), processes,
        device, precision; steps_timed, images_per_second (of all processes); seconds (loading, features, kmeans,
        training, total); needs (bytes: host, workers and gpu of one process, shared of this machine, disk of all), free
        (bytes: host, gpu, shared, disk; None where unknown), problems (what does not fit and which setting changes
        that), fits, better_recipe (a shipped one that suits this set better, or None), faster_precision ("bfloat16"
        where that should be faster on this processor, is safe, and was left to odcft; or None).

    Raises:
        OdcftError: for anything the user can fix; so also if a step needs more memory than there is.
    """
    progress, ckpts = progress or Progress(), [ckpt] if isinstance(ckpt, str) else ckpt
    run = Run(out, ckpts, data, arch, make_reader(reader))
    check_output(out, False, overwrite, progress)
    require_parquet()
    free = free_space(out)
    with explain_failures(recipe):
        began = time.monotonic()
        if memory is None:
            start, seconds = _start_like_a_run(run, recipe, progress, free)
        else:
            start = prepare_start(run, recipe, progress, memory=memory)
            seconds = {"loading": time.monotonic() - began, "features": 0.0, "kmeans": 0.0}
        _refuse_step_too_large(start, free)
        state = new_state(make_members(start.backbones, start.necks, start.dim, start.plan), start.clusters, start.plan)
        order, crops = training_order(start), training_crops(start)
        timed, step_seconds, workers = _time_steps(start, state, crops, progress)
    plan = start.plan
    seconds["training"] = order.steps * step_seconds + _clusterings(plan) * (seconds["features"] + seconds["kmeans"])
    seconds["total"] = sum(seconds.values())
    needs = dist.gather_dict({dist.rank(): _needs(start, state, workers, crops.cache)})
    most = {name: max(one[name] for one in needs.values()) for name in needs[0]}
    too_much = problems(most, free, plan)
    return {
        **{"archs": [backbone.arch for backbone in start.backbones], "method": plan.method},
        **{"images": len(start.images), "clusters": plan.memory.clusters, "size": plan.data.size},
        **{"epochs": plan.optim.epochs, "steps": order.steps, "steps_per_epoch": order.steps_per_epoch},
        **{"batch_size": plan.optim.batch_size, "batch_of_rank": order.batch, "parts": plan.optim.accumulate},
        "processes": dist.world_size(),
        **{"device": dist.this_device().type, "precision": plan.optim.precision, "steps_timed": timed},
        "images_per_second": round(order.batch * dist.world_size() / step_seconds, 1),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        **{"needs": most, "free": free, "problems": too_much, "fits": not too_much, "better_recipe": _better(start)},
        "faster_precision": _faster_precision(recipe, start.backbones),
    }


def _clusterings(plan: Plan) -> int:
    """How often features are clustered again during training: by DC, at the start of later epochs."""
    return sum(plan.method == "dc" and deepcluster.clusters_again(plan, epoch) for epoch in range(plan.optim.epochs))


def _better(start: Start) -> str | None:
    """The recipe that the notes of the run suggest instead of this one."""
    suggestion = suggest_recipe(start.backbones, len(start.images), start.plan)
    return suggestion.recipe if suggestion else None


def _faster_precision(recipe: Recipe, backbones: Sequence[Backbone]) -> str | None:
    """A precision that trains these networks faster on this processor, if the recipe leaves the choice to odcft.

    Grouped convolutions are slower in it. And on some processors torch's gradients in bfloat16 are wrong for weights
    that meet only padding: so there must be none, or it must be skipped.
    """
    device = dist.this_device()
    if device.type != "cpu" or recipe.optim.precision != "auto" or not has_bfloat16(device):
        return None
    convolutions = [m for backbone in backbones for m in backbone.net.modules() if isinstance(m, nn.Conv2d)]
    safe = all(isinstance(one, OnePixelConv2d) or one.padding == (0, 0) for one in convolutions)
    return "bfloat16" if safe and all(one.groups == 1 for one in convolutions) else None


# ---------------------------------------------------------------- time


def _start_like_a_run(
    run: Run, recipe: Recipe, progress: Progress, free: dict[str, int | None]
) -> tuple[Start, dict[str, float]]:
    """What training would start from, with features and labels that have only the right shapes; and the seconds."""
    began = time.monotonic()
    planned = load_and_plan(run, recipe, progress)
    plan, images, method = planned.plan, planned.images, METHODS[planned.plan.method]
    backbones = [one.backbone for one in planned.loaded]
    necks, dim = make_necks(backbones, plan)
    seconds = {"loading": time.monotonic() - began}
    rows = len(ownership.my_images(len(images)))
    _refuse_memory_too_large(rows, len(necks) * dim, free, "a smaller neck.dim")
    features_MD, an_image = _time_features(
        feature_network(backbones, necks, plan), Crops(images, plan.view), plan, progress
    )
    seconds["features"] = an_image * rows
    if not len(features_MD):
        raise OdcftError(f"None of the images tried can be read: `{check_data_command(images)}` lists the reasons.")
    if extracts_layer(plan):
        _refuse_memory_too_large(
            rows, features_MD.shape[1], free, "--set memory.start_layer=last --set memory.start_features=neck"
        )
    features_SD = _like(features_MD, rows)
    began = time.monotonic()
    with progress.waiting(f"K-Means     {plan.memory.clusters:,} clusters …"):
        features_SD, clustered_SP = split_features(features_SD, dim, plan)
        prepared = time.monotonic()
        part_SP = clustered_SP[: max(KMEANS_ROWS, plan.memory.clusters)]
        kmeans(part_SP, plan.memory.clusters, seed(plan.seed, "kmeans", 0), plan.kmeans.iterations, plan.kmeans.engine)
        _wait()
    seconds["kmeans"] = prepared - began + (time.monotonic() - prepared) * rows / len(part_SP)
    labels_S = torch.arange(rows, device=features_SD.device) % plan.memory.clusters
    clusters = method.start(features_SD, labels_S, plan)
    return Start(plan, planned.loaded, necks, dim, images, clusters, {}), seconds


def _refuse_memory_too_large(rows: int, dim: int, free: dict[str, int | None], instead: str) -> None:
    """Refuse features larger than what is free, before they are allocated."""
    where = "host" if free["gpu"] is None else "gpu"
    needed, there = rows * dim * 4, free[where]
    if there is not None and needed > there:
        raise OdcftError(
            f"The features of {rows:,} images need {_gb(needed)} of memory on each process, and {_gb(there)} are free "
            f"({where}). Use more devices (each keeps its share of them), or {instead}."
        )


def _refuse_step_too_large(start: Start, free: dict[str, int | None]) -> None:
    """On a CPU, refuse a step that needs more memory than is free, before the system ends the process for it."""
    plan, here = start.plan, dist.local_world_size()
    if free["gpu"] is not None or free["host"] is None:
        return
    part = -(-plan.batch_of_rank // plan.optim.accumulate)
    needed = here * bytes_of_step(plan, start.backbones, len(start.images), part)
    if needed > free["host"]:
        raise OdcftError(
            f"A step with {batch_in_parts(plan)} at {plan.data.size} pixels needs about {_gb(needed)} of memory, and "
            f"{_gb(free['host'])} are free. Pass {more_parts(plan)}{smaller_batch(plan)}, or a smaller data.size."
        )


@torch.no_grad()
def _time_features(network: Any, crops: Crops, plan: Plan, progress: Progress) -> tuple[Tensor, float]:
    """Features (M, D) of a few images of this rank, and the seconds for one image."""
    device, owned, batch = dist.this_device(), ownership.my_images(len(crops.images)), plan.batch_of_rank
    chosen = owned[:: max(1, len(owned) // (batch * MOST_BATCHES))][: batch * MOST_BATCHES]
    batches = [[(0, i) for i in chosen[first : first + batch]] for first in range(0, len(chosen), batch)]
    features: list[Tensor] = []
    clock = _Clock()
    with progress.phase("Features", len(chosen)) as advance:
        for part in make_loader(crops, batches, plan.data.workers, device):
            if len(part.index_B):
                features.append(network(to_float(part.pixels, device)).float())
            count = len(part.index_B) + len(part.unreadable)
            advance(count)
            if clock.enough(count):
                advance(len(chosen) - clock.seen)
                break
    return torch.cat(features) if features else torch.empty(0, 0), clock.seconds_each()


def _like(features_MD: Tensor, rows: int) -> Tensor:
    """Features (S, D) that spread like these."""
    pool_MD = features_MD
    features_SD = torch.empty(rows, pool_MD.shape[1], device=pool_MD.device)
    for first in range(0, rows, PIECE):
        piece_BD = features_SD[first : first + PIECE].normal_(std=float(pool_MD.std()) / 2)
        piece_BD += pool_MD[torch.randint(len(pool_MD), (len(piece_BD),), device=pool_MD.device)]
    return features_SD


def _time_steps(start: Start, state: State, crops: Crops, progress: Progress) -> tuple[int, float, int]:
    """Take steps as `train` does; return how many were timed, the seconds of one, and the bytes of loader processes."""
    order, clock = training_order(start), _Clock()
    batches = TrainingBatches(crops, order, start.plan.data.workers, dist.this_device())
    network = on_all_ranks(state.network, dist.this_device(), progress.say).train()
    most = min(order.steps, WARM_UP + max(MOST_BATCHES, 2 * start.plan.data.workers))

    def all_batches() -> Iterator[Batch]:
        for epoch in range(start.plan.optim.epochs):
            yield from batches.of_epoch(epoch * order.steps_per_epoch)

    with closing(batches), progress.phase("Steps", most, "step") as advance:
        for step, batch in enumerate(itertools.islice(all_batches(), most)):
            if len(batch.index_B) < 2 * start.plan.optim.accumulate:
                raise OdcftError(
                    f"Hardly any image of a batch can be read: `{check_data_command(start.images)}` says why."
                )
            _take_step(start, state, network, batch, step, order.steps_per_epoch)
            advance(1)
            done = torch.full((), float(clock.enough(1)), device=dist.this_device())
            dist.all_sum_(done)  # all ranks take as many steps
            if done:
                advance(most - step - 1)
                break
        workers = _memory_of_children()
    return clock.timed, clock.seconds_each(), workers


def _take_step(start: Start, state: State, network: Any, batch: Batch, step: int, steps_per_epoch: int) -> None:
    """One step of `train`, without its checks and its log."""
    plan, device, method = start.plan, dist.this_device(), METHODS[start.plan.method]
    set_lr(state.optimizer, lr_at(step, steps_per_epoch, plan.optim))
    row_B = ownership.row_of(batch.index_B).to(device, non_blocking=True)
    views = state.network.views(batch, step, device)
    state.optimizer.zero_grad()
    label_B, weight_K = method.targets(state.clusters, row_B)
    factor = state.loss_scale.factor
    to_find = method.entries_to_find(state.clusters, row_B, step)
    passed = backpropagate(network, state.network, views, label_B, weight_K, to_find, factor)
    if state.loss_scale.allows_step(state.network):
        state.optimizer.step()
    method.update(state.clusters, row_B, passed.features_BD, step)


class _Clock:
    """Times what is done again and again: not the first few times, and not for long."""

    def __init__(self) -> None:
        self.calls = self.seen = self.timed = self.items = 0
        self.began = self.warm = time.monotonic()
        self.end = self.began

    def enough(self, items: int) -> bool:
        """Note that so many items are done; return whether enough has been timed."""
        _wait()
        self.calls, self.seen, self.end = self.calls + 1, self.seen + items, time.monotonic()
        # A first one that takes long shows that warming up hardly matters.
        if self.calls <= WARM_UP and not (self.calls == WARM_UP and self.end - self.began > 2 * SECONDS):
            self.warm = self.end
        else:
            self.timed, self.items = self.timed + 1, self.items + items
        return self.timed >= MOST_BATCHES or (self.timed > 0 and self.end - self.warm > SECONDS)

    def seconds_each(self) -> float:
        """Seconds an item."""
        if not self.timed:  # there were only a few
            return (self.end - self.began) / max(1, self.seen)
        return (self.end - self.warm) / max(1, self.items)


def _wait() -> None:
    """Wait until the device has done what it was asked to do."""
    accelerator.synchronize()


# ---------------------------------------------------------------- memory and disk


def _needs(start: Start, state: State, workers: int, cache: DecodedCache | None) -> dict[str, int]:
    """Bytes that this process and its loader processes take; and all of this machine in shared memory, all on disk."""
    plan, ranks = start.plan, dist.world_size()
    snapshot = stored(state, plan, len(start.images), 1)
    own = _bytes(snapshot.rows) + _bytes(snapshot.own)
    backbones = sum(_bytes(backbone.net.state_dict()) for backbone in start.backbones)
    names = 100 * len(start.images)  # clusters.parquet and images.csv, roughly
    batch = plan.data.bands * plan.data.size**2 * plan.batch_of_rank
    queue = shared_memory.fitting_queue(plan.data.workers, batch)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        # safetensors copies what it writes
        "host": peak + _bytes(snapshot.same) + own + (0 if cache is None else cache.nbytes),
        "workers": workers,
        "gpu": accelerator.most_memory_used(),
        "shared": dist.local_world_size() * plan.data.workers * queue.ahead * batch * queue.shared,
        "disk": STATES * (_bytes(snapshot.same) + ranks * own) + backbones + names,
    }


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _memory_of_children() -> int:
    """Bytes of the loader processes of this one, what they share counted once; 0 where the system does not say."""
    total = 0
    with suppress(OSError, ValueError):
        for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            lines = Path(f"/proc/{child}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def free_space(out: Path) -> dict[str, int | None]:
    """Bytes that are free before anything is loaded; None where the system does not say."""
    free: dict[str, int | None] = dict.fromkeys(("host", "gpu", "shared", "disk"))
    free["host"] = free_host_memory()
    free["gpu"] = accelerator.free_memory()
    with suppress(OSError):
        free["shared"] = shutil.disk_usage(shared_memory.SHARED_MEMORY).free
    with suppress(OSError, StopIteration):
        free["disk"] = shutil.disk_usage(next(f for f in (out, *out.absolute().parents) if f.exists())).free
    return free


def problems(needs: dict[str, int], free: dict[str, int | None], plan: Plan) -> list[str]:
    """What does not fit, each with the setting that changes it."""
    ranks, found = dist.world_size(), []
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))  # processes on this machine

    def too_much(name: str, needed: int) -> bool:
        there = free[name]
        return there is not None and needed > TIGHT * there

    if too_much("host", here * (needs["host"] + needs["workers"])):
        fewer = f"--set data.workers={plan.data.workers // 2} or " if plan.data.workers > 1 else ""
        found.append(
            f"memory: {count_of(here, 'process').replace('processs', 'processes')} need "
            f"{_gb(here * (needs['host'] + needs['workers']))}. Pass {fewer}{smaller_batch(plan)}."
        )
    if too_much("gpu", needs["gpu"]):
        found.append(f"GPU memory: pass {more_parts(plan)}{smaller_batch(plan)}.")
    if too_much("shared", needs["shared"]):
        workers = int(plan.data.workers * TIGHT * (free["shared"] or 0) / needs["shared"])
        found.append(
            f"shared memory ({shared_memory.SHARED_MEMORY}): pass --set data.workers={workers}. {shared_memory.REMEDY}."
        )
    if too_much("disk", needs["disk"]):
        found.append(f"disk: {_gb(needs['disk'])} for states and results. Make room, or choose another --out.")
    return found


# ---------------------------------------------------------------- text


def describe(result: dict[str, Any]) -> list[str]:
    """What `dry_run` returned, as lines for the user."""
    ranks, needs, free, seconds = result["processes"], result["needs"], result["free"], result["seconds"]
    divided = f" in {result['parts']} parts" if result["parts"] > 1 else ""
    batch = f"batch {result['batch_size']}" + (f" ({result['batch_of_rank']} a process)" if ranks > 1 else "") + divided
    epochs = result["epochs"]
    lines = [
        f"Would train {' and '.join(result['archs'])} at {result['size']} pixels · {result['method'].upper()} · "
        f"K = {result['clusters']:,} · {count_of(epochs, 'epoch')}, {count_of(result['steps'], 'step')} · {batch} · "
        f"{ranks} process{'es' if ranks > 1 else ''} on {result['device']}, {result['precision']}"
    ]

    def part(name: str, needed: int) -> str:
        return f"{_gb(needed)}" + (f" of {_gb(free[name])} free" if free[name] is not None else "")

    each = " each" if ranks > 1 else ""
    parts = [f"GPU {part('gpu', needs['gpu'])}{each}"] if needs["gpu"] else []
    parts.append(f"memory {part('host', needs['host'] + needs['workers'])}{each}")
    parts += [f"/dev/shm {part('shared', needs['shared'])}"] if needs["shared"] else []
    parts.append(f"disk {part('disk', needs['disk'])}, for states")
    lines.append(f"Needs       {' · '.join(parts)}")
    before = [
        f"{title} {duration(seconds[name])}"
        for name, title in (("loading", "loading"), ("features", "features"), ("kmeans", "K-Means"))
        if seconds[name] >= 1
    ]
    shares = ", ".join([*before, f"{count_of(epochs, 'epoch')} of {duration(seconds['training'] / epochs)}"])
    lines.append(
        f"Takes       about {duration(seconds['total'])}: {shares} "
        f"({count_of(result['steps_timed'], 'step')} timed, {result['images_per_second']:,.0f} img/s)"
    )
    if result["faster_precision"]:
        lines.append(
            f"Try also    --set optim.precision={result['faster_precision']}: this processor multiplies it faster than "
            f"{result['precision']}. A ResNet-18 on 32 pixels trained 1.3 times as fast; a tiny network may not."
        )
    lines += [f"Too much    {problem}" for problem in result["problems"]]
    return [*lines, "Nothing was written."]


def _gb(count: int) -> str:
    return f"{count / GB:.1f} GB" if count >= GB / 10 else f"{count / 1e6:.0f} MB"
