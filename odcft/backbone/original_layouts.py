"""Give the tensors of other libraries' original releases the names they have in timm.

A layout is recognised by one tensor that no other layout has, under any prefix. timm's own converters do the same work
for some of these layouts, but they need a model of the right size first, and resample silently where sizes differ.

Some layouts also tell what no tensor does: an epsilon, an activation, a size of windows.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from odcft.backbone.encoder_layouts import clip_resnet, efficientnet_pytorch
from odcft.backbone.jax_layouts import JAX_QUERY, jax_bit, jax_hybrid, jax_mixer, jax_vit
from odcft.backbone.rename_tables import Tensors, renamed, with_separate_biases
from odcft.backbone.torchvision_layouts import (
    torchvision_convnext,
    torchvision_efficientnet,
    torchvision_swin,
    torchvision_vit,
)
from odcft.backbone.transformers_tensors import to_timm


@dataclass(frozen=True)
class Layout:
    """How a library names the tensors of a family of networks.

    Attributes:
        mark: pattern of the end of a name that only this layout has; what stands before it is the prefix.
        convert: from the tensors under the prefix, without it, to timm's names.
        fits: pattern of timm's names of the networks that these can be.
        also: pattern of another tensor's whole name that must be there too.
        unlisted: networks to try that `timm_index.json` lists under another name of the same tensors.
        uses_timm_cfg: whether mean and standard deviation are those of timm's network, rather than ImageNet's.
    """

    mark: str
    convert: Callable[[Tensors], Tensors]
    fits: str = ""
    also: str = ""
    unlisted: tuple[str, ...] = ()
    uses_timm_cfg: bool = False


def layout_of(tensors: Mapping[str, Tensor]) -> str:
    """The name of the layout in LAYOUTS that a state dict has; "" for none of them."""
    return next((name for name, layout in LAYOUTS.items() if _prefixes(tensors, layout)), "")


def with_timm_names(tensors: Tensors) -> Tensors:
    """A state dict of one of LAYOUTS under timm's names, also of copies; others, and tensors around it, as they are."""
    if not (name := layout_of(tensors)):
        return tensors
    layout, outside = LAYOUTS[name], dict(tensors)
    named: Tensors = {}
    for prefix in _prefixes(tensors, layout):
        inside = {key.removeprefix(prefix): outside.pop(key) for key in list(outside) if key.startswith(prefix)}
        named |= {f"{prefix}{key}": tensor for key, tensor in layout.convert(inside).items()}
    return {**outside, **named}


def may_be(layout: str, arch: str) -> bool:
    """Whether a network of timm's can be the one that a file of this layout holds."""
    return not layout or re.match(LAYOUTS[layout].fits, arch) is not None


def hidden_arguments(layout: str, arch: str) -> dict[str, Any]:
    """Arguments that a layout implies for a network of timm's and that no tensor tells."""
    if layout == "torchvision efficientnet" and re.match(r"efficientnet_b[567]|efficientnetv2", arch):
        return {"bn_eps": 1e-3}  # torchvision's EfficientNet-B5 to B7 and V2
    if layout == "openai clip" and "_clip_" in arch and "quickgelu" not in arch:
        return {"act_layer": "quick_gelu"}
    if layout == "dinov3" and "dinov3" in arch:
        return {"global_pool": "token"}
    return {}


