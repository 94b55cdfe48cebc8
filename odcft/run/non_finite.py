"""Steps whose loss or gradient is not finite: skipped where the recipe allows it, the end of the run elsewhere."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from odcft.errors import OdcftError
from odcft.state import State


class NonFiniteGuard:
    """Watches over the steps of a run.

    Args:
        state: of the run.
        most: how many steps in a row may be skipped (`optim.skip_non_finite`); with 0 no gradient is looked at.
        out: the RUN.
        say: told of every step that is skipped.
    """

    def __init__(self, state: State, most: int, out: Path, say: Callable[[str], None]) -> None:
        self.state, self.most, self.out, self.say = state, most, out, say
        self._buffers: list[Tensor] = []

    def before_forward(self) -> None:
        """Keep what the forward pass changes (running statistics), if the step may be skipped."""
        self._buffers = [buffer.clone() for buffer in self.state.network.buffers()] if self.most else []

    def allows_step(self) -> bool:
        """Whether the gradients are fit for the optimizer. If steps may be skipped, the host waits for the device here.

        Raises:
            OdcftError: too many steps in a row were not.
        """
        state = self.state
        if not self.most or finite_gradients(state.network):
            state.skipped = 0
            return True
        state.skipped += 1
        if state.skipped > self.most:
            raise self.error(state.step)
        self.say(f"Warning     Step {state.step}: a gradient is not finite; the step is skipped.")
        for buffer, before in zip(state.network.buffers(), self._buffers, strict=True):
            buffer.copy_(before)
        return False

    def error(self, step: int) -> OdcftError:
        """What to say when the loss of a step, or a weight after it, is not finite."""
        lr = self.state.optimizer.param_groups[0]["lr"]
        return OdcftError(
            f"The loss is not finite at step {step} (learning rate {lr:.3g}). The states in "
            f"{self.out / 'checkpoints'} are from before, and finite. Start again with a lower rate "
            "(--set optim.lr=…) or a warm-up (--set optim.warmup_epochs=1), or allow single steps to be skipped "
            "(--set optim.skip_non_finite=3)."
        )


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number is finite. The host waits for the device once."""
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    return bool(torch.stack([tensor.isfinite().all() for tensor in floats]).all())


def finite_gradients(model: nn.Module) -> bool:
    """Whether every gradient is finite; after the backward pass of several ranks, the same on all. The host waits."""
    return bool(nn.utils.clip_grad_norm_(model.parameters(), math.inf).isfinite())
