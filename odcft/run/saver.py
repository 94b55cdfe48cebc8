"""When the state of a run is saved, and what is said when it cannot be."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from odcft.data.batches import TrainingOrder
from odcft.distributed.stop_signals import Stopped
from odcft.errors import OdcftError
from odcft.plan import Plan
from odcft.run import snapshot_files
from odcft.run.metrics import Metrics
from odcft.run.non_finite import NonFiniteGuard, all_finite
from odcft.state import State, stored


class Pace:
    """When to write the next state: every few minutes and at the end of an epoch, but never so often that it costs."""

    def __init__(self, minutes: float, share: float) -> None:
        self.minutes, self.share = minutes, share
        self.took = 0.0
        self.last = time.monotonic()

    def due(self, epoch_ends: bool) -> bool:
        """Whether a state should be written now."""
        since = time.monotonic() - self.last
        return since >= self.took / self.share and (epoch_ends or since >= 60 * self.minutes)

    def wrote(self, began: float) -> None:
        """A state was written, or could not be, since `began` (time.monotonic)."""
        self.last = time.monotonic()
        self.took = self.last - began


class Saver:
    """Saves the state of a run.

    Args:
        out: the RUN.
        plan: how often to save; it is part of what is saved.
        state: of the run.
        order: how many steps there are.
        metrics: brought onto the disk before every state.
        guard: its words for weights that are not finite.
        say: told of what could not be saved.
    """

    def __init__(
        self,
        out: Path,
        plan: Plan,
        state: State,
        order: TrainingOrder,
        *,
        metrics: Metrics,
        guard: NonFiniteGuard,
        say: Callable[[str], None],
    ) -> None:
        self.out, self.plan, self.state, self.order = out, plan, state, order
        self.metrics, self.guard, self.say = metrics, guard, say
        self.pace = Pace(plan.log.snapshot_minutes, plan.log.snapshot_share)
        self.saved_step = state.step

    def due(self) -> bool:
        """Whether a state should be written after this step."""
        return self.pace.due(self.state.step % self.order.steps_per_epoch == 0)

    def save(self) -> bool:
        """Write the state, or say why that failed; nothing is lost by it.

        Raises:
            OdcftError: it holds numbers that are not finite.
        """
        began, step = time.monotonic(), self.state.step
        snapshot = stored(self.state, self.plan, self.order.count, self.order.steps_per_epoch)
        if not all_finite(snapshot.same.values()):
            raise self.guard.error(step - 1)
        failed = snapshot_files.together(self.metrics.sync) or snapshot_files.save(self.out, snapshot)
        self.pace.wrote(began)
        if failed:
            self.say(
                f"Warning     Step {step}: the state could not be saved ({failed}). The run continues; earlier states "
                "are kept, and it will try again."
            )
        else:
            self.saved_step = step
        return not failed

    def save_first(self) -> None:
        """Write the state before the first step: from then on there is something to resume from.

        Raises:
            OdcftError: there is no room for it.
        """
        if not self.save():
            raise OdcftError(f"{self.out} cannot hold a state to resume from. Make room, or choose another --out.")

    def save_last(self) -> None:
        """Write the state after the last step, unless it is there, and close the log."""
        if self.saved_step < self.order.steps:
            self.save()
        self.metrics.sync()
        self.metrics.close()

    @contextmanager
    def on_stop(self) -> Iterator[None]:
        """Within, a `Stopped` saves the state before it goes on its way, and says after how many steps that was."""
        try:
            yield
        except Stopped:
            self.save()
            self.metrics.close()
            raise Stopped(f"Saved after {self.saved_step:,} of {self.order.steps:,} steps.") from None
