"""The part of a checkpoint that fits a network: by names and shapes, under any prefix, through a few renames."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from odcft.backbone.checkpoint_files import Contents
from odcft.backbone.tensor_renames import RENAMES

# Where several state dicts hold the same backbone, the one whose path names the better copy wins: the exponential
# average over the live weights, the teacher over the student, the query over the key encoder.
_PREFERRED = (
    *("teacher", "target_encoder", "encoder_q", "online", "base_encoder", "backbone", "encoder", "trunk"),
    *("model", "state_dict"),
)
_SECOND_BEST = ("student", "encoder_k", "momentum", "optimizer", "predictor", "target_net")


@dataclass
class Match:
    """How a checkpoint covers a network."""

    tensors: dict[str, Tensor]  # by the network's names
    where: str  # path of the state dict in the file, and the prefix of its keys
    expected: int  # tensors the network has
    missing: list[str]  # names of the network the file does not have
    dropped: list[str]  # keys of the same state dict that are no part of the network: heads, copies
    unexpected: list[str]  # keys under the prefix that look like the network's, but have another shape
    misfits: dict[str, Tensor]  # the same by the network's names
    others: list[str]  # state dicts of the same file that were left out

    @property
    def share(self) -> float:
        """Of the network's tensors, how many were found: 0..1."""
        return len(self.tensors) / max(1, self.expected)


def views(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, str]]:
    """The ways to read a state dict's keys: name to key, each way that changes something."""
    seen: list[set[str]] = []
    for rename in RENAMES:
        names: dict[str, str] = {}
        for key in tensors:
            names.setdefault(rename(key), key)
        if set(names) not in seen:
            seen.append(set(names))
            yield names


def match(contents: Contents, network: Mapping[str, Tensor]) -> Match:
    """The part of a checkpoint that fits a network best.

    Args:
        contents: of the file.
        network: the network's state dict; only names and shapes are looked at.

    Returns:
        The match, possibly of nothing.
    """
    best: tuple[tuple[int, int, int], str, str, dict[str, str]] | None = None
    for path, tensors in contents.state_dicts.items():
        for number, names in enumerate(views(tensors)):
            prefixes = Counter(
                prefix
                for name, key in names.items()
                for prefix in _prefixes(name)
                if name[len(prefix) :] in network and fits(tensors[key], network[name[len(prefix) :]])
            )
            for prefix, count in prefixes.items():
                rank = (count, _preference(f"{path}/{prefix}"), -number)
                if best is None or rank > best[0]:
                    best = rank, path, prefix, names
    if best is None:
        return Match({}, "", len(network), list(network), [], [], {}, [])
    return _match_under(contents, *best[1:], network)


def _match_under(
    contents: Contents, path: str, prefix: str, names: dict[str, str], network: Mapping[str, Tensor]
) -> Match:
    tensors = contents.state_dicts[path]
    under = {name[len(prefix) :]: key for name, key in names.items() if name.startswith(prefix)}
    used = {name: under[name] for name, own in network.items() if name in under and fits(tensors[under[name]], own)}
    # Checkpoints older than torch 0.4.1 have no batch counters, and nothing needs them.
    counters = any(name.endswith("num_batches_tracked") for name in under)
    expected = [name for name in network if counters or not name.endswith("num_batches_tracked")]
    wrong = {name: key for name, key in under.items() if name in network and name not in used}
    keys = set(used.values())
    # The prefix as it stands in the file, not as a rename has left it.
    example = next(iter(used))
    if used[example].endswith(example):
        prefix = used[example][: -len(example)]
    return Match(
        tensors={name: tensors[key].reshape(network[name].shape) for name, key in used.items()},
        where="/".join(part for part in (path, prefix) if part) or "the file itself",
        expected=len(expected),
        missing=[name for name in expected if name not in used],
        dropped=[key for key in tensors if key not in keys and key not in wrong.values()],
        unexpected=list(wrong.values()),
        misfits={name: tensors[key] for name, key in wrong.items()},
        others=[other for other in contents.state_dicts if other != path],
    )


def fits(tensor: Tensor, own: Tensor) -> bool:
    """Whether a tensor has the shape of the network's own; a linear layer may stand for a convolution of its size."""
    if tensor.shape == own.shape:
        return True
    linear = tensor.ndim == 2 and own.ndim == 4 and tensor.shape[0] == own.shape[0]
    return linear and tensor.numel() == own.numel()


def _prefixes(key: str) -> Iterator[str]:
    yield ""
    for place, letter in enumerate(key):
        if letter == ".":
            yield key[: place + 1]


def _preference(where: str) -> int:
    if any(bad in where for bad in _SECOND_BEST):
        return -1
    if re.search(r"(^|[/._])ema($|[/._])", where):
        return 1 + len(_PREFERRED)
    return max((len(_PREFERRED) - rank for rank, good in enumerate(_PREFERRED) if good in where), default=0)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that hold NaN or infinity."""
    return [name for name, tensor in tensors.items() if not all(map(math.isfinite, _ends(tensor)))]


def constant(tensors: Mapping[str, Tensor]) -> list[str]:
    """Which weights are all the same number, and which."""
    found = []
    for name, tensor in tensors.items():
        several = tensor.ndim > 1 and len(tensor) * tensor.shape[-1] > 1
        if several and not name.endswith("token") and len(ends := set(_ends(tensor))) == 1:
            found.append(f"{name} is all {ends.pop():g}")
    return found


def _ends(tensor: Tensor) -> tuple[float, ...]:
    """The least and the largest number of a tensor of fractions that has any."""
    if not tensor.is_floating_point() or not tensor.numel():
        return ()
    low, high = torch.aminmax(tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float())
    return float(low), float(high)
