"""What the tables of names of other libraries share."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

Tensors = dict[str, Tensor]


def renamed(tensors: Mapping[str, Tensor], *table: tuple[str, Any]) -> Tensors:
    """The tensors with every line of a table of regular expressions applied to their names, in order."""
    named: Tensors = {}
    for name, tensor in tensors.items():
        for pattern, replacement in table:
            name = re.sub(pattern, replacement, name)
        named[name] = tensor
    return named


def with_separate_biases(named: Tensors) -> Tensors:
    """The biases of query and value on their own; that of the keys counts for nothing in these networks."""
    split: Tensors = {}
    for name, tensor in named.items():
        if name.endswith(".attn.qkv.bias") and tensor.ndim == 1 and len(tensor) % 3 == 0:
            start = name.removesuffix("qkv.bias")
            split[f"{start}q_bias"], _, split[f"{start}v_bias"] = tensor.chunk(3)
        else:
            split[name] = tensor
    return split
