"""The programs `init-memory` and `finetune`: what a run starts from, the loop, and what it leaves behind.

Shapes: N images, S of them on this rank, B batch, K clusters, D embedding.
"""

import csv
import hashlib
import json
import math
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from odcft import dist, snapshot
from odcft.augment import augment_batch
from odcft.backbone import Loaded, load_backbone
from odcft.data import Crops, Images, TrainingOrder, automatic_size, find_images, loader, step_seed, usual_side
from odcft.errors import OdcftError
from odcft.export import write_timm
from odcft.features import extract, to_float
from odcft.kmeans import assign, kmeans
from odcft.log import Metrics, Progress, duration
from odcft.methods import METHODS, odc
from odcft.model import Model
from odcft.optim import lr_at, make_optimizer, set_lr
from odcft.recipe import Recipe, dump, load_recipe

# What odcft writes into its folders, and all that --overwrite may remove.
MEMORY_FILES = ("memory.safetensors", "neck.safetensors", "memory.json", "images.csv", "quarantine.csv")
RUN_FILES = (
    *("recipe.yaml", "run.json", "metrics.jsonl", "checkpoints", "backbone", "clusters.parquet", "tensorboard"),
    *("report.html", "images.csv", "quarantine.csv"),
)


@dataclass
class Start:
    """What training starts from: the same on every rank but for the rows of the memory."""

    loaded: Loaded
    neck: nn.Module
    dim: int  # of what the neck gives
    images: Images  # those that can be read
    recipe: Recipe  # resolved
    state: odc.State
    device: torch.device
    unreadable: dict[str, str] = field(default_factory=dict)  # name: reason


# ---------------------------------------------------------------- what a run starts from


