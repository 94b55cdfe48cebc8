"""The program behind `odcft finetune`: the training loop, and the files that a finished run leaves.

Shapes: S images of this rank, B batch, K clusters, D embedding, F backbone.
"""

import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from odcft import seeds
from odcft.backbone.model_card import loading_code
from odcft.backbone.timm_folder import write_timm
from odcft.clustering.methods import METHODS
from odcft.data.batches import Crops, TrainingBatches, TrainingOrder
from odcft.data.custom_reader import Reader, make_reader
from odcft.data.decoded_cache import make_cache
from odcft.data.feature_extraction import extract
from odcft.distributed import dist, ownership, stop_signals
from odcft.distributed.agreement import Agreement, asked_anywhere
from odcft.distributed.stop_signals import Stopped
from odcft.evaluation.during_training import EpochEvaluation, load_images_to_evaluate
from odcft.model.backpropagation import backpropagate
from odcft.model.members import on_all_ranks
from odcft.optim import lr_at, set_lr
from odcft.prepare import Start, new_run, resumed_run
from odcft.progress import Progress
from odcft.recipe import Recipe
from odcft.reports import during_a_run
from odcft.reports.training_sheets import TrainingSheets
from odcft.run import output_checks, snapshot_files
from odcft.run.broken_images import BrokenImages
from odcft.run.clusters_parquet import require_parquet, write_clusters
from odcft.run.failure_messages import explain_failures
from odcft.run.folder import BACKBONES, RUN_FILES, Run, write_recipe
from odcft.run.lock import locked
from odcft.run.metrics import Metrics, read_lines
from odcft.run.non_finite import NonFiniteGuard
from odcft.run.run_json import about_run, finished_after, note_finished
from odcft.run.saver import Saver
from odcft.run.trackers import open_trackers, require_trackers
from odcft.run.training_log import TrainingLog
from odcft.state import State


def fine_tune(
    ckpt: str | list[str],
    data: str,
    out: Path,
    recipe: Recipe,
    *,
    arch: str | None = None,
    reader: str | Callable[[Any], Any] | Reader | None = None,
    memory: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    epochs: int | None = None,
    eval_data: str | None = None,
    eval_every: int = 1,
) -> dict[str, Any]:
    """Fine-tune a checkpoint on unlabelled images, and write a RUN folder with the fine-tuned backbone.

    Args:
        ckpt: what `load_backbone` takes; for `codc` a list, with a checkpoint for each member.
        data: what `find_images` takes; labels are never read.
        out: the RUN folder to write.
        recipe: its `auto` fields are decided here. A resumed run keeps its own recipe and refuses a different one.
        arch: a timm name, to override the checkpoint's own.
        reader: the user's function that reads the images (`Reader`), or its name as MODULE:FUNCTION; also to resume.
        memory: a folder written by `init_memory` to take both memories from, instead of filling them here.
        resume: continue the run in `out`, or start it if nothing has been saved yet.
        overwrite: replace the run in `out`.
        progress: where to report.
        epochs: overrides the recipe's; with `resume` it can prolong the run.
        eval_data: labelled images to measure kNN accuracy on while training; the best epoch's backbone is kept, too.
        eval_every: epochs between two such measurements.

    Returns:
        A summary of the run: out, backbone, load (a line of Python), report (its page, if there is one), images,
        unreadable (left out from the start), broken (became unreadable later), clusters, epochs, steps, loss,
        change_ratio, seconds.

    Raises:
        OdcftError: for anything the user can fix, and for a loss that is not finite (the last good state is kept).
        Stopped: a signal asked for it, inside `stop_signals.handling_signals()`; the state is saved.
    """
    ckpts, progress = [ckpt] if isinstance(ckpt, str) else ckpt, progress or Progress()
    run = Run(out, ckpts, data, arch, make_reader(reader))
    if epochs is not None:
        recipe = recipe.model_copy(deep=True)
        recipe.optim.epochs = epochs
    resume = check_output(out, resume, overwrite, progress)
    require_parquet()
    require_trackers(recipe.log.trackers)
    labels = load_images_to_evaluate(eval_data, make_reader(reader)) if eval_data is not None else None
    try:
        with locked(out, progress.say), explain_failures(recipe):
            began = time.monotonic()
            if resume:
                start, state = resumed_run(run, recipe, epochs, progress)
            else:
                start, state = new_run(run, recipe, progress, memory=memory)
            if dist.rank() == 0:  # also when resumed: the number of epochs may have changed
                write_recipe(out, start.plan)
            steps, broken = training_order(start).steps, 0
            if done := resume and finished_after(out) == steps:
                progress.say(f"Finished    {out} has done all of its {steps:,} steps; nothing is left to do.")
            else:
                evaluation = None
                if labels is not None:
                    view, backbones = start.plan.view, start.backbones
                    evaluation = EpochEvaluation(labels, eval_every, start.plan.optim.epochs, backbones, view, out)
                broken = train(start, state, run, progress, evaluation)
                write_results(start, state, run)
            missing = dist.rank() == 0 and (not done or during_a_run.lacks_last_report(out))
            if start.plan.log.report and missing:
                during_a_run.write_at_end(out, progress, images=start.images, reader=run.reader)
            return _result(start, out, steps, broken, time.monotonic() - began)
    except Stopped as stopped:
        if not stopped.args:
            kept = snapshot_files.exists(out)
            stopped.args = ("The last state is kept." if kept else "There was nothing to save yet.",)
        raise


