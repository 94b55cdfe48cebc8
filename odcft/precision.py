"""Precision of matrix products: which devices have bfloat16, when TF32 is allowed, full float32 to choose labels."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 faster than float32. A GPU before Ampere (V100, T4) only emulates it."""
    if device.type == "cuda":
        # AMD names its generations differently (gfx90a, …); every one that torch still supports has bfloat16.
        return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
    return torch.cpu._is_avx512_bf16_supported()


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
