"""Recognise a backbone whose tensors have unknown names: by their shapes, their order and how they group.

PyTorch writes tensors in the order in which a network's layers were made, so a network shows as a row of shapes,
whatever its tensors are called. Heads, queues and copies may stand before, after and, as whole groups, between them.
Names still say what belongs together: tensors that share a prefix are of one layer. A safetensors file is sorted by
name: there layers are found by their shapes, and those of equal shapes by the numbers in their names.

Legend: N tensors in a network, S in a state dict.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from odcft.backbone.arch_arguments import Kwargs, arguments_explaining
from odcft.backbone.checkpoint_files import Contents
from odcft.backbone.equal_networks import without_anti_aliasing
from odcft.backbone.layer_order import canonical_order, in_network_order, is_numbered
from odcft.backbone.non_timm_networks import NETWORKS, shapes
from odcft.backbone.structure_index import general_shape, is_counter, nearby_networks, summary, twins
from odcft.backbone.tensor_matching import Match, fits, preference
from odcft.errors import OdcftError

MAX_COMPLETE = 24  # networks compared in full whose shapes are all in the file
MAX_NEAR = 6  # and of which only half are
MAX_CELLS = 1 << 26  # N x S of a comparison
MIN_LAYERS = 8  # tensors of a network that may be recognised without names

# What torch calls the tensors of a layer: where a file has these words, they must agree with the network's.
_LEAVES = {"weight", "bias", "running_mean", "running_var"}


@dataclass
class Structure:
    """What a file's shapes say about its backbone."""

    fitting: tuple[str, Kwargs, Match] | None = None  # the network it holds
    equal: tuple[str, ...] = ()  # networks that fit equally well, if there are several
    nearest: str = ""  # the network that comes closest, and what differs
    near: tuple[str, ...] = ()  # networks that have half of their shapes in the file


class _Unordered(Exception):
    """Layers of equal shapes whose order nothing tells; the message names two of them."""


def recognise_structure(contents: Contents, arch: str | None, kwargs: Mapping[str, Any]) -> Structure:
    """Find the network that a file's tensors have the shapes of, in full.

    Args:
        contents: what the file holds.
        arch: the only network to try, if the user or the file names one.
        kwargs: arguments the user or the file gives for it.

    Returns:
        The network, or those that fit equally, or the nearest. A few arguments are inferred (`arguments_explaining`).
    """
    state_dicts = {
        path: canonical_order(tensors, sort=contents.container == "safetensors")
        for path, tensors in contents.state_dicts.items()
    }
    if arch is None:
        complete, half = nearby_networks(state_dicts.values(), _own_summaries())
    else:
        complete, half = [arch], []
    found: list[tuple[str, Kwargs, Match]] = []
    nearest: list[tuple[float, int, str]] = []
    for name in [*complete[:MAX_COMPLETE], *half[:MAX_NEAR]]:
        try:
            network = shapes(name, **kwargs)
        except OdcftError:  # not every network takes the user's arguments
            continue
        if found and len(network) < max(match.expected for _, _, match in found):
            break
        try:
            if fitting := _fit(contents, state_dicts, name, network, dict(kwargs)):
                found.append((name, *fitting))
            else:
                nearest.append(_difference(state_dicts, name, network))
        except _Unordered as why:
            nearest.append((1.0, len(network), f"{name}, with tensors of all its shapes, but {why}"))
    structure = _decide([arch, *contents.arch_hints] if arch else contents.arch_hints, found, nearest)
    structure.near = (*complete[:MAX_NEAR], *half[:MAX_NEAR])
    return structure


@cache
def _own_summaries() -> dict[str, tuple[int, int, int]]:
    """Summaries of the networks that timm lacks and that are large enough to be told by their shapes."""
    return {name: summary(shapes(name)) for name in NETWORKS}