def told_arguments(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments that a state dict tells under its own names only: heads of attention (JAX)."""
    for name, tensor in tensors.items():
        if JAX_QUERY.search(name) and tensor.ndim == 3:
            return {"num_heads": tensor.shape[1]}
    return {}


def _prefixes(tensors: Mapping[str, Tensor], layout: Layout) -> list[str]:
    """What stands before the names of a layout, once for each copy and inner ones first; none for another layout."""
    if layout.also and not any(re.fullmatch(layout.also, name) for name in tensors):
        return []
    pattern = re.compile(rf"(?P<prefix>(?:.*\.)?){layout.mark}")
    found = dict.fromkeys(one["prefix"] for name in tensors if (one := pattern.fullmatch(name)))
    return sorted(found, key=len, reverse=True)


def _clip(tensors: Tensors) -> Tensors:
    """OpenAI's and open_clip's image towers."""
    named = renamed(
        {name: tensor for name, tensor in tensors.items() if name != "proj"},
        (r"^class_embedding$", "cls_token"),
        (r"^positional_embedding$", "pos_embed"),
        (r"^conv1\.", "patch_embed.proj."),
        (r"^transformer\.resblocks\.", "blocks."),
        (r"^ln_pre\.", "norm_pre."),
        (r"^ln_post\.", "norm."),
        (r"\.ln_(\d)\.", r".norm\1."),
        (r"\.attn\.in_proj_", ".attn.qkv."),
        (r"\.attn\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.c_fc\.", ".mlp.fc1."),
        (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    )
    for name in ("cls_token", "pos_embed"):
        while name in named and 0 < named[name].ndim < 3:
            named[name] = named[name].unsqueeze(0)
    return named


def _dinov3(tensors: Tensors) -> Tensors:
    fixed = re.compile(r".*\.(periods|bias_mask)|mask_token|local_cls_norm\..*")
    named = renamed(
        {name: tensor for name, tensor in tensors.items() if not fixed.fullmatch(name)},
        (r"^storage_tokens$", "reg_token"),
        (r"\.ls(\d)\.gamma$", r".gamma_\1"),
        (r"\.mlp\.w1\.", ".mlp.fc1_g."),
        (r"\.mlp\.w2\.", ".mlp.fc1_x."),
        (r"\.mlp\.w3\.", ".mlp.fc2."),
    )
    return with_separate_biases(named)


def _meta_convnext(tensors: Tensors) -> Tensors:
    """ConvNeXt as Meta released it: versions 1 and 2, FCMAE (also sparse), DINOv3."""
    tensors = {name: _without_sparse_axes(name, tensor) for name, tensor in tensors.items()}
    named = renamed(
        tensors,
        (r"^downsample_layers\.0\.", "stem."),
        (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
        (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"\.(?:ln|linear)\.(\w+)$", r".\1"),
        (r"\.kernel$", ".weight"),
        (r"\.dwconv\.", ".conv_dw."),
        (r"\.pwconv(\d)\.", r".mlp.fc\1."),
        (r"\.grn\.gamma$", ".mlp.grn.weight"),
        (r"\.grn\.beta$", ".mlp.grn.bias"),
        (r"^norm\.", "head.norm."),
    )
    return {name: tensor.flatten() if ".grn." in name else tensor for name, tensor in named.items()}


def _without_sparse_axes(name: str, tensor: Tensor) -> Tensor:
    """A tensor of MinkowskiEngine's in torch's shape; it keeps a kernel's places in one axis, columns first."""
    if name.endswith(".kernel") and tensor.ndim in (2, 3) and (side := math.isqrt(len(tensor))) ** 2 == len(tensor):
        square = tensor.unflatten(0, (side, side)) if side else tensor
        if square.ndim == 3:  # (width, height, channels) of a convolution of each channel alone
            return square.permute(2, 1, 0).unsqueeze(1).contiguous()
        if square.ndim == 4:  # (width, height, in, out)
            return square.permute(3, 2, 1, 0).contiguous()
    return tensor.flatten() if name.endswith("conv.bias") or ".1.bias" in name else tensor


def _microsoft_swin(tensors: Tensors) -> Tensors:
    """Swin as Microsoft released it, also of SimMIM, MoBY and EsViT: it downsamples at the end of a layer."""
    shift = (r"^layers\.(\d+)\.downsample\.", lambda found: f"layers.{int(found[1]) + 1}.downsample.")
    return renamed(tensors, shift)


def _beit_shared_bias(tensors: Tensors) -> Tensors:
    """BEiT and SimMIM's ViT with one table of relative positions for all blocks, as BEiT's own code spreads it."""
    table = tensors.get("rel_pos_bias.relative_position_bias_table", torch.empty(0))
    blocks = [found[1] for name in tensors if (found := re.fullmatch(r"(blocks\.\d+\.attn)\.qkv\.weight", name))]
    return {**tensors, **{f"{block}.relative_position_bias_table": table for block in blocks}}


def _huggingface_beit(tensors: Tensors) -> Tensors:
    return to_timm(tensors, "beit", separate_biases=True)


_CLIP_MARK = r"(?<!embeddings\.)class_embedding"
LAYOUTS: dict[str, Layout] = {
    "torchvision vit": Layout(
        *(r"encoder\.layers\.encoder_layer_0\.ln_1\.weight", torchvision_vit),
        fits=r"vit_\w+_patch\d+_\d+$",
    ),
    "torchvision convnext": Layout(r"features\.1\.0\.layer_scale", torchvision_convnext, fits="convnext_"),
    "torchvision swin": Layout(
        *(r"features\.1\.0\.attn\.qkv\.weight", torchvision_swin),
        fits=r"swin_\w+_window7_224|swinv2_\w+_window8_256",
        unlisted=("swin_small_patch4_window7_224",),
    ),
    "torchvision efficientnet": Layout(
        *(r"features\.1\.0\.block\.0\.0\.weight", torchvision_efficientnet),
        fits=r"efficientnet_b\d$|efficientnetv2_",  # timm's tf_ ones pad otherwise
    ),
    # OpenAI's files hold these three numbers of their own; their activation is the quick GELU.
    "openai clip": Layout(
        *(_CLIP_MARK, _clip),
        fits=r"vit_\w+_clip",
        also=r"(.*\.)?(input_resolution|context_length|vocab_size)",
        uses_timm_cfg=True,
    ),
    "clip": Layout(_CLIP_MARK, _clip, fits=r"vit_\w+_clip", uses_timm_cfg=True),
    "dinov3": Layout(
        *(r"storage_tokens", _dinov3),
        fits=r"vit_\w+_dinov3",
        unlisted=tuple(f"vit_{size}_patch16_dinov3_qkvb" for size in ("small", "base", "large")),
    ),
    "jax hybrid": Layout(
        *(r"conv_root\.kernel", jax_hybrid),
        fits=r"vit_\w+_r(26|50)?_s\d+",
        uses_timm_cfg=True,
    ),
    "jax vit": Layout(
        *(r"Transformer\.encoderblock_0\.LayerNorm_0\.scale", jax_vit),
        fits=r"vit_\w+_patch\d+_\d+$",
        uses_timm_cfg=True,
    ),
    "huggingface beit": Layout(  # and Data2Vec's
        r"encoder\.(layer\.0\.(attention\.attention\.)?)?(lambda_1|relative_position_bias\.relative_position_bias_table)",
        _huggingface_beit,
        fits="beit_",
        unlisted=("beit_base_patch16_224", "beit_large_patch16_224"),
        uses_timm_cfg=True,
    ),
    "jax bit": Layout(
        *(r"root_block\.standardized_conv2d\.kernel", jax_bit),
        fits=r"resnetv2_\d+x\d_bit$",
        uses_timm_cfg=True,
    ),
    "jax mixer": Layout(
        *(r"MixerBlock_0\.token_mixing\.Dense_0\.kernel", jax_mixer),
        fits=r"mixer_",
        uses_timm_cfg=True,
    ),
    "clip resnet": Layout(
        *(r"attnpool\.positional_embedding", clip_resnet),
        fits=r"resnet\d+(x\d+)?_clip$",
        uses_timm_cfg=True,
    ),
    # Its networks pad as TensorFlow does and have its epsilon, as timm's tf_ ones.
    "efficientnet_pytorch": Layout(
        *(r"_blocks\.0\._depthwise_conv\.weight", efficientnet_pytorch),
        fits=r"tf_efficientnet_(b\d|l2)$",
    ),
    "beit shared bias": Layout(
        *(r"rel_pos_bias\.relative_position_bias_table", _beit_shared_bias),
        fits="beit",
    ),
    "meta convnext": Layout(r"downsample_layers\.0\.0\.weight", _meta_convnext, fits="convnext"),
    "microsoft swin": Layout(
        *(r"layers\.0\.downsample\.reduction\.weight", _microsoft_swin),
        fits="swin",
        unlisted=("swin_small_patch4_window7_224",),
    ),
}
