"""How exactly numbers are multiplied: bfloat16 where a device has it, TF32 where it is allowed, neither where labels
are decided."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 faster than float32. A GPU before Ampere (V100, T4) only emulates it."""
    if device.type == "cuda":
        # An AMD GPU calls its generation gfx90a or so; all that torch still supports have it.
        return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
    return torch.cpu._is_avx512_bf16_supported()


def allow_tf32(allowed: bool) -> None:
    """Whether float32 products on a GPU, and cuDNN's convolutions, may be rounded to TF32."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def exact_products() -> Iterator[None]:
    """Within, float32 products are float32's own: rounding must not decide between two near centroids."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
