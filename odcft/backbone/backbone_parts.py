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
    others = {one.where: one for one in complete_matches(contents, network, len(found.tensors))}
    return taken + [Part(where, _equal(one, found)) for where, one in others.items() if where != found.where]


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
        known = ", ".join(short_repr(name, 100, quotes=False) for name in _names(contents)[:10])
        asked = short_repr(part, 100, quotes=False)
        raise OdcftError(
            f"{contents.path}: --part {asked}: no tensors there. Give {known} or a name within one of these."
        )
    return replace(contents, state_dicts=kept)


def _is_under(name: str, part: str) -> bool:
    return name.startswith(part) and name[len(part) : len(part) + 1] in (".", "/")


def _names(contents: Contents) -> list[str]:
    """Parts by their first names: "state_dict/backbone." for every group of at least MIN_TENSORS tensors."""
    counts: dict[str, int] = {}
    for path, tensors in contents.state_dicts.items():
        for key in tensors:
            first, dot, rest = key.partition(".")
            if first == "module" and "." in rest:
                first = f"module.{rest.partition('.')[0]}"
            name = "/".join(filter(None, (path, f"{first}{dot}")))
            counts[name] = counts.get(name, 0) + 1
    return [name for name, count in counts.items() if count >= MIN_TENSORS] or list(counts)