def check_output(out: Path, resume: bool, overwrite: bool, progress: Progress) -> bool:
    """Refuse an output folder that may not be written to; return whether it holds a run to resume."""
    output_checks.refuse_invalid_path(out)
    if resume and not output_checks.has_no_progress(out):
        output_checks.refuse_foreign_files(out, RUN_FILES, resumed=True)
        return True
    output_checks.refuse_non_empty(out, RUN_FILES, overwrite or resume)
    if resume:
        progress.say(f"Note        {out} has no state to resume from yet, so the run starts from the beginning.")
    return False


def train(start: Start, state: State, run: Run, progress: Progress, evaluation: EpochEvaluation | None = None) -> int:
    """Train from `state.step` to the last step (1. to 4.: the paper's fig. 2); return how many images broke."""
    plan, method, network, clusters = start.plan, METHODS[start.plan.method], state.network, state.clusters
    device, optim, order = dist.this_device(), plan.optim, training_order(start, first_step=state.step)
    batches = TrainingBatches(training_crops(start), order, plan.data.workers, device)
    clusters.start_steps = round(plan.memory.start_epochs * order.steps_per_epoch)
    metrics = Metrics(run.out, open_trackers(run.out, plan, state.logged, progress.say), state.logged)
    guard = NonFiniteGuard(state, optim.skip_non_finite, run.out, progress.say)
    hooks = _after_epochs(start, state, evaluation)
    log = TrainingLog(metrics, plan, state, order.steps_per_epoch, guard=guard, say=progress.say, **hooks)
    saver = Saver(run.out, plan, state, order, metrics=metrics, guard=guard, say=progress.say)
    report = during_a_run.LiveReport(run.out, plan.log.report, progress.say)
    broken = BrokenImages(start.images, plan.data.max_broken, progress.say, least=2 * optim.accumulate)
    ranks, embed = Agreement(), partial(_embed, start, network, device, broken, state, batches)
    # The same network; gradients are averaged over the ranks.
    parallel_network = on_all_ranks(network, device, progress.say).train()
    if not snapshot_files.exists(run.out):
        saver.save_first()

    phase = progress.phase("Fine-tuning", order.images_left())
    with stop_signals.deferred(), saver.on_stop(), closing(batches), phase as advance:
        for epoch in range(state.step // order.steps_per_epoch, optim.epochs):
            at_epoch_start = state.step % order.steps_per_epoch == 0  # if not, the run was resumed inside the epoch
            # DeepCluster only: new labels, so new heads. ODC's labels change in every step, and this is always False.
            if at_epoch_start and method.begin_epoch(clusters, epoch, embed):
                network.new_heads(state.optimizer, state.step)
            for batch in log.timed(broken.checked(batches.of_epoch(state.step), state.step)):
                set_lr(state.optimizer, lr_at(state.step, order.steps_per_epoch, optim))
                torch.manual_seed(seeds.seed(plan.seed, "dropout", dist.rank(), state.step))
                # Each rank draws only images it owns, so the rows of the samples memory it needs are its own.
                row_B = ownership.row_of(batch.index_B).to(device, non_blocking=True)
                views = network.views(batch, state.step, device)  # augmented (sec. 3.4)
                guard.before_forward()
                state.optimizer.zero_grad()
                # 1. The forward pass gives features and predictions. 2. With the labels from the memory, eq. 1,
                # re-weighted by cluster size (sec. 3.2), is back-propagated. (`optim.accumulate`: part by part.)
                label_B, weight_K = method.targets(clusters, row_B)
                to_find = method.entries_to_find(clusters, row_B, state.step)  # none in the paper
                features_BD, loss, logged_loss, instance_loss = backpropagate(
                    parallel_network, network, views, label_B, weight_K, to_find, state.loss_scale.factor
                )
                if step_taken := guard.allows_step():  # a skipped step leaves network and memories as they were
                    state.optimizer.step()
                    # 3. The samples memory, with the features of this very pass (eq. 2, 3). 4. Every k-th step the
                    # centroids memory; then small clusters (sec. 3.2).
                    change_ratio = method.update(clusters, row_B, features_BD, state.step)
                    log.add(logged_loss, change_ratio, batch, instance_loss)
                state.step += 1
                agreed = ranks.after_step(guard.judged(loss, step_taken), saver.due())
                if agreed.broken:
                    raise guard.error(state.step - 1 - ranks.delay(device))
                advance(len(batch.index_B) * dist.world_size(), log.line())
                if agreed.stop:
                    raise Stopped  # `saver.on_stop` saves the state
                if agreed.save and saver.save():
                    report.update()
    saver.save_last()
    if asked_anywhere(device):
        raise Stopped("All steps are done and saved, but the backbone has not been written yet.")
    return broken.report()


def _after_epochs(start: Start, state: State, evaluation: EpochEvaluation | None) -> dict[str, Any]:
    """What the log calls at the ends of epochs: the evaluation, and the contact sheets for trackers."""
    sheets = TrainingSheets(start.images, start.plan.view, start.plan.log.sheet_minutes)
    return {"evaluate": evaluation.after_epoch if evaluation else None, "sheet": partial(sheets.draw, state.clusters)}


def training_order(start: Start, first_step: int = 0) -> TrainingOrder:
    """The batches of the run, in the order that the method draws from its clusters."""
    plan, draw = start.plan, partial(METHODS[start.plan.method].draw, start.clusters)
    batch = plan.optim.batch_size // dist.world_size()
    return TrainingOrder(
        len(start.images), batch, plan.optim.epochs, plan.seed, first_step, draw, reads_ahead=plan.method != "dc"
    )


def training_crops(start: Start) -> Crops:
    """The images with the random crops of training."""
    plan = start.plan
    cache = make_cache(start.images, plan.view) if plan.data.cache == "on" else None
    return Crops(start.images, plan.view, plan.augment, plan.seed, plan.data.decoder, cache)


def _embed(
    start: Start, network: Any, device: torch.device, broken: BrokenImages, state: State, batches: TrainingBatches
) -> Tensor:
    """Backbone features (S, F) of this rank's images without augmentation, in evaluation mode.

    The loader processes of training end first, so that there are never two sets of them.

    Raises:
        Stopped: some rank was asked to stop in the meantime.
    """
    (model,), plan = network, start.plan
    batches.close()
    network.eval()
    with plan.autocast(device):
        features_SF, unreadable = extract(
            *(model.backbone, Crops(start.images, plan.view), plan.batch_of_rank, plan.data.workers, device),
            Progress(quiet=True),
            stop=stop_signals.stop_requested,
        )
    network.train()
    broken.add(unreadable, state.step)
    if asked_anywhere(device):
        raise Stopped
    return features_SF


# ---------------------------------------------------------------- the files of a finished run


def write_results(start: Start, state: State, run: Run) -> None:
    """Write the backbones and clusters.parquet, and note in run.json that the run is finished."""
    out, names = run.out, BACKBONES[: len(run.ckpts)]
    if dist.rank() == 0:
        for member, (model, name) in enumerate(zip(state.network, names, strict=True)):
            model.backbone.set_view(start.plan.view)  # neck and head stay behind (sec. 3.2)
            link = {"report": "../report.html"} if start.plan.log.report else {}
            write_timm(model.backbone, out / name, {**about_run(out, member), **link})
    write_clusters(state.clusters.memory, start.images, out / "clusters.parquet")
    if dist.rank() == 0:
        note_finished(out, state.step)
    dist.barrier()


def _result(start: Start, out: Path, steps: int, broken: int, seconds: float) -> dict[str, Any]:
    """What `fine_tune` returns."""
    last_line, members = (read_lines(out / "metrics.jsonl") or [{}])[-1], len(start.loaded)
    return {
        "out": str(out),
        "backbone": str(out / "backbone"),
        "load": loading_code(start.backbones[0], str(out / "backbone")),
        **({"backbones": [str(out / name) for name in BACKBONES[:members]]} if members > 1 else {}),
        **({"report": str(out / "report.html")} if (out / "report.html").is_file() else {}),
        "images": len(start.images),
        "unreadable": len(start.unreadable),
        "broken": broken,
        "clusters": start.plan.memory.clusters,
        "epochs": start.plan.optim.epochs,
        "steps": steps,
        "loss": last_line.get("loss"),
        "change_ratio": last_line.get("change_ratio"),
        "seconds": round(seconds, 1),
    }