def begin(
    ckpt: str, data: str, recipe: Recipe, progress: Progress, arch: str | None = None, memory: Path | None = None
) -> Start:
    """Load the checkpoint, find the images, and build both memories, by K-Means or from an `init-memory` folder."""
    images = find_images(data)
    loaded = load_backbone(ckpt, arch)
    resolve_clusters(recipe, len(images))  # refuse what cannot work before anything slow is done
    recipe, device = resolve(recipe, loaded, images)
    set_precision(recipe)
    torch.manual_seed(recipe.seed)
    method = METHODS[recipe.method]
    neck, dim = method.neck(loaded.backbone.width, recipe)
    _describe(loaded, images, recipe, progress)

    if memory is not None:
        return _read_memory(memory, ckpt, loaded, neck, dim, images, recipe, device)

    network = nn.Sequential(loaded.backbone, neck).to(device).eval()
    unreadable: dict[str, str] = {}
    while True:
        crops = Crops(images, _number(recipe.data.size), recipe.data.crop_fraction, None, recipe.seed)
        batch = max(1, recipe.optim.batch_size // dist.world_size())
        features_SD, bad_here = extract(network, crops, batch, _number(recipe.data.workers), device, progress)
        bad = dist.gather_dict(bad_here)
        if not bad:
            break
        unreadable |= {images.names[i]: reason for i, reason in sorted(bad.items())}
        keep = torch.tensor([i not in bad for i in range(len(images))])
        if not keep.any():
            raise OdcftError(
                f"None of the {len(images):,} images in {data} can be read; {next(iter(unreadable.items()))}."
            )
        images = images.without(set(bad))
        if dist.world_size() == 1:
            features_SD = features_SD[keep.to(device)]
            break
        # Every rank owns other images now, so the features are made once more, of images that can all be read.
    if unreadable:
        some = ", ".join(list(unreadable)[:3]) + (", …" if len(unreadable) > 3 else "")
        progress.say(f"            {len(unreadable):,} unreadable and skipped: {some} (all in quarantine.csv)")

    recipe = resolve_clusters(recipe, len(images), progress)
    started = time.monotonic()
    K = _number(recipe.memory.clusters)
    features_SD = method.compact(features_SD, recipe)
    centroids_KD = kmeans(features_SD, K, recipe.seed, recipe.kmeans.iterations, recipe.kmeans.engine)
    labels_S = assign(features_SD, centroids_KD)[0]
    state = method.start(features_SD, labels_S, recipe)
    sizes_K = state.memory.sizes_K
    progress.say(
        f"K-Means     {K:,} clusters · {recipe.kmeans.iterations} iterations · "
        f"sizes {int(sizes_K.min()):,} … {int(sizes_K.max()):,} · {duration(time.monotonic() - started)}"
    )
    return Start(loaded, neck, dim, images, recipe, state, device, unreadable)


def resolve(recipe: Recipe, loaded: Loaded, images: Images) -> tuple[Recipe, torch.device]:
    """Replace every `auto` but the number of clusters, and choose the device."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", dist.local_rank()) if gpu else torch.device("cpu")
    recipe = recipe.model_copy(deep=True)
    backbone = loaded.backbone
    if min(recipe.optim.batch_size, len(images)) < 2 * dist.world_size():
        raise OdcftError(
            f"A batch of {min(recipe.optim.batch_size, len(images))} for {dist.world_size()} processes is less than 2 "
            "images each. Raise optim.batch_size, or use fewer processes."
        )
    if recipe.data.size == "auto":
        recipe.data.size = automatic_size(backbone.size, backbone.fixed_size, usual_side(images))
    elif backbone.fixed_size and recipe.data.size != backbone.size:
        raise OdcftError(
            f"{backbone.arch} takes images of {backbone.size} pixels only. "
            f"Pass --set data.size={backbone.size}, or auto."
        )
    if recipe.data.workers == "auto":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", dist.world_size()))
        recipe.data.workers = min(16, cores // local_ranks) if gpu else 0
    if recipe.kmeans.engine == "auto":
        recipe.kmeans.engine = "torch"  # always there, on any device, divided among the ranks
    if recipe.memory.dtype == "auto":
        recipe.memory.dtype = "float16" if gpu else "float32"
    if recipe.optim.precision == "auto":
        recipe.optim.precision = "bfloat16" if gpu and torch.cuda.is_bf16_supported() else "float32"
    return recipe, device


def resolve_clusters(recipe: Recipe, count: int, progress: Progress | None = None) -> Recipe:
    """The recipe with a number of clusters that can work for `count` images.

    `auto` is count / 128 (10,000 for ImageNet), at least 2, and no more than leaves every cluster above the
    small-cluster threshold. Where even two clusters would be below it, the threshold is lowered.

    Raises:
        OdcftError: a given number of clusters that leaves some of them small whatever happens.
    """
    recipe = recipe.model_copy(deep=True)
    memory = recipe.memory
    if count < 4:
        raise OdcftError(f"{count} images are too few to cluster; give at least 4, better thousands.")
    if recipe.method == "dc":
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
    automatic = max(2, min(count // 128, most))
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
    elif progress and memory.clusters * 2 * (memory.min_cluster + 1) > count:
        progress.say(
            f"Note        {count:,} images leave {count // memory.clusters} for each of {memory.clusters:,} clusters, "
            f"little more than memory.min_cluster={memory.min_cluster}: many will be refilled again and again."
        )
    return recipe


def set_precision(recipe: Recipe) -> None:
    """Whether float32 products on a GPU may use TF32."""
    torch.set_float32_matmul_precision("high" if recipe.optim.tf32 else "highest")


def _describe(loaded: Loaded, images: Images, recipe: Recipe, progress: Progress) -> None:
    found = loaded.match
    cover = f"{len(found.tensors)}/{found.expected} tensors under {found.where}" if found else loaded.source
    progress.say(f"Checkpoint  {loaded.backbone.arch}, {cover}")
    progress.say(f"Images      {len(images):,} in {images.source}")
    optim = recipe.optim
    progress.say(
        f"Plan        {recipe.method.upper()} · {optim.epochs} epochs · batch {optim.batch_size} · "
        f"{recipe.data.size} px · "
        f"{dist.world_size()} process{'es' if dist.world_size() > 1 else ''} · {optim.precision}"
    )


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
    refuse_full(out, MEMORY_FILES, overwrite)
    start = begin(ckpt, data, recipe, progress, arch)
    tensors = snapshot.memory_tensors(start.state.memory, len(start.images))
    if dist.rank() == 0:
        clear(out, MEMORY_FILES)
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, out / "memory.safetensors")
        save_file({name: t.cpu().contiguous() for name, t in start.neck.state_dict().items()}, out / "neck.safetensors")
        _write_image_lists(start, out)
        about = {**_about(start, ckpt, data), "seed": start.recipe.seed, "recipe": start.recipe.model_dump(mode="json")}
        (out / "memory.json").write_text(json.dumps(about, indent=2))
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
    ckpt: str,
    loaded: Loaded,
    neck: nn.Module,
    dim: int,
    images: Images,
    recipe: Recipe,
    device: torch.device,
) -> Start:
    """The start that `init-memory` wrote, for the same checkpoint and images."""
    try:
        about = json.loads((folder / "memory.json").read_text())
        tensors = load_file(folder / "memory.safetensors")
        neck_tensors = load_file(folder / "neck.safetensors")
        with (folder / "images.csv").open(newline="", encoding="utf-8") as file:
            names = [row["path"] for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise OdcftError(
            f"{folder} is not a complete folder of `odcft init-memory` ({error}). Make it again."
        ) from None
    if about["sha256"] != sha256(ckpt):
        raise OdcftError(
            f"{folder} was made from another checkpoint ({about['checkpoint']}), not from {ckpt}. "
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
    clusters, length = tensors["centroids"].shape
    if recipe.memory.clusters not in ("auto", clusters) and recipe.memory.clusters != type(recipe.memory)().clusters:
        raise OdcftError(
            f"{folder} has {clusters:,} clusters, the recipe asks for {recipe.memory.clusters:,}. "
            "Leave --clusters away, or make the memory again."
        )
    made_for = about["recipe"]["method"]
    if (made_for == "dc") != (recipe.method == "dc") or (recipe.method != "dc" and length != dim):
        raise OdcftError(
            f"{folder} was made for {made_for} with features of {length} numbers, not for {recipe.method} with {dim}. "
            "Make the memory again with this recipe and method."
        )
    recipe.memory.clusters = clusters
    recipe = resolve_clusters(recipe, len(images))
    neck.load_state_dict(neck_tensors)
    neck.to(device)
    loaded.backbone.to(device)
    owned = torch.tensor(dist.owned(len(images)))
    state = METHODS[recipe.method].start(
        tensors["features"][owned].to(device), tensors["labels"][owned].to(device), recipe
    )
    return Start(loaded, neck, dim, images, recipe, state, device, unreadable)


# ---------------------------------------------------------------- finetune


def fine_tune(
    ckpt: str,
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
        ckpt: what `load_backbone` takes.
        data: what `find_images` takes; labels are never read.
        out: the RUN to write.
        recipe: its `auto` fields are resolved here. A resumed run keeps its own.
        arch: a timm name, where the checkpoint's own is not to be followed.
        memory: a folder of `init_memory`, instead of making the memories here.
        resume: go on with the RUN in `out`.
        overwrite: replace the RUN in `out`.
        progress: where to speak.
        epochs: other than the recipe's; the one thing a resumed run may change.

    Returns:
        Of the run: out, backbone, images, clusters, epochs, steps, loss, change_ratio, seconds.

    Raises:
        OdcftError: for anything the user can mend, and for a loss that is not finite (the last good state is kept).
    """
    progress = progress or Progress()
    began = time.monotonic()
    if epochs is not None:
        recipe = recipe.model_copy(deep=True)
        recipe.optim.epochs = epochs
    if resume:
        start, first_step = _resume_point(ckpt, data, out, epochs, progress, arch)
    else:
        refuse_full(out, RUN_FILES, overwrite)
        start, first_step = begin(ckpt, data, recipe, progress, arch, memory), 0
        if dist.rank() == 0:
            clear(out, RUN_FILES)
            (out / "run.json").write_text(json.dumps(_about(start, ckpt, data), indent=2))
            _write_image_lists(start, out)
    if dist.rank() == 0:
        (out / "recipe.yaml").write_text(dump(start.recipe))  # also when resumed: the epochs may be others
    dist.barrier()

    recipe, device, state, images = start.recipe, start.device, start.state, start.images
    K, optim = _number(recipe.memory.clusters), recipe.optim
    torch.manual_seed(step_seed(recipe.seed, 1))
    network = Model(start.loaded.backbone, start.neck, start.dim, K).to(device)
    if optim.channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = dist.parallel(network, device)
    optimizer = make_optimizer(network.body(), network.head.parameters(), optim)
    if resume:
        newest = snapshot.newest(out)
        assert newest is not None
        snapshot.load(newest, network, optimizer, state)
    else:
        snapshot.save(out, 0, network, optimizer, state, len(images))  # from the first step on there is a way back

    crops = Crops(images, _number(recipe.data.size), recipe.data.crop_fraction, recipe.augment, recipe.seed)
    method = METHODS[recipe.method]
    order = TrainingOrder(
        *(len(images), optim.batch_size // dist.world_size(), optim.epochs, recipe.seed, first_step),
        draw=lambda generator: method.draw(state, generator),
    )
    metrics = Metrics(out, recipe.log.tensorboard, first_step)
    window = Window(device)
    labels_before_S = state.memory.labels_S.clone()
    last: dict[str, float] = {}

    def embed() -> Tensor:
        """Backbone features (S, F) of this rank's images as they are, in evaluation mode."""
        plain = Crops(images, _number(recipe.data.size), recipe.data.crop_fraction, None, recipe.seed)
        batch = max(1, optim.batch_size // dist.world_size())
        network.eval()
        with torch.autocast(device.type, torch.bfloat16, enabled=optim.precision == "bfloat16"):
            features_SF, _ = extract(
                network.backbone, plain, batch, _number(recipe.data.workers), device, Progress(quiet=True)
            )
        network.train()
        return features_SF

    network.train()
    with progress.phase("Fine-tuning", len(order) * order.batch * dist.world_size()) as advance:
        batches = iter(loader(crops, order, _number(recipe.data.workers), device))
        for step in range(first_step, order.steps):
            window.waiting()
            epoch_begins = step % order.steps_per_epoch == 0
            if epoch_begins and method.begin_epoch(state, step // order.steps_per_epoch, embed):  # dc: labels are new
                network.new_head(optimizer, step_seed(recipe.seed, 1, step))
                order.first_step = step
                batches = iter(loader(crops, order, _number(recipe.data.workers), device))
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
            seed = step_seed(recipe.seed, 2, dist.rank(), step)
            torch.manual_seed(seed)  # dropout
            row_B = (batch.index_B // dist.world_size()).to(device, non_blocking=True)
            pixels = to_float(batch.pixels, device)
            image_B = augment_batch(pixels, recipe.augment, torch.Generator().manual_seed(seed))
            if optim.channels_last:
                image_B = image_B.contiguous(memory_format=torch.channels_last)

            # 1. forward, 2. read the labels and train (eq. 1)
            with torch.autocast(device.type, torch.bfloat16, enabled=optim.precision == "bfloat16"):
                features_BD, logits_BK = model(image_B)
            label_B, weight_K = method.targets(state, row_B)
            loss = F.cross_entropy(logits_BK.float(), label_B, weight_K)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            # 3. the samples memory (eq. 2, 3), 4. the centroids memory
            stats = method.update(state, row_B, features_BD.detach().float(), step)

            window.add(loss.detach(), stats["change_ratio"], len(batch.index_B) * dist.world_size())
            epoch_ends = (step + 1) % order.steps_per_epoch == 0
            note = ""
            if epoch_ends or (step + 1) % recipe.log.interval == 0 or device.type == "cpu":
                window.refuse_non_finite(step, optimizer.param_groups[0]["lr"], out)
            if epoch_ends or (step + 1) % recipe.log.interval == 0:
                last = {
                    "epoch": (step + 1) / order.steps_per_epoch,
                    **window.close(K),
                    **cluster_sizes(state.memory.sizes_K),
                }
                last["lr"] = optimizer.param_groups[0]["lr"]
                if epoch_ends and not torch.equal(labels_before_S, state.memory.labels_S):
                    last["nmi_previous"] = nmi(labels_before_S, state.memory.labels_S)
                    labels_before_S = state.memory.labels_S.clone()
                metrics.write(step, last)
                note = f"epoch {math.ceil(last['epoch'])}/{optim.epochs} · {_health(last)}"
            advance(len(batch.index_B) * dist.world_size(), note)
            if epoch_ends:
                snapshot.save(out, step + 1, network, optimizer, state, len(images))
    metrics.close()

    if dist.rank() == 0:
        write_timm(network.backbone, out / "backbone", {"checkpoint": ckpt, "clusters": K, "epochs": optim.epochs})
    write_clusters(state, images, out / "clusters.parquet")
    dist.barrier()
    seconds = time.monotonic() - began
    return {
        "out": str(out),
        "backbone": str(out / "backbone"),
        "images": len(images),
        "unreadable": len(start.unreadable),
        "clusters": K,
        "epochs": optim.epochs,
        "steps": order.steps,
        "loss": last.get("loss"),
        "change_ratio": last.get("change_ratio"),
        "seconds": round(seconds, 1),
    }


def _resume_point(
    ckpt: str, data: str, out: Path, epochs: int | None, progress: Progress, arch: str | None
) -> tuple[Start, int]:
    """The start of a RUN that was interrupted: its own recipe, images and checkpoint,
    and a memory still to be filled.
    """
    newest = snapshot.newest(out)
    if newest is None or not (out / "run.json").exists():
        raise OdcftError(f"{out} has no state to resume from. Start it again with --overwrite instead of --resume.")
    about = json.loads((out / "run.json").read_text())
    if about["sha256"] != sha256(ckpt):
        raise OdcftError(
            f"{out} was started from {about['checkpoint']}, not from {ckpt}. Resume with that, or choose another --out."
        )
    recipe = load_recipe(out / "recipe.yaml")
    done = json.loads((newest / "state.json").read_text())["step"]
    images = find_images(data)
    with (out / "images.csv").open(newline="", encoding="utf-8") as file:
        names = [row["path"] for row in csv.DictReader(file)]
    known = set(names)
    images = images.without({i for i, name in enumerate(images.names) if name not in known})
    if images.names != names:
        raise OdcftError(
            f"{out} was started on {len(names):,} images, and not all of them are in {data} now. "
            "Put them back, or start anew with --overwrite."
        )
    recipe.optim.epochs = epochs or recipe.optim.epochs
    loaded = load_backbone(ckpt, arch)
    recipe, device = resolve(recipe, loaded, images)
    set_precision(recipe)
    method = METHODS[recipe.method]
    neck, dim = method.neck(loaded.backbone.width, recipe)
    rows = len(dist.owned(len(images)))
    nothing_SD = torch.zeros(rows, dim, device=device)
    state = method.start(nothing_SD, torch.zeros(rows, dtype=torch.int32, device=device), recipe)
    progress.say(f"Resuming    {out} after {done:,} steps")
    return Start(loaded, neck, dim, images, recipe, state, device), done


# ---------------------------------------------------------------- figures of a run


class Window:
    """Sums over the steps between two log lines, on the device, so that no step has to wait for its figures."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), device=device)
        self.change = torch.zeros((), device=device)
        self.steps = self.images = 0
        self.waited = 0.0
        self.opened = self._mark = time.perf_counter()

    def waiting(self) -> None:
        """The loop asks for a batch now."""
        self._mark = time.perf_counter()

    def working(self) -> None:
        """The batch is there."""
        self.waited += time.perf_counter() - self._mark

    def add(self, loss: Tensor, change_ratio: Tensor, images: int) -> None:
        """The figures of a step: two tensors of no dimension on the device, and the images of all ranks."""
        self.loss += loss
        self.change += change_ratio
        self.steps += 1
        self.images += images

    def refuse_non_finite(self, step: int, lr: float, out: Path) -> None:
        """Stop the run when a loss since the last line is not finite."""
        if not math.isfinite(float(self.loss)):
            newest = snapshot.newest(out)
            kept = f"{newest} is the last state saved while it was"
            raise OdcftError(
                f"The loss is not finite at step {step} (learning rate {lr:.3g}); {kept}. "
                "Start again with a lower rate (--set optim.lr=…) or a warm-up (--set optim.warmup_epochs=1)."
            )

    def close(self, K: int) -> dict[str, float]:
        """Means since the last line, over all ranks, and a new beginning."""
        sums = torch.stack([self.loss, self.change]) / self.steps
        dist.all_sum_(sums)
        loss, change = (sums / dist.world_size()).tolist()
        seconds = time.perf_counter() - self.opened
        figures = {
            "loss": loss,
            "loss_over_ln_k": loss / math.log(K),
            "change_ratio": change,
            "images_per_second": self.images / seconds,
            "data_wait": self.waited / seconds,
        }
        self.__init__(self.loss.device)  # type: ignore[misc]
        return figures


def cluster_sizes(sizes_K: Tensor) -> dict[str, int]:
    """Empty clusters, and the sizes of the smallest and the largest, from (K,) sizes."""
    return {"empty": int((sizes_K == 0).sum()), "smallest": int(sizes_K.min()), "largest": int(sizes_K.max())}


def nmi(before_S: Tensor, after_S: Tensor) -> float:
    """Normalised mutual information of two labellings of this rank's images, (S,) each: 0..1.

    With several ranks it is that of rank 0's share, a random sample of the images.
    """
    from sklearn.metrics import normalized_mutual_info_score

    return float(
        normalized_mutual_info_score(before_S.cpu().numpy(), after_S.cpu().numpy(), average_method="geometric")
    )


def _health(figures: dict[str, float]) -> str:
    return (
        f"loss {figures['loss']:.2f} ({figures['loss_over_ln_k']:.2f} of ln K) · "
        f"labels moving {figures['change_ratio']:.0%} · "
        f"clusters {figures['smallest']} … {figures['largest']} · data wait {figures['data_wait']:.0%}"
    )


# ---------------------------------------------------------------- files


def write_clusters(state: odc.State, images: Images, path: Path) -> None:
    """clusters.parquet: path, cluster, and distance of the stored feature to the cluster's centroid."""
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

        columns = {"path": images.names, "cluster": labels_N.cpu().numpy(), "distance": distance_N.cpu().numpy()}
        pq.write_table(pa.table(columns), path)


def refuse_full(out: Path, ours: tuple[str, ...], overwrite: bool) -> None:
    """Refuse an output that would be written over."""
    if out.exists() and not out.is_dir():
        raise OdcftError(f"{out} is a file. Choose a folder for the output.")
    there = {path.name for path in out.iterdir()} if out.exists() else set()
    if there and not overwrite:
        raise OdcftError(
            f"{out} is not empty. Pass --resume to go on with it, --overwrite to replace it, or choose another --out."
        )
    foreign = sorted(there - set(ours))
    if foreign:
        raise OdcftError(
            f"{out} holds files odcft did not write ({foreign[0]}), so --overwrite will not touch it. "
            "Choose another --out."
        )
    standing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not (standing.is_dir() and os.access(standing, os.W_OK)):
        raise OdcftError(f"{out} cannot be written: {standing} is not a folder you may write to. Choose another --out.")
    dist.barrier()  # every rank has looked before one writes


def clear(out: Path, ours: tuple[str, ...]) -> None:
    """Make the folder, and remove what odcft wrote there before."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ours:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _about(start: Start, ckpt: str, data: str) -> dict[str, Any]:
    """Where a folder came from, by which it is recognised again."""
    return {
        "checkpoint": ckpt,
        "sha256": sha256(ckpt),
        "arch": start.loaded.backbone.arch,
        "data": str(data),
        "images": len(start.images),
    }


def _write_image_lists(start: Start, out: Path) -> None:
    with (out / "images.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["row", "path"])
        table.writerows(enumerate(start.images.names))
    if start.unreadable:
        with (out / "quarantine.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["path", "reason"])
            table.writerows(start.unreadable.items())


def sha256(ckpt: str) -> str:
    """Of a checkpoint's bytes; a name (timm:resnet18) stands for itself."""
    path = Path(ckpt)
    for inner in ("backbone/model.safetensors", "model.safetensors", "pytorch_model.bin"):
        if path.is_dir() and (path / inner).exists():
            path = path / inner
    if not path.is_file():
        return ckpt
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _number(value: Any) -> int:
    assert isinstance(value, int), "the recipe is resolved by now"
    return value
