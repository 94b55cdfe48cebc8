"""Save the state of a run when it is due, and warn if that fails."""

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


class SaveTimer:
    """Decides when to save: at intervals and at the end of an epoch, but never so often that it slows training down.

    Args:
        minutes: between two states.
        share: of the time that may be spent on saving.
    """

    def __init__(self, minutes: float, share: float) -> None:
        self.minutes, self.share = minutes, share
        self.last_took = 0.0
        self.last = time.monotonic()

    def due(self, epoch_ends: bool) -> bool:
        """Whether to save now."""
        since = time.monotonic() - self.last
        return since >= self.last_took / self.share and (epoch_ends or since >= 60 * self.minutes)

    def saved(self, began: float) -> None:
        """Note that a state was saved, or that saving failed; it began at `began` (time.monotonic)."""
        self.last = time.monotonic()
        self.last_took = self.last - began


class Saver:
    """Saves the state of a run.

    Args:
        out: the RUN folder.
        plan: says how often to save, and is saved with the state.
        state: of the run.
        order: says how many steps there are.
        metrics: flushed to disk before every state.
        guard: makes the error for weights that are not finite.
        say: called with a warning if a state could not be saved.
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
        self.timer = SaveTimer(plan.log.snapshot_minutes, plan.log.snapshot_share)
        self.saved_step = state.step

    def due(self) -> bool:
        """Whether to save after this step."""
        return self.timer.due(self.state.step % self.order.steps_per_epoch == 0)

    def save(self) -> bool:
        """Save the state; if that fails, warn and keep the earlier ones. Returns whether it was saved.

        Raises:
            OdcftError: the state holds numbers that are not finite.
        """
        began, step = time.monotonic(), self.state.step
        snapshot = stored(self.state, self.plan, self.order.count, self.order.steps_per_epoch)
        if not all_finite(snapshot.same.values()):
            raise self.guard.error(step - 1)
        failed = snapshot_files.try_on_all_ranks(self.metrics.sync) or snapshot_files.save(self.out, snapshot)
        self.timer.saved(began)
        if failed:
            self.say(
                f"Warning     Step {step}: the state could not be saved ({failed}). The run continues; earlier states "
                "are kept, and saving will be tried again."
            )
        else:
            self.saved_step = step
        return not failed

    def save_first(self) -> None:
        """Save the state before the first step, so that there is always something to resume from.

        Raises:
            OdcftError: it could not be saved.
        """
        if not self.save():
            raise OdcftError(f"{self.out} cannot hold a state to resume from. Make room, or choose another --out.")

    def save_last(self) -> None:
        """Save the state after the last step, unless that is done already, and close the log."""
        if self.saved_step < self.order.steps:
            self.save()
        self.metrics.sync()
        self.metrics.close()

    @contextmanager
    def on_stop(self) -> Iterator[None]:
        """On a `Stopped` inside this context, save the state, and raise it again with the number of steps saved."""
        try:
            yield
        except Stopped:
            self.save()
            self.metrics.close()
            raise Stopped(f"Saved after {self.saved_step:,} of {self.order.steps:,} steps.") from None