def _decide(
    hints: Sequence[str | None], found: list[tuple[str, Kwargs, Match]], nearest: list[tuple[float, int, str]]
) -> Structure:
    """Choose among networks that fit: the largest, if it is the only one of its size or a hint names it."""
    if not found:
        return Structure(nearest=_nearest(nearest))
    most = max(match.expected for _, _, match in found)
    best = [one for one in found if one[2].expected == most]
    fewest = min(len(kwargs) for _, kwargs, _ in best)
    best = _one_of_each_size([one for one in best if len(one[1]) == fewest])
    names = dict.fromkeys(name for first, _, _ in best for name in (first, *twins(first)))
    by_hint = [(hint, *one[1:]) for hint in hints if hint for one in best if hint in (one[0], *twins(one[0]))][:1]
    plain = dict.fromkeys(without_anti_aliasing(name) for name in names)
    if by_hint:
        best, names = by_hint, {by_hint[0][0]: None}
    elif len(plain) > 1:
        return Structure(equal=tuple(names))
    name, kwargs, match = next((one for one in best if one[0] in plain), best[0])
    match.notes.append(
        "recognised by the shapes and order of its tensors, names unknown: where layers have equal shapes, "
        "the file's order tells them apart"
    )
    if others := [other for other in names if other != name]:
        match.notes.append(
            f"the same tensors also fit {', '.join(others)}: if that is the right network, pass --arch NAME"
        )
    if "num_heads" not in kwargs and any(".attn." in own for own in match.tensors):
        match.notes.append(
            f"shapes do not tell the number of attention heads, so it is that of {name}: "
            "if the network has another, pass --arch-args num_heads=N"
        )
    return Structure((name, kwargs, match))


def _one_of_each_size(found: list[tuple[str, Kwargs, Match]]) -> list[tuple[str, Kwargs, Match]]:
    """Those that fit, without the same networks for images of other sizes, where the file's size is another still."""
    kept: dict[str, tuple[str, Kwargs, Match]] = {}
    for name, kwargs, match in found:
        stem = re.sub(r"_\d+$", "", name) if "img_size" in kwargs else name
        other = kept.setdefault(stem, (name, kwargs, match))
        if list(other[2].tensors) != list(match.tensors):
            kept[name] = (name, kwargs, match)
    return list(kept.values())


def _nearest(nearest: list[tuple[float, int, str]]) -> str:
    """The network that comes closest in words, and the names of those that come as close."""
    if not nearest:
        return ""
    first, *others = sorted(nearest, reverse=True)
    as_close = [text.split(",")[0] for share, _, text in others if share == first[0]]
    return first[-1] + (f" (as close: {', '.join(as_close[:MAX_NEAR])})" if as_close else "")


def _fit(
    contents: Contents,
    state_dicts: Mapping[str, Mapping[str, Tensor]],
    arch: str,
    network: dict[str, Tensor],
    kwargs: Kwargs,
) -> tuple[Kwargs, Match] | None:
    """Fit a network to the best of the parts of a file that have its shapes."""
    candidates: list[tuple[int, str, list[str]]] = []
    own = {name: tensor for name, tensor in network.items() if not name.endswith("num_batches_tracked")}
    unordered: _Unordered | None = None
    for path, tensors in state_dicts.items():
        plain = {key: tensor for key, tensor in tensors.items() if not is_counter(tensor)}
        if len(own) < MIN_LAYERS or len(plain) < len(own) or len(own) * len(plain) > MAX_CELLS:
            continue
        try:
            rows = list(_rows(contents.container == "safetensors", plain, arch, own))
        except _Unordered as why:
            unordered = why
            continue
        candidates += [(preference(f"{path}/{_prefix(row)}"), path, row) for row in rows]
    if not candidates:
        if unordered:
            raise unordered
        return None
    _, path, row = max(candidates, key=lambda one: one[0])
    tensors = contents.state_dicts[path]
    named = dict(zip(own, row, strict=True))
    for name, key in named.items():
        if not fits(tensors[key], own[name]):
            kwargs = {**kwargs, **arguments_explaining(arch, network, name, tensors[key])}
    try:
        network = shapes(arch, **kwargs)
    except OdcftError:  # not all of timm's networks take these arguments
        return None
    if not all(fits(tensors[key], network[name]) for name, key in named.items()):
        return None
    return kwargs, _as_match(contents, path, list(state_dicts[path]), network, named)


