"""The log of a run: figures of the steps, a line now and then, warnings."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

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
        metrics: where the lines go.
        plan: how often.
        state: of the run; its window has the sums since the last line.
        steps_per_epoch: of this run.
        guard: its words for a loss that is not finite.
        say: told of warnings.
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
    ) -> None:
        self.metrics, self.plan, self.state = metrics, plan, state
        self.steps_per_epoch, self.guard, self.say = steps_per_epoch, guard, say

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; how long each was waited for is counted."""
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self.state.window.waited += time.perf_counter() - began
            yield batch

    def add(self, loss: Tensor, moved: Tensor, batch: Batch) -> None:
        """The figures of a step: its loss, the share of labels that moved (tensors on the device), and its images."""
        self.state.window.add(loss.detach(), moved, len(batch.index_B) * dist.world_size())

    def line(self) -> str:
        """After a step: a line of figures where one is due, in words; else "".

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
        # DC's first labels have none before them.
        if epoch_ends and not (plan.method == "dc" and torch.equal(state.labels_before_S, clusters.labels_S)):
            figures["nmi_previous"] = nmi(state.labels_before_S, clusters.labels_S)
            state.labels_before_S = clusters.labels_S.clone()
        self._warn(last, figures)
        self.metrics.write(last, figures)
        return f"epoch {math.ceil(figures['epoch'])}/{plan.optim.epochs} · {summary(figures, plan.method)}"

    def _warn(self, step: int, figures: dict[str, Any]) -> None:
        """Say what looks wrong, once while it lasts, and put it into the line."""
        lines = [*self.metrics.lines(), {"step": step, **figures}]
        troubles = warnings(lines, self.plan.memory.clusters, self.plan.method)
        for trouble, what in troubles.items():
            if trouble not in self.metrics.last().get("warnings", []):
                self.say(f"Warning     Step {step}: {what}")
        if troubles:
            figures["warnings"] = sorted(troubles)
