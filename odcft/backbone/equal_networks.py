"""Networks of timm's that have the same tensors under the same names and compute something else.

Paddings, epsilons, activations, windows, heads and blurred strides leave no tensors. `timm_index.json` lists such
networks beside one another. A file that fits several needs a word from the user, unless something in it decides.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from odcft.backbone.checkpoint_files import Contents
from odcft.backbone.original_layouts import hidden_arguments
from odcft.errors import OdcftError

MAX_BUILT = 8  # networks that are built to compare their windows

# What the names of such networks have in them, and in what they differ.
_DIFFERENCES = (
    (r"^tf_", "those with tf_ pad as TensorFlow does and have its epsilon"),
    (r"_quickgelu", "of CLIP's, OpenAI's weights have the quick GELU"),
    (r"_jx$", "those with _jx pad as JAX does"),
    (r"window\d|^swinv2_cr|_rmlp_", "they have windows of other sizes"),
    (r"_siglip_", "they have other numbers of attention heads"),
)


def choose_equal(contents: Contents, equal: Sequence[str], user_args: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Which of several networks a file holds that has the tensors of all of them.

    Args:
        contents: what the file holds.
        equal: their names, the one found first.
        user_args: arguments the user gave for the network.

    Returns:
        Its name, and the names of the others that fit as well but are rare: those with blurred or averaged strides.

    Raises:
        OdcftError: nothing in the file tells which it is.
    """
    first = equal[0]
    if len(equal) > 1:
        equal = _with_windows_of(contents, equal)
    hinted = [name for name in contents.arch_hints if name in equal]
    told = {"act_layer", "window_size"} & {*user_args, *hidden_arguments(contents.layout, first)}
    if len(equal) == 1 or hinted or (told and first in equal):
        return (hinted or [first if first in equal else equal[0]])[0], []
    plain = dict.fromkeys(without_anti_aliasing(name) for name in equal)
    if len(plain) > 1:
        why = next((f": {why}" for mark, why in _DIFFERENCES if any(re.search(mark, name) for name in equal)), "")
        raise OdcftError(
            f"{contents.path} fits {', '.join(equal[:-1])} and {equal[-1]}, which differ in what no tensor "
            f"shows{why}. Pass --arch with the one it was trained as."
        )
    name = next((name for name in equal if name in plain), first)
    return name, [other for other in equal if other != name]


def without_anti_aliasing(name: str) -> str:
    """A network's name without the mark of blurred or averaged strides, which are rare and leave no tensors."""
    return re.sub(r"_?(aa|blur)(?=\d|_)", "", name)


def _with_windows_of(contents: Contents, equal: Sequence[str]) -> Sequence[str]:
    """Those of several SwinV2 whose windows are the file's: it may hold a table of coordinates for each layer."""
    tables = _tables(contents.state_dicts)
    if not tables or not all(name.startswith("swinv2_") for name in equal):
        return equal
    fitting = [name for name in equal[:MAX_BUILT] if _windows(name) == tables]
    return fitting or equal


def _tables(state_dicts: Mapping[str, Mapping[str, Tensor]]) -> list[tuple[int, int]]:
    """By stage: the side of the windows of the first block, and of those it was trained with before (0 for none)."""
    found: list[tuple[int, int]] = []
    for tensors in state_dicts.values():
        for stage in range(4):
            mark = rf"(.*\.)?layers\.{stage}\.blocks\.0\.attn\.relative_coords_table"
            table = next((tensor for name, tensor in tensors.items() if re.fullmatch(mark, name)), None)
            if table is None or table.ndim != 4 or table.shape[-1] != 2 or not 3 <= table.shape[1] <= 255:
                return []
            window = (table.shape[1] + 1) // 2
            # Coordinates are log2(1 + 8 x) / 3 with x = 1 at the edge of the windows it was trained with before.
            edge = (2 ** (3 * min(float(table.max()), 5)) - 1) / 8
            if not 0.05 < edge < 20:
                return []
            before = round((window - 1) / edge) + 1
            found.append((window, 0 if before == window else before))
        if found:
            break
    return found


def _windows(name: str) -> list[tuple[int, int]]:
    """The same of a network of timm's."""
    import timm

    with torch.device("meta"):
        net: Any = timm.create_model(name, num_classes=0)
    blocks = [stage.blocks[0].attn for stage in net.layers]
    sides = [(one.window_size[0], one.pretrained_window_size[0]) for one in blocks]
    return [(side, 0 if before == side else before) for side, before in sides]