def _as_match(
    contents: Contents, path: str, keys: list[str], network: Mapping[str, Tensor], named: dict[str, str]
) -> Match:
    """The match of a network with the keys found for its tensors, and with the batch counters beside them.

    Args:
        contents, path: the file, and which of its state dicts.
        keys: those of the state dict, in order.
        network, named: the network's state dict, and the key of each of its tensors.
    """
    tensors = contents.state_dicts[path]
    if any(is_counter(tensor) for tensor in tensors.values()):
        place = {key: number for number, key in enumerate(keys)}
        for name in network:
            if name.endswith("num_batches_tracked"):
                variance = named[name.replace("num_batches_tracked", "running_var")]
                if counter := _counter_beside(tensors, keys, place[variance]):
                    named[name] = counter
    counted = any(name.endswith("num_batches_tracked") for name in named)
    expected = [name for name in network if counted or not name.endswith("num_batches_tracked")]
    used = set(named.values())
    prefix = _prefix(list(named.values()))
    return Match(
        tensors={name: tensors[named[name]].reshape(network[name].shape) for name in expected if name in named},
        where="/".join(part for part in (path, prefix) if part) or "the file itself",
        expected=len(expected),
        missing=[name for name in expected if name not in named],
        dropped=[key for key in keys if key not in used],
        unexpected=[],
        misfits={},
        others=[other for other in contents.state_dicts if other != path],
        keys={name: named[name] for name in expected if name in named},
    )


def _counter_beside(tensors: Mapping[str, Tensor], keys: list[str], place: int) -> str | None:
    """The batch counter that belongs to the variance at a place: the next tensor, or the only one of its layer."""
    layer = _layer(keys[place])
    for key in keys[place + 1 : place + 2]:
        if is_counter(tensors[key]) and _layer(key) == layer:
            return key
    near = keys[max(0, place - 5) : place + 6]
    beside = [key for key in near if is_counter(tensors[key]) and layer and _layer(key) == layer]
    return beside[0] if len(beside) == 1 else None


def _layer(key: str) -> str:
    return key.rpartition(".")[0]


def _prefix(keys: list[str]) -> str:
    """The prefix that keys share, up to a dot."""
    first, last = min(keys), max(keys)
    same = next((place for place, letter in enumerate(first) if last[place : place + 1] != letter), len(first))
    return first[: first.rfind(".", 0, same) + 1]


def _rows(is_sorted: bool, tensors: Mapping[str, Tensor], arch: str, network: dict[str, Tensor]) -> Iterator[list[str]]:
    """Yield each part of a state dict that has a network's shapes: its keys in the network's order.

    Raises:
        _Unordered: a part has the shapes, but nothing tells its layers apart.
    """
    keys = list(tensors)
    if is_sorted and not is_numbered(keys):
        rows = _rows_of_sorted(tensors, network)
    else:
        table = _comparison(tensors, arch, network)
        rows = [[keys[start + n] for n in range(len(network))] for start in _in_a_row(table)]
        rows = rows or _with_gaps(keys, table)
    copies = {key for row in rows for key in row}
    for row in rows:
        if (
            _groups_agree(row, network)
            and _words_agree(row, network)
            and _variances_are_positive(row, tensors, network)
            and _rest_is_apart(row, copies, tensors)
        ):
            yield row


def _comparison(tensors: Mapping[str, Tensor], arch: str, network: dict[str, Tensor]) -> np.ndarray:
    """Which tensor of a network may be which of a state dict's: bool (N, S)."""
    different: dict[tuple[int, ...], int] = {}
    number = np.array([different.setdefault(tuple(t.shape), len(different)) for t in tensors.values()])
    examples = {tuple(t.shape): t for t in tensors.values()}
    same: dict[tuple[int, ...], np.ndarray] = {}
    rows = []
    for name, own in network.items():
        shape = tuple(own.shape)
        if shape not in same:
            same[shape] = np.array([fits(examples[one], own) for one in different])
        row = same[shape]
        if _may_differ(name, own):
            row = row | [bool(arguments_explaining(arch, network, name, examples[one])) for one in different]
        rows.append(row[number])
    return np.stack(rows)


def _may_differ(name: str, own: Tensor) -> bool:
    return name.endswith("pos_embed") or name == "conv1.weight" or (own.ndim == 4 and 1 < own.shape[1] < 8)


