"""When the state of a run is saved."""

import time


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
