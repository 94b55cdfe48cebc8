"""Put the tensors of a file that is sorted by name back into the order of a network's layers.

The tree of a file's names is compared with the tree of the network's: parts of the same shapes belong together. Where
several parts have the same shapes, the numbers in their names give their order (bn1, bn2), or the network's own names.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from odcft.backbone.structure_index import general_shape

# The order in which torch writes the tensors of a layer, under its own names and other frameworks'.
_LEAVES = (
    *(("weight", "gamma", "kernel", "scale"), ("bias", "beta")),
    *(("running_mean", "moving_mean", "mean"), ("running_var", "moving_variance", "var")),
    ("num_batches_tracked",),
)
_RANK = {word: rank for rank, words in enumerate(_LEAVES) for word in words}

Tree = dict[str, Any]  # of trees and tensors


def canonical_order(tensors: Mapping[str, Tensor], sort: bool) -> dict[str, Tensor]:
    """A state dict with each layer's tensors in torch's order where their names tell it.

    Args:
        tensors: the state dict.
        sort: sort the layers by the numbers in their names; otherwise they stay in the file's order.
    """
    keys = sorted(tensors, key=natural) if sort else list(tensors)
    ordered: dict[str, Tensor] = {}
    start = 0
    for place in range(1, len(keys) + 1):
        if place == len(keys) or _layer(keys[place]) != _layer(keys[start]):
            layer = keys[start:place]
            if all(_word(key) in _RANK for key in layer):
                layer.sort(key=lambda key: _RANK[_word(key)])
            ordered |= {key: tensors[key] for key in layer}
            start = place
    return ordered


def natural(name: str) -> list[list[tuple[int, int, str]]]:
    """Sort key by which layer10 comes after layer9."""
    return [
        [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", word) if part]
        for word in name.split(".")
    ]


def is_numbered(keys: Iterable[str]) -> bool:
    """Whether numbers in the names, and torch's words for the tensors of a layer, tell the order of all tensors."""
    stems: dict[str, set[str]] = defaultdict(set)
    for key in keys:
        words = key.split(".")
        for depth, word in enumerate(words):
            last = depth == len(words) - 1
            stems[".".join(words[:depth])].add("" if last and word in _RANK else re.sub(r"\d+", "", word))
    return all(len(one) == 1 for one in stems.values())


def _layer(key: str) -> str:
    return key.rpartition(".")[0]


def _word(key: str) -> str:
    return key.rpartition(".")[2]


def in_network_order(tensors: Mapping[str, Tensor], network: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Find the key of each of a network's tensors by comparing the trees of their names.

    Returns:
        The keys in the network's order, and none if the trees differ; or names of parts that nothing tells apart.
    """
    theirs, own = _tree(tensors), _tree(network)
    for trees in ((theirs, own), (_in_one_list(theirs), _in_one_list(own))):
        found: dict[str, str] = {}
        unclear = _pair(*trees, "", "", found, outermost=True)
        if unclear is not None:
            return ([], unclear) if unclear else ([found[name] for name in network], [])
    return [], []


def _in_one_list(tree: Tree) -> Tree:
    """The tree with layers of equal shapes in one list where they are divided into numbered chunks."""
    inner = {name: _in_one_list(node) if isinstance(node, dict) else node for name, node in tree.items()}
    layers = {
        f"{chunk}.{number}": layer
        for chunk, numbered in inner.items()
        for number, layer in (numbered.items() if isinstance(numbered, dict) else ())
    }
    all_numbered = all(re.fullmatch(r"\d+\.\d+", name) for name in layers)
    if not layers or not all_numbered or not all(isinstance(node, dict) for node in inner.values()):
        return inner
    return layers if len({_outline(layer) for layer in layers.values()}) == 1 else inner


def _tree(tensors: Mapping[str, Tensor]) -> Tree:
    root: Tree = {}
    for key, tensor in tensors.items():
        *outer, last = key.split(".")
        node = root
        for part in outer:
            inner = node.setdefault(part, {})
            node = inner if isinstance(inner, dict) else node.setdefault(f"{part}.", {})
        node[last] = tensor
    return root


def _outline(node: Any) -> tuple[Any, ...]:
    """The shapes in a part of a tree, whatever their order."""
    if isinstance(node, Tensor):
        shape = general_shape(node)
        return ((shape[0], 0, shape[2]) if len(shape) == 3 and shape[0] == 1 else shape,)
    return tuple(sorted(shape for inner in node.values() for shape in _outline(inner)))


def _pair(
    theirs: Tree, own: Tree, prefix: str, own_prefix: str, found: dict[str, str], outermost: bool = False
) -> list[str] | None:
    """Pair the parts of two trees, and enter the pairs of tensors into `found`.

    Returns:
        None if they differ; names of parts that nothing tells apart; or an empty list.
    """
    theirs, prefix = _inside(theirs, prefix)
    own, own_prefix = _inside(own, own_prefix)
    by_outline: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name in theirs:
        by_outline[_outline(theirs[name])].append(name)
    own_by_outline: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name in own:
        own_by_outline[_outline(own[name])].append(name)
    if not outermost and set(by_outline) != set(own_by_outline):
        return None
    unclear: list[str] = []
    for outline, names in own_by_outline.items():
        same = _ordered(by_outline.get(outline, []), names)
        if same is None:
            unclear += [prefix + name for name in by_outline[outline][:2]]
            continue
        if len(same) != len(names):
            return None
        for their_name, name in zip(same, names, strict=True):
            inner, own_inner = theirs[their_name], own[name]
            if isinstance(inner, Tensor) or isinstance(own_inner, Tensor):
                if not (isinstance(inner, Tensor) and isinstance(own_inner, Tensor)):
                    return None
                found[own_prefix + name] = prefix + their_name
                continue
            deeper = _pair(inner, own_inner, f"{prefix}{their_name}.", f"{own_prefix}{name}.", found)
            if deeper is None:
                return None
            unclear += deeper
    return unclear


def _inside(tree: Tree, prefix: str) -> tuple[Tree, str]:
    """The part of a tree below names that have nothing beside them."""
    while len(tree) == 1 and isinstance(inner := next(iter(tree.values())), dict):
        prefix, tree = f"{prefix}{next(iter(tree))}.", inner
    return tree, prefix


def _ordered(theirs: list[str], own: list[str]) -> list[str] | None:
    """Names of parts of equal shapes in the order of the network's, or None if their order is unknown."""
    if len(theirs) < 2:
        return theirs
    if set(theirs) == set(own):
        return own
    if len({re.sub(r"\d+", "", name) for name in theirs}) == 1:
        return sorted(theirs, key=natural)
    if all(name in _RANK for name in theirs):
        return sorted(theirs, key=_RANK.__getitem__)
    return None
