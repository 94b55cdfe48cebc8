"""Numbers of fewer bits: which devices have bfloat16 or float16, when TF32 is allowed, and where float32 is exact.

Training in float16 multiplies the loss by a factor, so that small gradients do not become zero.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

FIRST_FACTOR, GOOD_STEPS = 2.0**16, 2000  # of LossScale: as in torch's GradScaler


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 faster than float32. A GPU before Ampere (V100, T4) only emulates it."""
    if device.type == "cuda":
        # AMD names its generations differently (gfx90a, …); every one that torch still supports has bfloat16.
        return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu":  # Intel's GPUs have it; Apple's not before the M2, and nothing says which it is
        return device.type == "xpu"
    return torch.cpu._is_avx512_bf16_supported()


def has_fast_float16(device: torch.device) -> bool:
    """Whether a device multiplies float16 faster than float32: a GPU with tensor cores (V100, T4 and later)."""
    return device.type == "cuda" and (torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 7)


def finite_gradients(model: nn.Module) -> bool:
    """Whether every gradient is finite; after the backward pass of several ranks, the same on all. The host waits."""
    return bool(nn.utils.clip_grad_norm_(model.parameters(), math.inf).isfinite())


class LossScale:
    """The factor by which the loss is multiplied in float16; 1 in other precisions, where nothing is done.

    As torch's GradScaler does it: halved when a gradient overflows, doubled after 2,000 steps without. Here the guard
    against non-finite gradients decides for both, with one read of the device, and the state is two plain numbers.
    """

    def __init__(self, used: bool) -> None:
        self.used, self.factor, self.good_steps = used, FIRST_FACTOR if used else 1.0, 0

    @torch.no_grad()
    def unscale_(self, model: nn.Module) -> None:
        """Divide the gradients by the factor."""
        if self.used:
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            torch._foreach_mul_(gradients, 1 / self.factor)

    def allows_step(self, model: nn.Module) -> bool:
        """Unscale the gradients, and adapt the factor to them; return whether the optimizer may take its step.

        The host waits for the device, but only in float16; in other precisions every step is allowed.
        """
        self.unscale_(model)
        if not self.used or finite_gradients(model):
            self.step_was_finite()
            return True
        self.lower()
        return False

    def step_was_finite(self) -> None:
        """Count a step that was taken; after enough of them, try a larger factor."""
        self.good_steps += 1
        if self.used and self.good_steps >= GOOD_STEPS:
            self.factor, self.good_steps = 2 * self.factor, 0

    def lower(self) -> bool:
        """Halve the factor because a gradient is not finite; return whether that can help (it is used, and above 1)."""
        if not self.used or self.factor <= 1:
            return False
        self.factor, self.good_steps = self.factor / 2, 0
        return True

    def stored(self) -> dict[str, float]:
        """What a state keeps, in JSON."""
        return {"factor": self.factor, "good_steps": self.good_steps} if self.used else {}

    def restore(self, stored: dict[str, float]) -> None:
        """Put back what was `stored`."""
        if self.used and stored:
            self.factor, self.good_steps = float(stored["factor"]), int(stored["good_steps"])


def allow_tf32(allowed: bool) -> None:
    """Allow or forbid rounding float32 products on a GPU, including cuDNN's convolutions, to TF32."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def tf32_restored() -> Iterator[None]:
    """After this context, float32 products are rounded as they were before."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextmanager
def exact_products() -> Iterator[None]:
    """Within this context float32 products have full precision: rounding must not decide between near centroids."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
