"""The training log: collects the figures of the steps, writes a line of them at intervals, and warns of trouble."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from odcft.clustering.cluster_statistics import cluster_figures, nmi
from odcft.data.batches import Batch
from odcft.distributed import dist
from odcft.plan import Plan
from odcft.run.collapse_warnings import summary, warnings
from odcft.run.metrics import Metrics
from odcft.run.non_finite import NonFiniteGuard
from odcft.state import State


class TrainingLog:
    """Collects the figures of the steps, and writes a line of them at intervals and at the end of every epoch.

    Args:
        metrics: where the lines are written.
        plan: says how often.
        state: of the run; its window holds the sums since the last line.
        steps_per_epoch: of this run.
        guard: makes the error for a loss that is not finite.
        say: called with each warning.
        evaluate: at the end of an epoch, called on all ranks with its number, the lines so far and `say`; what it
            returns goes into the line.
        sheet: at the end of an epoch, called on a rank that has trackers, with whether it is the last; it returns a
            contact sheet of clusters for them (H, W, 3), or None.
    """

    def __init__(
        self,
        metrics: Metrics,
        plan: Plan,
        state: State,
        steps_per_epoch: int,
        *,
        guard: NonFiniteGuard,
        say: Callable[[str], None],
        evaluate: Callable[[int, list[dict[str, Any]], Callable[[str], None]], dict[str, Any]] | None = None,
        sheet: Callable[[bool], np.ndarray | None] | None = None,
    ) -> None:
        self.evaluate, self.sheet = evaluate, sheet
        self.metrics, self.plan, self.state = metrics, plan, state
        self.steps_per_epoch, self.guard, self.say = steps_per_epoch, guard, say

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches, and add up how long training waited for them."""
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self.state.window.waited += time.perf_counter() - began
            yield batch

    def add(self, loss: Tensor, change_ratio: Tensor, batch: Batch, instance_loss: Tensor | None = None) -> None:
        """Add a step: its loss, the share of labels that changed (scalars on the device), and its batch."""
        images = len(batch.index_B) * dist.world_size()
        self.state.window.add(loss.detach(), change_ratio, images, instance_loss)

    def line(self) -> str:
        """After a step: write a line to metrics.jsonl if one is due, and return it as text for the terminal; else "".

        Raises:
            OdcftError: the loss is not finite.
        """
        plan, state = self.plan, self.state
        epoch_ends = state.step % self.steps_per_epoch == 0
        if not state.window.steps or not (epoch_ends or state.step % plan.log.interval == 0):
            return ""
        clusters, last = state.clusters.memory, state.step - 1
        figures: dict[str, Any] = {
            "epoch": state.step / self.steps_per_epoch,
            **state.window.close(plan.memory.clusters),
            **cluster_figures(clusters.sizes_K, clusters.centroids_KD),
        }
        if not math.isfinite(figures["loss"]):
            raise self.guard.error(last)
        figures["lr"] = state.optimizer.param_groups[0]["lr"]
        # DC's labels of the first epoch have no previous ones to compare with.
        if epoch_ends and not (plan.method == "dc" and torch.equal(state.labels_before_S, clusters.labels_S)):
            figures["nmi_previous"] = nmi(state.labels_before_S, clusters.labels_S)
            state.labels_before_S = clusters.labels_S.clone()
        if epoch_ends and self.evaluate is not None:
            figures |= self.evaluate(state.step // self.steps_per_epoch, self.metrics.lines(), self.say)
            dist.wait_for_all()  # for rank 0, which evaluates alone
            state.window.opened = time.perf_counter()  # its time is not training's
        self._warn(last, figures)
        self.metrics.write(last, figures)
        if epoch_ends and self.metrics.trackers:
            self._show_clusters(last)
        kept = state.step <= state.clusters.start_steps
        said = summary(figures, plan.method, kept_labels=kept, head_apart=kept and plan.starts_with_layer)
        return f"epoch {math.ceil(figures['epoch'])}/{plan.optim.epochs} · {said}"

    def _show_clusters(self, step: int) -> None:
        """Give the trackers the sizes of the clusters, and a contact sheet if one is due; at the end of an epoch."""
        trackers, epoch = self.metrics.trackers, self.state.step // self.steps_per_epoch
        trackers.sizes(step, self.state.clusters.memory.sizes_K.cpu().numpy())
        try:
            pixels = self.sheet(epoch == self.plan.optim.epochs) if self.sheet is not None else None
        except Exception as error:  # a picture is not worth a run
            self.say(f"Note        No contact sheets from now on: {error}")
            self.sheet = pixels = None
        if pixels is not None:
            trackers.picture(step, "clusters", pixels)
        self.state.window.opened = time.perf_counter()  # its time is not training's

    def _warn(self, step: int, figures: dict[str, Any]) -> None:
        """Warn of whatever looks wrong, once as long as it lasts, and note it in the line."""
        lines = [*self.metrics.lines(), {"step": step, **figures}]
        apart = self.plan.memory.start_epochs if self.plan.starts_with_layer else 0.0
        problems = warnings(lines, self.plan.memory.clusters, self.plan.method, apart)
        for problem, explanation in problems.items():
            if problem not in self.metrics.last().get("warnings", []):
                self.say(f"Warning     Step {step}: {explanation}")
        if problems:
            figures["warnings"] = sorted(problems)