def _in_a_row(table: np.ndarray) -> list[int]:
    """Where a network's tensors follow one another without a gap, given the comparison (N, S)."""
    n, s = table.shape
    fine = np.ones(s - n + 1, dtype=bool)
    for place in range(n):
        fine &= table[place, place : place + len(fine)]
    starts: list[int] = []
    for start in np.flatnonzero(fine).tolist():
        if not starts or start >= starts[-1] + n:
            starts.append(start)
    return starts


def _with_gaps(keys: list[str], table: np.ndarray) -> list[list[str]]:
    """Rows with whole groups left out between a network's tensors, under the longest prefixes that have one.

    Raises:
        _Unordered: there are several ways to leave groups out.
    """
    under: dict[str, list[int]] = defaultdict(list)
    for place, key in enumerate(keys):
        for dot in [0, *(found.end() for found in re.finditer(r"\.", key))]:
            under[key[:dot]].append(place)
    rows: list[list[str]] = []
    done: list[str] = []
    several: _Unordered | None = None
    for prefix, places in sorted(under.items(), key=lambda one: -len(one[0])):
        if len(places) < len(table) or any(one.startswith(prefix) for one in done):
            continue
        if not _all_shapes(table[:, places]):
            continue
        ways, row = _ways(table[:, places], _ends_of_groups([keys[place] for place in places]))
        if ways:
            done.append(prefix)
        if ways == 1:
            rows.append([keys[places[place]] for place in row])
        elif ways:
            several = _Unordered(f"more than one choice of them under {prefix or 'the file itself'}")
    if several and not rows:
        raise several
    return rows


def _all_shapes(table: np.ndarray) -> bool:
    return bool(table.any(1).all())


def _ends_of_groups(keys: list[str]) -> list[int]:
    """For each place where a group begins, the place after it; 0 elsewhere.

    A group is the tensors of a layer, or a single tensor beside whole layers (a token, a queue).
    """
    outer = {key[: found.start()] for key in keys for found in re.finditer(r"\.", _layer(key))}
    outer |= {""} if any("." in key for key in keys) else set()
    ends = [0] * len(keys)
    start = 0
    for place in range(1, len(keys) + 1):
        alone = _layer(keys[start]) in outer
        if place == len(keys) or alone or _layer(keys[place]) != _layer(keys[start]):
            ends[start] = place
            start = place
    return ends


def _ways(table: np.ndarray, ends: list[int]) -> tuple[int, list[int]]:
    """In how many ways (0, 1, or 2 for more) a network fits with whole groups left out, and the first such way.

    Args:
        table: the comparison (N, S).
        ends: `_ends_of_groups` of the S tensors.
    """
    n, s = table.shape
    ways = np.zeros((s + 1, n + 1), dtype=np.uint8)  # from tensor s of the file on, for the network's from n on
    ways[:, n] = 1
    for place in range(s - 1, -1, -1):
        ways[place, :n] = table[:, place] * ways[place + 1, 1:]
        if ends[place]:
            ways[place, :n] = np.minimum(ways[place, :n] + ways[ends[place], :n], 2)
    row: list[int] = []
    place = 0
    while len(row) < n and ways[0, 0]:
        if table[len(row), place] and ways[place + 1, len(row) + 1]:
            row.append(place)
            place += 1
        else:
            place = ends[place]
    return int(ways[0, 0]), row


def _rows_of_sorted(tensors: Mapping[str, Tensor], network: dict[str, Tensor]) -> list[list[str]]:
    """Parts of a file that is sorted by name, under the longest prefixes that have a network's shapes.

    Raises:
        _Unordered: layers of equal shapes have names that do not tell their order.
    """
    under: dict[str, list[str]] = defaultdict(list)
    for key in tensors:
        for dot in [0, *(found.end() for found in re.finditer(r"\.", key))]:
            under[key[:dot]].append(key)
    needed = Counter(general_shape(tensor) for tensor in network.values())
    rows: list[list[str]] = []
    done: list[str] = []
    for prefix, keys in sorted(under.items(), key=lambda one: -len(one[0])):
        if len(keys) < len(network) or any(one.startswith(prefix) for one in done):
            continue
        if needed - Counter(general_shape(tensors[key]) for key in keys):
            continue
        row, unclear = in_network_order({key[len(prefix) :]: tensors[key] for key in keys}, network)
        if unclear:
            raise _Unordered(f"nothing tells the order of {' and '.join(unclear[:2])} in a file that is sorted by name")
        if row:
            done.append(prefix)
            rows.append([prefix + key for key in row])
    return rows


