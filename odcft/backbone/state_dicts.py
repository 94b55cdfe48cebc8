"""Find the state dicts in what a checkpoint file holds, and what stands around them.

A training script's file holds a dict of dicts, a pickled network, lists of them, or the tensors alone.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from odcft.backbone.pickle_work import TooMuchWork
from odcft.backbone.safe_unpickle import StandIn
from odcft.errors import OdcftError
from odcft.text import short_repr

MAX_DEPTH = 12  # of nested dicts and lists that are searched

# More than any checkpoint needs, and little enough to be checked in seconds.
MAX_TENSORS = 30_000  # named tensors
MAX_NAME_LENGTH = 300  # characters of a tensor's name
MAX_NAME_LEVELS = 40  # dots in a tensor's name
MAX_HINTS = 20  # strings that may name an architecture

# A dict in a file: its path, whether only dicts lead to it (no lists or objects), and the dict itself.
FoundDict = tuple[str, bool, Mapping[Any, Any]]


def find_dicts(tree: Any) -> Iterator[FoundDict]:
    """Every dict in a file, each once."""
    least_depth: dict[int, int] = {}  # at which an object was met, by its id
    kept: list[Any] = []  # objects made here: kept alive so that no other gets the same id

    def walk(tree: Any, path: str, depth: int, plain: bool) -> Iterator[FoundDict]:
        if depth > MAX_DEPTH or least_depth.get(id(tree), MAX_DEPTH + 1) <= depth:
            return
        first, least_depth[id(tree)] = id(tree) not in least_depth, depth
        inner = _held_by(tree)
        kept.append(inner)
        if isinstance(inner, list | tuple):
            inner, plain = ({str(place): value for place, value in enumerate(inner)} if len(inner) < 100 else {}), False
        elif isinstance(inner, Mapping) and first:
            yield path, plain, inner
        if isinstance(inner, Mapping):
            for key, value in inner.items():
                if isinstance(key, str) and isinstance(value, Mapping | list | tuple | StandIn):
                    yield from walk(value, f"{path}/{key[:MAX_NAME_LENGTH]}".lstrip("/"), depth + 1, plain)

    return walk(tree, "", 0, True)


def _held_by(tree: Any) -> Any:
    """What an object holds: a pickled network's state dict, the attributes of a stand-in, or anything else as it is."""
    if isinstance(tree, StandIn):
        tree = vars(tree)
        if "_parameters" in tree and "_modules" in tree:
            return _module_tensors(tree)
    return tree


def _module_tensors(module: Mapping[str, Any], made: dict[int, dict[str, Any]] | None = None) -> dict[str, Any]:
    """The state dict of a network that was pickled whole.

    Args:
        module: its attributes.
        made: tensors of the modules met so far, by id: a module may be used in several places.
    """
    made = {} if made is None else made
    tensors: dict[str, Any] = {}
    for group in ("_parameters", "_buffers"):
        tensors |= {name: tensor for name, tensor in _named_items(module, group) if isinstance(tensor, Tensor)}
    for name, inner in _named_items(module, "_modules"):
        if isinstance(inner, StandIn) and len(made) < MAX_TENSORS:
            if id(inner) not in made:
                made[id(inner)] = {}  # ends the recursion where a module contains itself
                made[id(inner)] = _module_tensors(vars(inner), made)
            tensors |= {f"{name}.{key}": value for key, value in made[id(inner)].items()}
        if len(tensors) > MAX_TENSORS:
            raise TooMuchWork
    return tensors


def _named_items(module: Mapping[str, Any], group: str) -> list[tuple[str, Any]]:
    """The items of a module's `_parameters`, `_buffers` or `_modules` whose names are text."""
    items = module.get(group)
    return [(name, one) for name, one in items.items() if isinstance(name, str)] if isinstance(items, Mapping) else []


def usable_tensors(tree: Mapping[Any, Any], path: Path, unusable: list[str]) -> dict[str, Tensor]:
    """The tensors in a dict that a network can hold; names of other tensors are added to `unusable`.

    Raises:
        OdcftError: a name is too long, or a tensor is larger than the file.
    """
    tensors = {}
    for name, tensor in tree.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor)):
            continue
        if len(name) > MAX_NAME_LENGTH or name.count(".") > MAX_NAME_LEVELS:
            raise OdcftError(
                f"{path}: a tensor's name has {len(name):,} characters, which no network has: {short_repr(name)}."
            )
        if not _is_plain(tensor):
            unusable.append(name)
            continue
        if tensor.nbytes > 4 * path.stat().st_size + (1 << 20):
            raise OdcftError(
                f"{path} has {path.stat().st_size:,} bytes, but says that {short_repr(name)} in it takes "
                f"{tensor.nbytes:,}. Is it damaged?"
            )
        tensors[name] = tensor.detach()
    return tensors


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is dense real numbers in memory: not sparse, nested, quantized, complex or without storage."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_complex():
        return False
    try:
        return tensor.device.type == "cpu" and (not tensor.numel() or tensor.untyped_storage().nbytes() > 0)
    except (NotImplementedError, RuntimeError):
        return False


def outer_keys(dicts: list[FoundDict]) -> list[str]:
    """Keys of the dicts around the state dicts; of the outermost dict also those of tensors."""
    return [
        key
        for path, plain, tree in dicts
        if plain and path.count("/") < 3
        for key, value in tree.items()
        if isinstance(key, str) and not (isinstance(value, Tensor) and path)
    ]


def arch_hints(dicts: list[FoundDict]) -> list[str]:
    """Values of fields that usually name an architecture."""
    fields = ("arch", "architecture", "model", "model_name", "backbone", "network")
    found = [
        tree[key]
        for path, plain, tree in dicts
        if plain and path.count("/") < 4
        for key in fields
        if isinstance(tree.get(key), str) and len(tree[key]) < 100
    ]
    return list(dict.fromkeys(found))[:MAX_HINTS]
