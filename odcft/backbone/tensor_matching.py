"""Find the part of a checkpoint that fits a network by names and shapes, under any prefix and through a few renames."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from odcft.backbone.checkpoint_files import Contents
from odcft.backbone.tensor_renames import RENAMES

# Where several state dicts hold the same backbone, the path says which is the better copy: the moving average beats the
# live weights, the teacher the student, the query encoder the key encoder, and BYOL's online network its target.
_PREFERRED = (
    *("teacher", "online", "target_encoder", "encoder_q", "base_encoder", "backbone", "encoder", "trunk"),
    *("model", "state_dict"),
)
_SECOND_BEST = ("student", "encoder_k", "momentum", "optimizer", "predictor", "target_net", "feature_extractor_teacher")


@dataclass
class Match:
    """How a checkpoint covers a network."""

    tensors: dict[str, Tensor]  # by the network's names
    where: str  # path of the state dict in the file, and the prefix of its keys
    expected: int  # number of tensors in the network
    missing: list[str]  # names in the network that the file lacks
    dropped: list[str]  # keys of the same state dict that do not belong to the network: heads, copies
    unexpected: list[str]  # keys under the prefix whose names fit the network and whose shapes do not
    misfits: dict[str, Tensor]  # the tensors of `unexpected`, by the network's names
    others: list[str]  # state dicts of the same file that were left out
    notes: list[str] = field(default_factory=list)  # how it was recognised, unless by names
    keys: dict[str, str] = field(default_factory=dict)  # in the state dict, by the network's names
    nearest: str = ""  # if it is incomplete: the network whose shapes come closest, and what differs

    @property
    def coverage(self) -> float:
        """Share of the network's tensors that were found, 0..1."""
        return len(self.tensors) / max(1, self.expected)


def renamings(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, str]]:
    """Yield each way to rename a state dict's keys that gives new names: new name to key."""
    seen: list[set[str]] = []
    for rename in RENAMES:
        names: dict[str, str] = {}
        for key in tensors:
            names.setdefault(rename(key), key)
        if set(names) not in seen:
            seen.append(set(names))
            yield names


def match(contents: Contents, network: Mapping[str, Tensor]) -> Match:
    """Find the part of a checkpoint that fits a network best.

    Args:
        contents: what the file holds.
        network: the network's state dict; only names and shapes count.

    Returns:
        The match, which may be empty.
    """
    best: tuple[tuple[int, int, int], str, str, dict[str, str]] | None = None
    for count, number, path, prefix, names in _places(contents, network):
        rank = (count, preference(f"{path}/{prefix}"), -number)
        if best is None or rank > best[0]:
            best = rank, path, prefix, names
    if best is None:
        return Match({}, "", len(network), list(network), [], [], {}, [])
    return _match_under(contents, *best[1:], network)


def complete_matches(contents: Contents, network: Mapping[str, Tensor], count: int) -> Iterator[Match]:
    """Yield the match of every place in a file where at least `count` of the network's tensors fit."""
    for fitting, _, path, prefix, names in _places(contents, network):
        if fitting >= count:
            yield _match_under(contents, path, prefix, names, network)


def _places(contents: Contents, network: Mapping[str, Tensor]) -> Iterator[tuple[int, int, str, str, dict[str, str]]]:
    """Yield how many tensors fit at each place: the count, the renaming's number, path, prefix, and renamed keys."""
    for path, tensors in contents.state_dicts.items():
        for number, names in enumerate(renamings(tensors)):
            fitting = Counter(
                prefix
                for name, key in names.items()
                for prefix in prefixes(name)
                if name[len(prefix) :] in network and fits(tensors[key], network[name[len(prefix) :]])
            )
            for prefix, count in fitting.items():
                yield count, number, path, prefix, names


def _match_under(
    contents: Contents, path: str, prefix: str, names: dict[str, str], network: Mapping[str, Tensor]
) -> Match:
    """The match of one state dict, under one prefix and renaming."""
    tensors = contents.state_dicts[path]
    under = {name[len(prefix) :]: key for name, key in names.items() if name.startswith(prefix)}
    used = {name: under[name] for name, own in network.items() if name in under and fits(tensors[under[name]], own)}
    # Checkpoints of torch before 0.4.1 have no batch counters, and nothing needs them.
    counters = any(name.endswith("num_batches_tracked") for name in under)
    expected = [name for name in network if counters or not name.endswith("num_batches_tracked")]
    wrong = {name: key for name, key in under.items() if name in network and name not in used}
    keys = set(used.values())
    # Report the prefix as the file has it, not as a rename left it.
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
        keys=used,
    )


def fits(tensor: Tensor, own: Tensor) -> bool:
    """Whether a tensor fits the network's own in shape; a linear layer's also fits a convolution of as many numbers."""
    if tensor.shape == own.shape:
        return True
    linear = tensor.ndim == 2 and own.ndim == 4 and tensor.shape[0] == own.shape[0]
    return linear and tensor.numel() == own.numel()


def prefixes(key: str) -> Iterator[str]:
    """Yield every prefix of a key that ends at a dot, the empty one first."""
    yield ""
    for place, letter in enumerate(key):
        if letter == ".":
            yield key[: place + 1]


def preference(where: str) -> int:
    """How much a copy of a backbone at this path is preferred to others; -1 for the second-best copies."""
    if any(bad in where for bad in _SECOND_BEST):
        return -1
    if re.search(r"(^|[/._])ema($|[/._])", where):
        return 1 + len(_PREFERRED)
    return max((len(_PREFERRED) - rank for rank, good in enumerate(_PREFERRED) if good in where), default=0)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that hold NaN or infinity."""
    return [name for name, tensor in tensors.items() if not all(map(math.isfinite, _extremes(tensor)))]


def constant(tensors: Mapping[str, Tensor]) -> list[str]:
    """Describe weights that are all the same number, and say which number."""
    found = []
    for name, tensor in tensors.items():
        several = tensor.ndim > 1 and len(tensor) * tensor.shape[-1] > 1
        if several and not name.endswith("token") and len(values := set(_extremes(tensor))) == 1:
            found.append(f"{name} is all {values.pop():g}")
    return found


def _extremes(tensor: Tensor) -> tuple[float, ...]:
    """The smallest and the largest number of a floating-point tensor; nothing for other or empty tensors."""
    if not tensor.is_floating_point() or not tensor.numel():
        return ()
    low, high = torch.aminmax(tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float())
    return float(low), float(high)
