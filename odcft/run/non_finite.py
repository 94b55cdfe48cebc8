"""Whether numbers are finite."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number is finite. The host waits for the device once."""
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    return bool(torch.stack([tensor.isfinite().all() for tensor in floats]).all())


def finite_gradients(model: nn.Module) -> bool:
    """Whether every gradient is finite; after the backward pass of several ranks, the same on all. The host waits."""
    return bool(nn.utils.clip_grad_norm_(model.parameters(), math.inf).isfinite())
