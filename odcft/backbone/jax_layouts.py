"""timm's names for networks that JAX code wrote as archives of arrays, whose axes are in another order."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from odcft.backbone.rename_tables import Tensors, renamed

JAX_QUERY = re.compile(r"(^|\.)Transformer\.encoderblock_0\.MultiHeadDotProductAttention_\d\.query\.kernel$")


def jax_vit(tensors: Tensors) -> Tensors:
    """Vision transformers as JAX writes them; the axes of their arrays are in another order."""
    named = renamed(
        {name: _without_jax_axes(name, tensor) for name, tensor in tensors.items() if not name.startswith("head.")},
        (r"^cls$", "cls_token"),
        (r"^(?:Transformer\.posembed_input\.)?pos_embedding$", "pos_embed"),
        (r"^embedding\.", "patch_embed.proj."),
        (r"^Transformer\.encoder_norm\.", "norm."),
        (r"^Transformer\.encoderblock_(\d+)\.", r"blocks.\1."),
        (r"\.LayerNorm_0\.", ".norm1."),
        (r"\.LayerNorm_[12]\.", ".norm2."),
        (r"\.MultiHeadDotProductAttention_\d\.out\.", ".attn.proj."),
        (r"\.MultiHeadDotProductAttention_\d\.", ".attn."),
        (r"\.MlpBlock_\d\.Dense_0\.", ".mlp.fc1."),
        (r"\.MlpBlock_\d\.Dense_1\.", ".mlp.fc2."),
        (r"\.(kernel|scale)$", ".weight"),
    )
    for name in [name for name in named if re.search(r"\.attn\.query\.(weight|bias)$", name)]:
        parts = [named.get(name.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
        tensors_of = [part for part in parts if part is not None and part.shape == named[name].shape and part.ndim]
        if len(tensors_of) == 3:
            named[name.replace(".query.", ".qkv.")] = torch.cat(tensors_of)
    return named


def jax_hybrid(tensors: Tensors) -> Tensors:
    """Vision transformers on top of the first stages of a ResNet, whose blocks JAX counts from 1."""
    whole = any(name.startswith("block1.unit1.") for name in tensors)
    stem = "patch_embed.backbone.stem." if whole else "patch_embed.backbone."
    arrays = {
        name: tensor.flatten() if name.endswith((".scale", ".bias")) else tensor for name, tensor in tensors.items()
    }
    named = renamed(
        arrays,
        (r"^conv_root\.", f"{stem}conv."),
        (r"^gn_root\.", f"{stem}norm."),
        (r"^block(\d+)\.unit(\d+)\.", _jax_block("patch_embed.backbone.")),
        (r"(\.blocks\.\d+)\.gn(\d)\.", r"\1.norm\2."),
        (r"(\.blocks\.\d+)\.conv_proj\.", r"\1.downsample.conv."),
        (r"(\.blocks\.\d+)\.gn_proj\.", r"\1.downsample.norm."),
    )
    return jax_vit(named)


def jax_bit(tensors: Tensors) -> Tensors:
    """BiT's ResNets; their norms stand before the convolutions."""
    named = renamed(
        {name: _without_jax_axes(name, tensor) for name, tensor in tensors.items()},
        (r"^root_block\.standardized_conv2d\.", "stem.conv."),
        (r"^group_norm\.", "norm."),
        (r"^block(\d+)\.unit(\d+)\.", _jax_block("")),
        (r"\.a\.proj\.standardized_conv2d\.", ".downsample.conv."),
        (r"\.([abc])\.standardized_conv2d\.", lambda found: f".conv{'abc'.index(found[1]) + 1}."),
        (r"\.([abc])\.group_norm\.", lambda found: f".norm{'abc'.index(found[1]) + 1}."),
        (r"\.(kernel|gamma)$", ".weight"),
        (r"\.beta$", ".bias"),
    )
    return {name: tensor.flatten() if re.search(r"(^|\.)norm\d?\.", name) else tensor for name, tensor in named.items()}


def _jax_block(prefix: str) -> Callable[[re.Match[str]], str]:
    """timm's name of a block of a ResNet, counted from 0."""
    return lambda found: f"{prefix}stages.{max(0, int(found[1]) - 1)}.blocks.{max(0, int(found[2]) - 1)}."


def jax_mixer(tensors: Tensors) -> Tensors:
    """MLP-Mixer as Google released it."""
    return renamed(
        {name: _without_jax_axes(name, tensor) for name, tensor in tensors.items() if not name.startswith("head.")},
        (r"^stem\.", "stem.proj."),
        (r"^MixerBlock_(\d+)\.", r"blocks.\1."),
        (r"^pre_head_layer_norm\.", "norm."),
        (r"\.LayerNorm_([01])\.", lambda found: f".norm{int(found[1]) + 1}."),
        (r"\.(token|channel)_mixing\.", r".mlp_\1s."),
        (r"\.Dense_([01])\.", lambda found: f".fc{int(found[1]) + 1}."),
        (r"\.(kernel|scale)$", ".weight"),
    )


def _without_jax_axes(name: str, tensor: Tensor) -> Tensor:
    """An array of JAX's with its axes in torch's order: (out, in) or (out, in, height, width)."""
    if name.endswith(".out.kernel") and tensor.ndim == 3:  # (heads, width of a head, out)
        return tensor.flatten(0, 1).T.contiguous()
    if name.endswith(".kernel"):
        if tensor.ndim == 3:  # (in, heads, width of a head)
            tensor = tensor.flatten(1)
        if tensor.ndim == 4:
            return tensor.permute(3, 2, 0, 1).contiguous()
        return tensor.T.contiguous() if tensor.ndim == 2 else tensor
    return tensor.flatten() if name.endswith(".bias") else tensor
