"""Reading a step's results on the host without waiting for an accelerator."""

import torch
from torch import Tensor


class DelayedReader:
    """Brings a small tensor of every step to the host: at once on a CPU, one step later on an accelerator.

    On an accelerator the copy to host memory is queued after the step's kernels and read one step later, when it has
    long been done.
    """

    def __init__(self) -> None:
        self._host: Tensor | None = None  # pinned; being copied to
        self._arrived: torch.cuda.Event | None = None

    def read(self, value: Tensor) -> Tensor | None:
        """This step's value (CPU), or the previous step's (accelerator; None in the first step).

        Args:
            value: with the same shape and dtype in every step.
        """
        return value if value.device.type == "cpu" else self._exchange(value)

    def _exchange(self, value: Tensor) -> Tensor | None:
        before = self.pending()
        if self._host is None:
            self._host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._arrived = torch.cuda.Event()
        assert self._arrived is not None
        self._host.copy_(value, non_blocking=True)
        self._arrived.record()
        return before

    @staticmethod
    def delay(device: torch.device) -> int:
        """How many steps late values from this device are."""
        return 0 if device.type == "cpu" else 1

    def pending(self) -> Tensor | None:
        """The value that the next `read` will return, if it is already known."""
        if self._host is None:
            return None
        if self._arrived is not None:
            self._arrived.synchronize()  # the copy of the previous step: done, or nearly
        return self._host.clone()

    def restore_pending(self, value: Tensor) -> None:
        """Make the next `read` return this value, which was `pending` when a snapshot was written."""
        self._host, self._arrived = value.pin_memory(), torch.cuda.Event()