def _groups_agree(row: list[str], network: Mapping[str, Tensor]) -> bool:
    """Whether tensors of one layer of the network share a prefix that no other layer has, unless none has a prefix."""
    if len({_layer(key) for key in row}) == 1:
        return True
    layers: dict[str, set[str]] = defaultdict(set)
    owners: dict[str, set[str]] = defaultdict(set)
    outer = {name[: found.start()] for name in network for found in re.finditer(r"\.", _layer(name))} | {""}
    for name, key in zip(network, row, strict=True):
        if _layer(name) not in outer:
            layers[_layer(name)].add(_layer(key))
            owners[_layer(key)].add(_layer(name))
    return all(len(one) == 1 for one in [*layers.values(), *owners.values()])


def _words_agree(row: list[str], network: Mapping[str, Tensor]) -> bool:
    """Whether no weight is taken for a bias or the like, where the file has torch's words for them."""
    words = ((key.rpartition(".")[2], name.rpartition(".")[2]) for key, name in zip(row, network, strict=True))
    return all(theirs == own for theirs, own in words if {theirs, own} <= _LEAVES)


def _variances_are_positive(row: list[str], tensors: Mapping[str, Tensor], network: Mapping[str, Tensor]) -> bool:
    """Whether no batch norm's variance is negative, as another tensor of its shape would be somewhere."""
    variances = (tensors[key] for key, name in zip(row, network, strict=True) if name.endswith("running_var"))
    return all(bool((one >= 0).all() | one.isnan().any()) for one in variances if one.device != torch.device("meta"))


def _rest_is_apart(row: list[str], copies: set[str], tensors: Mapping[str, Tensor]) -> bool:
    """Whether what is left out is not part of the same network: a deeper one must not be taken for a shallower.

    Tensors beside the network may be anything but another of its layers of several tensors. Inside a part of which
    others are used, only a linear layer, the classifier, may be left.
    """
    prefix = _prefix(row)
    parts: dict[str, list[str]] = defaultdict(list)
    for key in tensors:
        if key.startswith(prefix):
            parts[key[len(prefix) :].split(".")[0]].append(key)
    used = set(row)
    flat = all(len(keys) == 1 for keys in parts.values())
    own = {tuple(tensors[key].shape) for key in row if tensors[key].ndim > 1}
    if flat:
        return not any(tuple(tensors[key].shape) in own for keys in parts.values() for key in keys if key not in copies)
    layers = {_outline(keys, tensors) for keys in parts.values() if used.issuperset(keys)}
    for keys in parts.values():
        rest = [key for key in keys if key not in used]
        if len(rest) == len(keys):
            if len(keys) > 2 and not copies.intersection(keys) and _outline(keys, tensors) in layers:
                return False
        elif len(rest) > 2 or any(tensors[key].ndim > 2 for key in rest):
            return False
    return True


def _outline(keys: list[str], tensors: Mapping[str, Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensors[key].shape) for key in keys)


def _difference(
    state_dicts: Mapping[str, Mapping[str, Tensor]], arch: str, network: Mapping[str, Tensor]
) -> tuple[float, int, str]:
    """What share of a network's shapes a file has, how many they are, and in words what differs."""
    own = Counter(tuple(t.shape) for name, t in network.items() if not name.endswith("num_batches_tracked"))
    best = (0.0, 0, "")
    for tensors in state_dicts.values():
        there = Counter(tuple(t.shape) for t in tensors.values() if not is_counter(t))
        lacking = own - there
        count = own.total() - lacking.total()
        if count <= best[1]:
            continue
        if lacking:
            name = next(name for name, tensor in network.items() if tuple(tensor.shape) in lacking)
            what = f"which needs {lacking.total()} other tensors, such as {name} {tuple(network[name].shape)}"
        else:
            what = "with the same shapes in another order or grouping"
        best = count / own.total(), count, f"{arch}, {what}"
    return best
