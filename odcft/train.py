"""The programs `init-memory` and `finetune`: what a run starts from, the loop, and what it leaves behind.

Shapes: N images, S of them on this rank, B batch, K clusters, D embedding.
"""

import json
import math
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from odcft import files, members, seeds
from odcft.backbone.model_card import loading_line
from odcft.backbone.timm_folder import write_timm
from odcft.clustering import clusters_parquet
from odcft.clustering.cluster_statistics import cluster_figures, nmi
from odcft.clustering.clusters_parquet import write_clusters
from odcft.clustering.methods import METHODS
from odcft.data.augmentation import augment_batch
from odcft.data.batches import Crops, TrainingOrder, loader
from odcft.data.feature_extraction import extract, to_float
from odcft.distributed import dist, stop_signals
from odcft.distributed.delayed_reader import LateReader
from odcft.distributed.stop_signals import Stopped
from odcft.errors import OdcftError
from odcft.files import read_json
from odcft.model import Members, Model
from odcft.optim import lr_at, make_optimizer, set_lr
from odcft.optim import restore as restore_optimizer
from odcft.optim import stored as stored_optimizer
from odcft.plan import _number, view_of
from odcft.prepare import Start, _new_run, _resume_point, _versions
from odcft.progress import Progress
from odcft.recipe import Recipe, dump
from odcft.run import output_checks, saver, snapshot_files
from odcft.run.collapse_warnings import summary, warnings
from odcft.run.failures import explained
from odcft.run.folder import BACKBONES, RUN_FILES
from odcft.run.identity import about_run
from odcft.run.lock import locked
from odcft.run.metrics import Metrics, read_lines
from odcft.run.non_finite import all_finite, finite_gradients
from odcft.run.output_checks import only_begun
from odcft.run.training_log import Window
from odcft.text import now

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
    output_checks.refuse_unreachable(out)
    begun = resume and only_begun(out)
    if begun or not resume:
        output_checks.refuse_full(out, RUN_FILES, overwrite or resume)
    else:
        output_checks.refuse_strange(out, RUN_FILES, resumed=True)
    clusters_parquet.require_parquet()
    try:
        with locked(out, progress.say), explained(recipe):
            if begun:
                progress.say(f"Note        {out} has no state to resume from yet: it begins.")
            if resume and not begun:
                start, saved = _resume_point(ckpts, data, out, recipe, epochs, progress, arch)
                return _train(start, saved, ckpts, data, out, progress)
            start = _new_run(ckpts, data, out, recipe, progress, arch, memory)
            return _train(start, None, ckpts, data, out, progress)
    except Stopped as stopped:
        if not stopped.args:
            stopped.args = (
                "The last state is kept." if snapshot_files.exists(out) else "There was nothing to save yet.",
            )
        raise


def _train(
    start: Start, saved: snapshot_files.State | None, ckpts: list[str], data: str, out: Path, progress: Progress
) -> dict[str, Any]:
    """The loop, from the start or from where it was saved, and what it leaves behind."""
    began = time.monotonic()
    if dist.rank() == 0:
        files.write_whole(out / "recipe.yaml", dump(start.recipe))  # also when resumed: the epochs may be others
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
        network.load_state_dict(snapshot_files.under("model.", saved.same))
        restore_optimizer(optimizer, snapshot_files.under("optimizer.", saved.same))
        method.restore(state, saved.rows, snapshot_files.under("method.", saved.same))
        window.restore(saved.own, saved.about["window"])
        labels_before_S.copy_(saved.rows["labels_before"])
        order.first_step, skipped = _same_place(saved.about, order.steps_per_epoch), saved.about["skipped"]
    metrics = Metrics(out, recipe.log.tensorboard, saved.about["step"] if saved else 0)
    pace = saver.Pace(recipe.log.snapshot_minutes, recipe.log.snapshot_share)
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
        failed = snapshot_files.together(metrics.sync) or snapshot_files.save(
            out, snapshot_files.State(same, rows, own, about)
        )
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
                *(only.backbone, plain, batch, workers, device, Progress(quiet=True)), stop=stop_signals.asked
            )
        network.train()
        if _asked_anywhere(device):
            save_and_stop(step)
        return features_SF

    if saved is None and not save(0):  # from the first step on there is a way back
        raise OdcftError(f"{out} cannot hold a state to resume from. Make room, or choose another --out.")
    saved_step = order.first_step

    network.train()
    with (
        stop_signals.deferred(),
        progress.phase("Fine-tuning", len(order) * order.batch * dist.world_size()) as advance,
    ):
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
            made = members.copies(image_B, recipe.codc, seeds.generator(recipe.seed, "copies", *place))
            buffers = [buffer.clone() for buffer in network.buffers()] if optim.skip_non_finite else []

            # 1. forward, 2. read the labels and train (eq. 1)
            with torch.autocast(device.type, torch.bfloat16, enabled=optim.precision == "bfloat16"):
                outputs = model(image_B, made.turned, made.mixed)
            label_B, weight_K = method.targets(state, row_B)
            loss, shown = members.losses(outputs, recipe.codc, label_B, weight_K, made)
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
                features_BD = members.side_by_side([output.features_BD.detach().float() for output in outputs])
                stats = method.update(state, row_B, features_BD, step)
                window.add(shown.detach(), stats["change_ratio"], len(batch.index_B) * dist.world_size())

            epoch_ends = (step + 1) % order.steps_per_epoch == 0
            broken, stop, due = _agreed(late, loss.detach(), bool(stop_signals.asked()), pace.due(epoch_ends))
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
        for m, (member, name) in enumerate(zip(network, BACKBONES, strict=False)):
            member.backbone.show(view_of(recipe))
            write_timm(member.backbone, out / name, about_run(out, m))
    write_clusters(state, images, out / "clusters.parquet")
    metrics.close()
    if dist.rank() == 0:
        for name in BACKBONES[: len(ckpts)]:
            for file in (out / name).iterdir():
                files.sync(file)
        about = {**json.loads((out / "run.json").read_text()), "finished": order.steps, "ended": now()}
        files.write_whole(out / "run.json", json.dumps(about, indent=2))
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
        **({"backbones": [str(out / name) for name in BACKBONES[:members]]} if members > 1 else {}),
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
    made = members.copies(images, recipe.codc, torch.Generator())
    model.eval()  # leaves the running statistics alone
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.optim.precision == "bfloat16"):
        outputs = model(images, made.turned, made.mixed)
    label_B, weight_K = torch.zeros(2, dtype=torch.int64, device=device), torch.ones(K, device=device)
    members.losses(outputs, recipe.codc, label_B, weight_K, made)[0].backward()
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
    asked = torch.full((), float(bool(stop_signals.asked())), device=device)
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
