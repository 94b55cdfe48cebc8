"""Why tensors of a checkpoint do not belong to its backbone, by group, for `odcft inspect`."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from odcft.backbone.backbone_parts import Part
from odcft.backbone.tensor_matching import Match


@dataclass(frozen=True)
class Group:
    """Tensors, or state dicts, that were left out for the same reason."""

    name: str
    why: str
    members: list[str]


COPIES = ("copies", "the network again, or parts of it")
OTHER = ("other", "no part of this network")
# What the names in a group contain, and the group with the reason it is left out. The first that fits counts.
_GROUPS = (
    (r"optim|exp_avg|momentum_buffer|grad_scaler", ("optimizer", "its state is for training only")),
    (r"queue|bank|prototype|centroid", ("queue", "features or prototypes of their images")),
    (r"projector|proj(ect)?(ion)?_(head|mlp)|neck|dino_head|ibot_head", ("projector", "for a loss, in training only")),
    (r"predict", ("predictor", "for a loss, in training only")),
    (r"(^|[./_])(heads?|fc|classifier|top_layer|last_layer|linear)\d*[./_]", ("head", "a classifier or a projection")),
    (r"decod", ("decoder", "for reconstructing images")),
    (r"mask_token", ("mask token", "stands for hidden patches, in training only")),
    (r"momentum|encoder_k|target|student|teacher|online|(^|[./_])ema[./_]", COPIES),
    (r"(^|[./])(epoch|step|iter|n_averaged|center|temperature)|num_batches_tracked", ("counters", "of the training")),
)


def left_out_groups(found: Match, parts: list[Part]) -> list[Group]:
    """Group what a match left out: tensors beside the backbone, and other state dicts.

    Args:
        found: the match.
        parts: the complete backbones in the file, the one that was taken first.
    """
    copies = [part.where for part in parts[1:]]
    path = found.where.rpartition("/")[0] if "/" in found.where else ""
    members: dict[tuple[str, str], list[str]] = {}
    for name in found.dropped:
        full = f"{path}/{name}" if path else name
        group = COPIES if _is_in(full, copies) else _group(name)
        members.setdefault(group, []).append(name)
    for name in found.others:
        group = COPIES if _is_in(name, copies) else _group(f"{name}/")
        members.setdefault(group, []).append(name or "the file itself")
    return [Group(name, why, names) for (name, why), names in members.items()]


def _is_in(name: str, places: Iterable[str]) -> bool:
    """Whether a name lies within one of these places, or around it."""
    return any(name.startswith(place) or place.startswith(f"{name}/") or place == name for place in places)


def _group(name: str) -> tuple[str, str]:
    return next((group for pattern, group in _GROUPS if re.search(pattern, name.lower())), OTHER)
