"""Find timm's networks whose tensors have the shapes of a file's, whatever their names.

For each network `timm_index.json` has the number of its tensors and two sums of hashes of their shapes: over the first
half and over the second. A sum does not depend on order, so files that are sorted by name are found too; a half is
found where the other half differs, which tells what a damaged file was meant to be.
"""

import json
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

MAX_CHILDREN = 40  # of a prefix, of which any two may be heads that stand between the layers
_BITS = 32

Summary = tuple[int, int, int]  # number of tensors, sum over the first half, sum over the second


def is_counter(tensor: Tensor) -> bool:
    """Whether this is a batch norm's count of batches, or another single integer."""
    return tensor.ndim == 0 and not tensor.is_floating_point()


def general_shape(tensor: Tensor) -> tuple[int, ...]:
    """A tensor's shape without what the input changes: channels of a first convolution, length of an embedding.

    Linear layers and convolutions of one pixel have the same.
    """
    shape = tuple(tensor.shape)
    if len(shape) == 4 and shape[1] < 8:
        return (shape[0], *shape[2:])
    if len(shape) == 4 and shape[2:] == (1, 1):
        return shape[:2]
    return shape


def _depends_on_input(tensor: Tensor) -> bool:
    """Whether this may be a position embedding or a class token, (1, N, C)."""
    return tensor.ndim == 3 and tensor.shape[0] == 1


def shape_hashes(tensors: Iterable[Tensor]) -> list[int]:
    """Hashes of shapes, in order; none for counters and for tensors that depend on the image size."""
    kept = (tensor for tensor in tensors if not is_counter(tensor) and not _depends_on_input(tensor))
    return [_hash(general_shape(tensor)) for tensor in kept]


@cache
def _hash(shape: tuple[int, ...]) -> int:
    return zlib.crc32("x".join(map(str, shape)).encode())


def summary(network: Mapping[str, Tensor]) -> Summary:
    """What the index keeps of a network's shapes."""
    hashes = shape_hashes(network.values())
    half = len(hashes) // 2
    return len(hashes), sum(hashes[:half]) % (1 << _BITS), sum(hashes[half:]) % (1 << _BITS)


@cache
def _entries() -> dict[str, list[Any]]:
    """By timm name: its summary, then networks of the same tensors that compute something else."""
    index = json.loads((Path(__file__).parent / "timm_index.json").read_text())
    return {name: entry[-1] for name, entry in index.items()}


def twins(name: str) -> list[str]:
    """timm's networks that have the same tensors as this one and compute something else."""
    return list(_entries().get(name, [0, 0, 0])[3:])


def nearby_networks(
    state_dicts: Iterable[Mapping[str, Tensor]], further: Mapping[str, Summary] | None = None
) -> tuple[list[str], list[str]]:
    """Networks whose shapes a file has, the largest first.

    Args:
        state_dicts: the file's tensors, in order.
        further: summaries of networks that are not in the index.

    Returns:
        Those with all their shapes in a row or under one prefix, and those with half of them.
    """
    known = {name: tuple(entry[:3]) for name, entry in _entries().items()} | dict(further or {})
    whole: dict[int, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    halves: dict[int, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, (count, first, second) in known.items():
        whole[count][(first + second) % (1 << _BITS)].append(name)
        halves[count // 2][first].append(name)
        halves[count - count // 2][second].append(name)
    complete: set[str] = set()
    half: set[str] = set()
    for tensors in state_dicts:
        hashes = shape_hashes(tensors.values())
        complete |= _in_a_row(hashes, whole)
        half |= _in_a_row(hashes, halves)
        for count, total in _sums_of_prefixes(tensors):
            complete |= set(whole.get(count, {}).get(total, ()))
    by_size = sorted(half | complete, key=lambda name: (-known[name][0], len(name), name))
    return [name for name in by_size if name in complete], [name for name in by_size if name not in complete]


def _in_a_row(hashes: list[int], wanted: Mapping[int, Mapping[int, list[str]]]) -> set[str]:
    """Networks with a sum that is that of as many successive tensors."""
    sums = np.concatenate([[0], np.cumsum(np.array(hashes, dtype=np.uint64))]).astype(np.uint64)
    found: set[str] = set()
    for count, names in wanted.items():
        if 0 < count <= len(hashes):
            windows = (sums[count:] - sums[:-count]) & np.uint64((1 << _BITS) - 1)
            for total in set(names) & set(windows.tolist()):
                found |= set(names[total])
    return found


def _sums_of_prefixes(tensors: Mapping[str, Tensor]) -> Iterator[tuple[int, int]]:
    """For each prefix, how many tensors are under it and the sum of their hashes: of all, and without one or two parts.

    A head, a queue or a token may stand between the layers.
    """
    own: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    for key, tensor in tensors.items():
        if not (hashes := shape_hashes([tensor])):
            continue
        parts = key.split(".")
        for depth in range(len(parts)):
            children = own[".".join(parts[:depth])]
            count, total = children.get(parts[depth], (0, 0))
            children[parts[depth]] = count + 1, total + hashes[0]
    for children in own.values():
        count, total = (sum(one) for one in zip(*children.values(), strict=True))
        for left_out in range(3 if len(children) <= MAX_CHILDREN else 1):
            for some in combinations(children.values(), left_out):
                yield count - sum(one for one, _ in some), (total - sum(one for _, one in some)) % (1 << _BITS)
