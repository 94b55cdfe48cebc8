"""Steps whose loss or gradient is not finite: skipped if the recipe allows it, otherwise the run ends with an error.

In float16 a gradient may overflow because the loss is multiplied by too large a factor (precision.LossScale). Such a
step is skipped, too, but it is no fault as long as the factor can be lowered.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from odcft.errors import OdcftError
from odcft.precision import finite_gradients
from odcft.state import State


class NonFiniteGuard:
    """Checks the gradients of every step, and skips the step if they are not finite.

    Args:
        state: of the run.
        max_skipped: how many steps in a row may be skipped (`optim.skip_non_finite`); with 0 gradients are not checked.
        out: the RUN folder.
        say: called with a warning for every skipped step.
    """

    def __init__(self, state: State, max_skipped: int, out: Path, say: Callable[[str], None]) -> None:
        self.state, self.max_skipped, self.out, self.say = state, max_skipped, out, say
        self._buffers: list[Tensor] = []

    def before_forward(self) -> None:
        """Keep a copy of what the forward pass changes (running statistics) if the step may be skipped."""
        may_skip = self.max_skipped or self.state.loss_scale.used
        self._buffers = [buffer.clone() for buffer in self.state.network.buffers()] if may_skip else []

    def allows_step(self) -> bool:
        """Whether the optimizer may take its step. If steps may be skipped, the host waits for the device here.

        In float16 the gradients are divided by the factor of the loss here.

        Raises:
            OdcftError: too many steps in a row had gradients that are not finite.
        """
        state, scale = self.state, self.state.loss_scale
        scale.unscale_(state.network)
        if not (self.max_skipped or scale.used) or finite_gradients(state.network):
            state.skipped = 0
            scale.step_was_finite()
            return True
        if not scale.lower():  # else it is no fault
            state.skipped += 1
            if state.skipped > self.max_skipped:
                raise self.error(state.step)
            self.say(f"Warning     Step {state.step}: a gradient is not finite; the step is skipped.")
        for buffer, before in zip(state.network.buffers(), self._buffers, strict=True):
            buffer.copy_(before)
        return False

    def judged(self, loss: Tensor, step_taken: bool) -> Tensor:
        """The loss that the ranks judge the step by: 0 if it was skipped and that is allowed."""
        return loss if step_taken or not self.max_skipped else torch.zeros_like(loss)

    def error(self, step: int) -> OdcftError:
        """The error for a step whose loss, or a weight after it, is not finite."""
        lr = self.state.optimizer.param_groups[0]["lr"]
        return OdcftError(
            f"The loss is not finite at step {step} (learning rate {lr:.3g}). The states in "
            f"{self.out / 'checkpoints'} are from before that step, and finite. Start again with a lower learning rate "
            "(--set optim.lr=…) or a warm-up (--set optim.warmup_epochs=1), or allow single steps to be skipped "
            "(--set optim.skip_non_finite=3)."
        )


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number is finite. The host waits for the device once."""
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    return bool(torch.stack([tensor.isfinite().all() for tensor in floats]).all())
