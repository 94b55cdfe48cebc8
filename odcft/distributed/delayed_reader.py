"""What the host learns about a step, without ever waiting for an accelerator."""

import torch
from torch import Tensor


class LateReader:
    """Brings a small tensor of each step to the host: that of this step on a CPU, of the step before elsewhere.

    On an accelerator the tensor is copied to host memory behind the step's kernels and read one step later, when it has
    long arrived.
    """

    def __init__(self) -> None:
        self._host: Tensor | None = None  # pinned, on its way
        self._arrived: torch.cuda.Event | None = None

    def read(self, value: Tensor) -> Tensor | None:
        """This step's value (CPU), or that of the step before (accelerator; None when there was none).

        Args:
            value: of the same shape and dtype in every step.
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
        """How many steps late a value of this device is."""
        return 0 if device.type == "cpu" else 1

    def pending(self) -> Tensor | None:
        """The value that the next `read` will give, if one is on its way."""
        if self._host is None:
            return None
        if self._arrived is not None:
            self._arrived.synchronize()  # of the step before: the device is past it, or about to be
        return self._host.clone()

    def put_back(self, value: Tensor) -> None:
        """Let the next `read` give this value, as it was `pending` when a snapshot was written."""
        self._host, self._arrived = value.pin_memory(), torch.cuda.Event()
