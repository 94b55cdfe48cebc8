"""Reading a step's results on the host without waiting for an accelerator."""

from typing import Any

import torch
from torch import Tensor

from odcft.distributed import accelerator


class DelayedReader:
    """Brings a small tensor of every step to the host: at once on a CPU, one step later on a GPU.

    On an accelerator the copy to host memory is queued after the step's kernels and read one step later, when it has
    long been done.
    """

    def __init__(self) -> None:
        self._host: Tensor | None = None  # pinned; being copied to
        self._arrived: Any = None  # an event of the device

    def read(self, value: Tensor) -> Tensor | None:
        """This step's value (CPU), or the previous step's (accelerator; None in the first step).

        Args:
            value: with the same shape and dtype in every step.
        """
        return self._exchange(value) if self.delay(value.device) else value

    def _exchange(self, value: Tensor) -> Tensor | None:
        before = self.pending()
        if self._host is None:
            self._host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._arrived = accelerator.new_event()
        self._host.copy_(value, non_blocking=True)
        self._arrived.record()
        return before

    @staticmethod
    def delay(device: torch.device) -> int:
        """How many steps late values from this device are."""
        return int(device.type in accelerator.ASYNCHRONOUS)

    def pending(self) -> Tensor | None:
        """The value that the next `read` will return, if it is already known."""
        if self._host is None:
            return None
        if self._arrived is not None:
            self._arrived.synchronize()  # the copy of the previous step: done, or nearly
        return self._host.clone()

    def restore_pending(self, value: Tensor) -> None:
        """Make the next `read` return this value, which was `pending` when a snapshot was written."""
        self._host, self._arrived = value.pin_memory(), accelerator.new_event()
