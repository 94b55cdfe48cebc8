"""Tensors of a file that belong to the network in it, but for which the network found by names has no place.

A deeper network has all tensors of a shallower one, and one with layer scale or adapters all of a plain one: both would
pass for it. Heads, queues and copies stand beside the layers, and are no concern here.
"""

import re
from collections import defaultdict
from collections.abc import Iterator

from odcft.backbone.checkpoint_files import Contents
from odcft.backbone.tensor_matching import Match

MIN_LAYER = 3  # tensors of a layer; classifiers in a row of linear layers have two

# What layers hold besides weights: tables and masks computed from sizes, counts, and what converters leave behind.
_BUFFERS = re.compile(
    r"(relative_position_index|relative_coords_table|attn_mask|bias_mask|mask|periods|inv_freq|freqs\w*|rope\.\w+"
    r"|num_batches_tracked|total_ops|total_params)$|\.attn\.(query|key|value)\."
)


def leftover_tensor(contents: Contents, found: Match) -> tuple[str, bool]:
    """A tensor in a layer of the network, or in one like it, that was left out; "" if there is none.

    Args:
        contents: what the file holds.
        found: the match of a network by names.

    Returns:
        Its key, and whether all of its layer was left out.
    """
    path = next((path for path in contents.state_dicts if path not in found.others), "")
    prefix = "" if found.where == "the file itself" else found.where.removeprefix(path).removeprefix("/")
    left_out = {*found.dropped, *found.unexpected}
    used: set[str] = set()
    kinds: set[str] = set()
    left: dict[str, list[str]] = defaultdict(list)
    for key, tensor in contents.state_dicts.get(path, {}).items():
        if not key.startswith(prefix):
            continue
        if key not in left_out:
            used |= set(_layers(key[len(prefix) :]))
            kinds.add(_kind(key))
        elif tensor.is_floating_point() and key not in found.unexpected and not _BUFFERS.search(key):
            for layer in _layers(key[len(prefix) :]):
                left[layer].append(key)
    for layer, keys in left.items():
        if layer not in used and len(keys) >= MIN_LAYER and all(_kind(key) in kinds for key in keys):
            return keys[0], True
    inside = next((keys[0] for layer, keys in left.items() if layer in used), "")
    return inside, False


def _layers(name: str) -> Iterator[str]:
    """The numbered parts of a network that a tensor is in: blocks.3 of blocks.3.attn.weight."""
    for found in re.finditer(r"(?<![^.])\d+\.", name):
        yield name[: found.end()]


def _kind(key: str) -> str:
    return re.sub(r"(?<![^.])\d+(?=\.)", "#", key)
