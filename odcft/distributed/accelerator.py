"""Which kind of device this process computes on (`--accelerator`), and what is different about it.

NVIDIA's and AMD's GPUs are `cuda`, Intel's `xpu`, Apple's `mps`. `auto` takes a GPU that is `cuda` or `xpu`; Apple's,
which lacks numbers of 64 bits, only on request.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from odcft.errors import OdcftError

KINDS = ("auto", "cpu", "cuda", "mps", "xpu")
AUTOMATIC = ("cuda", "xpu")
BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}  # of torch.distributed
ASYNCHRONOUS = ("cuda", "xpu")  # the host can go on while a result is copied to it

_chosen = "auto"


def choose(kind: str) -> None:
    """Compute on this kind of device from now on, in this process.

    Raises:
        OdcftError: there is no such kind, or this machine or this build of torch does not have it.
    """
    global _chosen
    if kind not in KINDS:
        raise OdcftError(f"--accelerator {kind}: no such kind. Choose one of {', '.join(KINDS)}.")
    if kind not in ("auto", "cpu") and not is_available(kind):
        there = [name for name in KINDS[1:] if name == "cpu" or is_available(name)]
        raise OdcftError(
            f"--accelerator {kind}: this machine has no such device, or torch {torch.__version__} was built without "
            f"it. Here is: {', '.join(there)}."
        )
    _chosen = kind


@contextmanager
def chosen(kind: str) -> Iterator[None]:
    """Within this context compute on this kind of device; errors as `choose`."""
    global _chosen
    before = _chosen
    choose(kind)
    try:
        yield
    finally:
        _chosen = before


def kind() -> str:
    """The kind of device this process computes on: cpu, cuda, mps or xpu."""
    if _chosen != "auto":
        return _chosen
    return next((name for name in AUTOMATIC if is_available(name)), "cpu")


def is_available(name: str) -> bool:
    """Whether this machine has a device of this kind that torch can use."""
    module = torch.backends.mps if name == "mps" else _module(name)
    return module is not None and bool(module.is_available())


def device_count() -> int:
    """How many devices of this kind there are; for a CPU 1."""
    return 1 if kind() == "cpu" else int(_module(kind()).device_count())


def set_device(device: torch.device) -> None:
    """Make this the device that torch uses where none is named."""
    if device.type in BACKENDS and device.type != "cpu":
        _module(device.type).set_device(device)


def synchronize() -> None:
    """Wait until the device has done what it was asked to do."""
    if kind() != "cpu":
        _module(kind()).synchronize()


def new_event() -> Any:
    """An event, which the host can wait for once the device has got there."""
    return _module(kind()).Event()


def free_memory() -> int | None:
    """Bytes that are free on the device; None for a CPU, and where nothing says it."""
    if kind() == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    read = getattr(_module(kind()), "mem_get_info", None) if kind() != "cpu" else None
    return int(read()[0]) if read is not None else None


def most_memory_used() -> int:
    """Bytes of the device that this process has reserved at most; 0 for a CPU, and where nothing says it."""
    read = getattr(_module(kind()), "max_memory_reserved", None) if kind() != "cpu" else None
    return int(read()) if read is not None else 0


def _module(name: str) -> Any:
    """The module of torch for this kind of device, or None; torch.accelerator has only a part of what they have."""
    return getattr(torch, name, None)
