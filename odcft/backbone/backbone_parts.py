"""Which parts of a checkpoint are complete backbones, which of them is taken and why, and how to take another."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from odcft.backbone.checkpoint_files import Contents
from odcft.backbone.tensor_matching import Match, complete_matches
from odcft.errors import OdcftError
from odcft.text import short_repr

MIN_TENSORS = 10  # of a part that is worth naming

# Words in the name of a part, and why it is preferred to the others.
_REASONS = {
    "ema": "it is a moving average, which usually beats the live weights",
    "teacher": "the teacher is a moving average of the student, and usually beats it",
    "online": "the online network is the one that is trained, and the target a copy that lags behind",
    "target_encoder": "the target encoder is a moving average, and the one its authors evaluate",
    "encoder_q": "the query encoder is the one that is trained, and the key encoder a copy that lags behind",
    "base_encoder": "the base encoder is the one that is trained, and the momentum encoder a copy that lags behind",
}


@dataclass(frozen=True)
class Part:
    """A complete backbone in a file."""

    where: str  # what --part takes
    same: bool  # whether its tensors are those of the backbone that was taken


def complete_parts(contents: Contents, network: Mapping[str, Tensor], found: Match) -> list[Part]:
    """List the complete backbones in a file, the one that was taken first.

    Args:
        contents: what the file holds.
        network: the network's state dict; only names and shapes count.
        found: the part that was taken.
    """
    taken = [Part(found.where, True)]
    if found.coverage < 1:
        return taken
    others = {one.where: _equal(one, found) for one in complete_matches(contents, network, len(found.tensors))}
    others |= _copies(contents, found)
    return taken + [Part(where, same) for where, same in others.items() if where != found.where]


def _copies(contents: Contents, found: Match) -> dict[str, bool]:
    """Where in a file the same keys stand under another prefix, and whether the tensors are the same.

    These are copies whatever the names, also where only shapes tell what network it is.
    """
    path = next((path for path in contents.state_dicts if path not in found.others), "")
    tensors = contents.state_dicts.get(path, {})
    prefix = "" if found.where == "the file itself" else found.where.removeprefix(path).removeprefix("/")
    inner = {
        key[len(prefix) :]: tensors[key] for key in found.keys.values() if key.startswith(prefix) and key in tensors
    }
    if len(inner) < len(found.keys) or not inner:
        return {}
    first = next(iter(inner))
    copies: dict[str, bool] = {}
    for other, theirs in contents.state_dicts.items():
        for key in theirs:
            start = key[: len(key) - len(first)]
            if not key.endswith(first) or (start and not start.endswith(".")):
                continue
            pairs = [(theirs.get(start + name), own) for name, own in inner.items()]
            if all(one is not None and one.shape == own.shape for one, own in pairs):
                where = "/".join(filter(None, (other, start))) or "the file itself"
                copies[where] = all(_shared(one, own) or torch.equal(one, own) for one, own in pairs if one is not None)
    return copies


def _equal(one: Match, other: Match) -> bool:
    return all(
        name in one.tensors and (_shared(one.tensors[name], tensor) or torch.equal(one.tensors[name], tensor))
        for name, tensor in other.tensors.items()
    )


def _shared(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.stride() == other.stride() and one.dtype == other.dtype


def why_taken(parts: list[Part], asked: str | None) -> str:
    """Why the first of several parts was taken, as the end of a sentence."""
    where = parts[0].where
    if asked:
        return "as --part asks"
    if all(part.same for part in parts):
        return "the others are the same tensors"
    return next((why for word, why in _REASONS.items() if word in where), "its name suits best, or it comes first")


def only_part(contents: Contents, part: str) -> Contents:
    """The contents without any tensor outside one part.

    Args:
        contents: what the file holds.
        part: the path of a state dict, the prefix of its keys, or both as in "state_dict/module.encoder_q.".

    Raises:
        OdcftError: there is no such part.
    """
    wanted = part.strip("./")
    kept: dict[str, dict[str, Tensor]] = {}
    for path, tensors in contents.state_dicts.items():
        start = f"{path}/" if path else ""
        if inside := {key: one for key, one in tensors.items() if _is_under(start + key, wanted)}:
            kept[path] = inside
    if not wanted or not kept:
        known = [short_repr(name, 100, quotes=False) for name in _networks(contents)[:10]]
        asked = short_repr(part, 100, quotes=False)
        give = (
            f"Give {', '.join(known)} or a name within one of these." if known else "Drop --part: it holds one network."
        )
        raise OdcftError(f"{contents.path}: --part {asked}: no tensors there. {give}")
    return replace(contents, state_dicts=kept)


def _is_under(name: str, part: str) -> bool:
    return name.startswith(part) and name[len(part) : len(part) + 1] in (".", "/")


def _networks(contents: Contents) -> list[str]:
    """Parts that look like networks: the innermost that hold a layer or a token directly, and MIN_TENSORS tensors."""
    return [
        name
        for path, tensors in contents.state_dicts.items()
        for prefix in _networks_under("", list(tensors))
        if (name := "/".join(filter(None, (path, prefix))))
    ]


def _networks_under(prefix: str, keys: list[str]) -> list[str]:
    """Prefixes of networks among keys that share a prefix; the numbered parts of a network are layers, not networks."""
    children: dict[str, list[str]] = {}
    for key in keys:
        children.setdefault(key[len(prefix) :].partition(".")[0], []).append(key)
    inner: list[str] = []
    inside = 0
    for name, under in children.items():
        if len(under) >= MIN_TENSORS and (not name.isdecimal() or prefix in ("", "module.")):
            found = _networks_under(f"{prefix}{name}.", under)
            inner += found
            inside += len(under) if found else 0
    holds_layers = len(keys) >= MIN_TENSORS and any(key[len(prefix) :].count(".") < 2 for key in keys)
    # A stem of several layers is not a network of its own, and hardly ever most of one.
    return inner if inner and (not holds_layers or 2 * inside > len(keys)) else [prefix] if holds_layers else []
