"""Tell a network's build arguments from a file's tensors: input channels, image size, stem, windows, attention heads.

`in_chans` shows in the first convolution, `img_size` in the length of the position embedding, a ResNet's `small_stem`
in its first kernel, and a Swin's `window_size` in its tables of relative positions. `num_heads` and `last_stride` show
in no shape, only in whose code wrote the file.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from odcft.backbone.checkpoint_files import Contents
from odcft.backbone.non_timm_networks import shapes
from odcft.backbone.original_layouts import hidden_arguments
from odcft.backbone.tensor_matching import Match, match
from odcft.errors import OdcftError

Kwargs = dict[str, Any]


def match_adjusted(contents: Contents, arch: str, kwargs: Kwargs, user_args: Kwargs) -> tuple[Kwargs, Match]:
    """Match a network, adjusted to the file's input channels, stem and position embedding where that fits better.

    Returns:
        The arguments to build it with, and its match.

    Raises:
        OdcftError: the network does not take these arguments.
    """
    network = shapes(arch, **kwargs)
    found, adjusted = match(contents, network), kwargs
    for name, tensor in found.misfits.items():
        adjusted = {**adjusted, **arguments_explaining(arch, network, name, tensor)}
    if arch.startswith("beit"):
        adjusted = {**adjusted, **_beit_arguments(found)}
    adjusted = {**adjusted, **user_args}
    if adjusted == kwargs:
        return kwargs, found
    try:
        better = match(contents, shapes(arch, **adjusted))
    except OdcftError:  # not all of timm's networks take these arguments
        return kwargs, found
    larger = (len(better.tensors), better.coverage) > (len(found.tensors), found.coverage)
    return (adjusted, better) if larger else (kwargs, found)


def _beit_arguments(found: Match) -> Kwargs:
    """Arguments of a BEiT that explain what a file lacks and what it has beside: positions, last norm, layer scale."""

    def lacks(name: str) -> bool:
        return any(missing.endswith(name) for missing in found.missing)

    def has(name: str) -> bool:
        return any(f".{dropped}".endswith(f".{name}") for dropped in found.dropped)

    arguments: Kwargs = {}
    if lacks(".attn.relative_position_bias_table"):
        arguments["use_rel_pos_bias"] = False
    if has("rel_pos_bias.relative_position_bias_table"):
        arguments["use_shared_rel_pos_bias"] = True
    if has("pos_embed"):
        arguments["use_abs_pos_emb"] = True
    if lacks("fc_norm.weight") and has("norm.weight"):
        arguments["global_pool"] = "token"
    if lacks(".gamma_1"):
        arguments["init_values"] = 0.0
    return arguments


def arguments_explaining(arch: str, network: Mapping[str, Tensor], name: str, tensor: Tensor) -> Kwargs:
    """Arguments that would give a network's tensor the shape it has in the file; none if nothing explains it."""
    own = network[name]
    if tensor.ndim == own.ndim == 4 and tensor.shape[0] == own.shape[0] and tensor.shape[2:] == own.shape[2:]:
        first = tensor.shape[1] > 0 and may_be_first_convolution(tensor.shape) and may_be_first_convolution(own.shape)
        return {"in_chans": tensor.shape[1]} if first else {}
    if arch.startswith("resnet") and name == "conv1.weight" and tensor.shape[2:] == (3, 3):
        channels = {"in_chans": tensor.shape[1]} if tensor.shape[1] != 3 else {}
        return {"small_stem": True, **channels}
    if name.endswith("pos_embed") and tensor.ndim == own.ndim == 3 and tensor.shape[2] == own.shape[2]:
        patches = network.get(name.replace("pos_embed", "patch_embed.proj.weight"))
        extra = own.shape[1] - math.isqrt(own.shape[1]) ** 2  # tokens that are not patches (class, registers)
        side = math.isqrt(max(0, tensor.shape[1] - extra))
        patch = 0 if patches is None else patches.shape[-1] * _reduction_before(network)
        if side * side + extra == tensor.shape[1] and 8 <= side * patch <= 4096:
            return {"img_size": side * patch}
    if arch.startswith("swin_") and name.endswith(".relative_position_bias_table") and tensor.ndim == own.ndim == 2:
        side = math.isqrt(tensor.shape[0])
        if side % 2 and side * side == tensor.shape[0] and 3 <= side <= 127 and tensor.shape[1] == own.shape[1]:
            window = (side + 1) // 2
            # The last of four stages sees 1/32 of the image, and its windows are no larger than that.
            return {"img_size": 32 * window} if name.startswith("layers.3.") else {"window_size": window}
    return {}


def _reduction_before(network: Mapping[str, Tensor]) -> int:
    """How much smaller an image is where a transformer divides it: 1, unless stages of a ResNet come first."""
    stages = {found[1] for name in network if (found := re.match(r"patch_embed\.backbone\.stages\.(\d+)\.", name))}
    hybrid = "patch_embed.backbone.stem.conv.weight" in network or "patch_embed.backbone.conv.weight" in network
    return 4 * 2 ** max(0, len(stages) - 1) if hybrid else 1


def with_hidden_arguments(contents: Contents, arch: str, kwargs: Kwargs, found: Match) -> Kwargs:
    """Add arguments that change no tensor's shape, so that only the code that wrote the file tells them."""
    if arch.startswith("vit_small") and "base_encoder." in found.where:
        return {**kwargs, "num_heads": 12}  # MoCo v3; timm's has 6
    kwargs = {**kwargs, **contents.told_arguments, **hidden_arguments(contents.layout, arch)}
    goyal = contents.container == "pickle" or "_feature_blocks." in found.where
    if arch == "resnet50" and kwargs.get("in_chans") == 1 and goyal:
        return {**kwargs, "last_stride": 1}
    return kwargs


def may_be_first_convolution(shape: tuple[int, ...]) -> bool:
    """Whether this is a convolution of few enough input channels to be the first."""
    return len(shape) == 4 and shape[1] < 8
