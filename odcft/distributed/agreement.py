"""What all ranks agree on in a step, without making the host wait for an accelerator."""

from typing import NamedTuple

import torch
from torch import Tensor

from odcft.distributed import dist, stop_signals
from odcft.distributed.delayed_reader import DelayedReader


class Agreed(NamedTuple):
    """The same answers on every rank, in the same step."""

    broken: bool  # a loss is not finite
    stop: bool  # a rank was asked to stop
    save: bool  # a state is due by rank 0's clock


class Agreement:
    """Shares, in every step, what one rank alone knows and all must act on.

    On a CPU the answer is about this step, on an accelerator about the step before.
    """

    def __init__(self) -> None:
        self._reader = DelayedReader()

    def after_step(self, loss: Tensor, save: bool) -> Agreed:
        """Tell the other ranks about this step, and return what all agree on.

        Args:
            loss: this rank's, on the device; zero if the step was skipped.
            save: whether a state is due by this rank's clock; only rank 0's counts.
        """
        flags = torch.stack(
            [
                loss.isfinite().logical_not().float(),
                torch.full((), float(bool(stop_signals.stop_requested())), device=loss.device),
                torch.full((), float(save and dist.rank() == 0), device=loss.device),
            ]
        )
        dist.all_sum_(flags)
        answer = self._reader.read(flags)
        return Agreed(*map(bool, answer.tolist())) if answer is not None else Agreed(False, False, False)

    def delay(self, device: torch.device) -> int:
        """How many steps late the answer is."""
        return self._reader.delay(device)


def asked_anywhere(device: torch.device) -> bool:
    """Whether any rank was asked to stop. The host waits for the device, and for all ranks."""
    dist.wait_for_all()
    asked = torch.full((), float(bool(stop_signals.stop_requested())), device=device)
    dist.all_sum_(asked)
    return bool(asked)
