"""Give the tensors of other libraries' original releases the names they have in timm.

A layout is recognised by one tensor that no other layout has, under any prefix. timm's own converters do the same work
for some of these layouts, but they need a model of the right size first, and resample silently where sizes differ.

Some layouts also tell what no tensor does: an epsilon, an activation, a size of windows.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from odcft.backbone.non_timm_networks import is_network
from odcft.backbone.transformers_tensors import to_timm

Tensors = dict[str, Tensor]
_LAYER = re.compile(r"(^|\.)(blocks|stages|layers)\.\d+\.")  # under timm's names
_BUFFER = re.compile(r"\.(relative_position_index|relative_coords_table|attn_mask)$|\.attn\.(query|key|value)\.")


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
    return next((name for name, layout in LAYOUTS.items() if _prefix(tensors, layout) is not None), "")


def with_timm_names(tensors: Tensors) -> Tensors:
    """A state dict of one of LAYOUTS under timm's names; others, and tensors outside of the network, as they are."""
    if not (name := layout_of(tensors)):
        return tensors
    layout = LAYOUTS[name]
    prefix = _prefix(tensors, layout) or ""
    inside = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    outside = {key: tensor for key, tensor in tensors.items() if not key.startswith(prefix)}
    return {**outside, **{f"{prefix}{key}": tensor for key, tensor in layout.convert(inside).items()}}


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
    """Arguments that a state dict tells under its own names only: heads of attention (JAX), windows (Swin)."""
    for name, tensor in tensors.items():
        if _JAX_QUERY.search(name) and tensor.ndim == 3:
            return {"num_heads": tensor.shape[1]}
    if layout_of(tensors) == "microsoft swin":
        # Version 2 has a table of 2 x window - 1 coordinates, smaller where a stage is smaller than a window.
        tables = [
            one.shape[1] for name, one in tensors.items() if name.endswith(".relative_coords_table") and one.ndim == 4
        ]
        if tables and 1 <= (window := (max(tables) + 1) // 2) <= 64:
            return {"window_size": window}
    return {}


def twins_by_shape(layout: str, arch: str) -> list[str]:
    """Networks of timm's that a file of this layout fits as well as this one, if nothing in it tells them apart."""
    if layout == "clip" and "_clip_" in arch and is_network(other := arch.replace("_clip_", "_clip_quickgelu_")):
        return [arch, other]
    if layout == "microsoft swin" and is_network(other := arch.replace("_window8_", "_window16_")) and other != arch:
        return [arch, other] if arch.startswith("swinv2") else []
    return []


def without_place(layout: str, dropped: list[str]) -> str:
    """The first tensor of a layer among those that a network has no place for; "" if there is none.

    A deeper network has all tensors of a shallower one, and would otherwise pass for it.
    """
    return next((name for name in dropped if layout and _LAYER.search(name) and not _BUFFER.search(name)), "")


def _prefix(tensors: Mapping[str, Tensor], layout: Layout) -> str | None:
    """What stands before the names of a layout; None if the state dict has another."""
    if layout.also and not any(re.fullmatch(layout.also, name) for name in tensors):
        return None
    pattern = re.compile(rf"(?P<prefix>(?:.*\.)?){layout.mark}")
    return next((found["prefix"] for name in tensors if (found := pattern.fullmatch(name))), None)


def _renamed(tensors: Mapping[str, Tensor], *table: tuple[str, Any]) -> Tensors:
    """The tensors with every line of a table of regular expressions applied to their names, in order."""
    named = {}
    for name, tensor in tensors.items():
        for pattern, replacement in table:
            name = re.sub(pattern, replacement, name)
        named[name] = tensor
    return named


def _torchvision_vit(tensors: Tensors) -> Tensors:
    return _renamed(
        tensors,
        (r"^class_token$", "cls_token"),
        (r"^conv_proj\.", "patch_embed.proj."),
        (r"^encoder\.pos_embedding$", "pos_embed"),
        (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
        (r"\.ln_(\d)\.", r".norm\1."),
        (r"\.self_attention\.in_proj_", ".attn.qkv."),
        (r"\.self_attention\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
        (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
        (r"^encoder\.ln\.", "norm."),
    )


def _half(stages: str, kind: str) -> Callable[[re.Match[str]], str]:
    """torchvision counts what stands between stages as well, timm only stages."""
    return lambda found: f"{stages}{int(found[1]) // 2}.{kind}.{found[2]}."


def _torchvision_convnext(tensors: Tensors) -> Tensors:
    named = _renamed(
        tensors,
        (r"^features\.0\.(\d)\.", r"stem.\1."),
        (r"^features\.([2468])\.(\d)\.", _half("stages.", "downsample")),
        (r"^features\.([1357])\.(\d+)\.", _half("stages.", "blocks")),
        (r"\.layer_scale$", ".gamma"),
        (r"\.block\.0\.", ".conv_dw."),
        (r"\.block\.2\.", ".norm."),
        (r"\.block\.3\.", ".mlp.fc1."),
        (r"\.block\.5\.", ".mlp.fc2."),
        (r"^classifier\.0\.", "head.norm."),
    )
    return {name: tensor.flatten() if name.endswith(".gamma") else tensor for name, tensor in named.items()}


def _torchvision_swin(tensors: Tensors) -> Tensors:
    named = _renamed(
        tensors,
        (r"^features\.0\.0\.", "patch_embed.proj."),
        (r"^features\.0\.2\.", "patch_embed.norm."),
        (r"^features\.([2468])\.(reduction|norm)\.", _half("layers.", "downsample")),
        (r"^features\.([1357])\.(\d+)\.", _half("layers.", "blocks")),
        (r"\.mlp\.0\.", ".mlp.fc1."),
        (r"\.mlp\.3\.", ".mlp.fc2."),
    )
    if any(".cpb_mlp." in name for name in named):  # version 2, which sets the bias of the keys to zero
        named = _with_separate_biases(named)
    return named


def _with_separate_biases(named: Tensors) -> Tensors:
    """The biases of query and value on their own; that of the keys counts for nothing in these networks."""
    split: Tensors = {}
    for name, tensor in named.items():
        if name.endswith(".attn.qkv.bias") and tensor.ndim == 1 and len(tensor) % 3 == 0:
            start = name.removesuffix("qkv.bias")
            split[f"{start}q_bias"], _, split[f"{start}v_bias"] = tensor.chunk(3)
        else:
            split[name] = tensor
    return split


# Of a block with this many parts, at this place of squeeze and excitation (0 for none): timm's names of the others.
_EFFICIENTNET_PARTS = {
    (1, 0): {0: ("conv", "bn1")},
    (2, 0): {0: ("conv_exp", "bn1"), 1: ("conv_pwl", "bn2")},
    (3, 1): {0: ("conv_dw", "bn1"), 2: ("conv_pw", "bn2")},
    (4, 2): {0: ("conv_pw", "bn1"), 1: ("conv_dw", "bn2"), 3: ("conv_pwl", "bn3")},
}


def _torchvision_efficientnet(tensors: Tensors) -> Tensors:
    blocks: dict[str, set[int]] = {}
    excited: dict[str, int] = {}
    for name in tensors:
        if found := re.match(r"features\.(\d+\.\d+)\.block\.(\d+)\.(fc1)?", name):
            blocks.setdefault(found[1], set()).add(int(found[2]))
            if found[3]:
                excited[found[1]] = int(found[2])
    named: Tensors = {}
    for name, tensor in tensors.items():
        if found := re.fullmatch(r"features\.(\d+)\.(\d+)\.block\.(\d+)\.(\w+)\.(\w+)", name):
            stage, block, part, layer, leaf = found.groups()
            key = f"{stage}.{block}"
            start = f"blocks.{int(stage) - 1}.{block}"
            parts = _EFFICIENTNET_PARTS.get((len(blocks[key]), excited.get(key, 0)), {})
            if layer in ("fc1", "fc2"):
                name = f"{start}.se.{'conv_reduce' if layer == 'fc1' else 'conv_expand'}.{leaf}"
            elif int(part) in parts and layer in ("0", "1"):
                name = f"{start}.{parts[int(part)][int(layer)]}.{leaf}"
        elif found := re.fullmatch(r"features\.(\d+)\.([01])\.(\w+)", name):
            first = found[1] == "0"
            conv, norm = ("conv_stem", "bn1") if first else ("conv_head", "bn2")
            name = f"{(conv, norm)[int(found[2])]}.{found[3]}"
        named[name] = tensor
    return named


def _clip(tensors: Tensors) -> Tensors:
    """OpenAI's and open_clip's image towers."""
    named = _renamed(
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
    named = _renamed(
        {name: tensor for name, tensor in tensors.items() if not fixed.fullmatch(name)},
        (r"^storage_tokens$", "reg_token"),
        (r"\.ls(\d)\.gamma$", r".gamma_\1"),
        (r"\.mlp\.w1\.", ".mlp.fc1_g."),
        (r"\.mlp\.w2\.", ".mlp.fc1_x."),
        (r"\.mlp\.w3\.", ".mlp.fc2."),
    )
    return _with_separate_biases(named)


def _meta_convnext(tensors: Tensors) -> Tensors:
    """ConvNeXt as Meta released it: versions 1 and 2, FCMAE, DINOv3."""
    named = _renamed(
        tensors,
        (r"^downsample_layers\.0\.", "stem."),
        (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
        (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"\.dwconv\.", ".conv_dw."),
        (r"\.pwconv(\d)\.", r".mlp.fc\1."),
        (r"\.grn\.gamma$", ".mlp.grn.weight"),
        (r"\.grn\.beta$", ".mlp.grn.bias"),
        (r"^norm\.", "head.norm."),
    )
    return {name: tensor.flatten() if ".grn." in name else tensor for name, tensor in named.items()}


def _microsoft_swin(tensors: Tensors) -> Tensors:
    """Swin as Microsoft released it, also of SimMIM, MoBY and EsViT: it downsamples at the end of a layer."""
    shift = (r"^layers\.(\d+)\.downsample\.", lambda found: f"layers.{int(found[1]) + 1}.downsample.")
    return _renamed(tensors, shift)


_JAX_QUERY = re.compile(r"(^|\.)Transformer\.encoderblock_0\.MultiHeadDotProductAttention_\d\.query\.kernel$")


def _jax_vit(tensors: Tensors) -> Tensors:
    """Vision transformers as JAX writes them; the axes of their arrays are in another order."""
    named = _renamed(
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


def _huggingface_beit(tensors: Tensors) -> Tensors:
    return to_timm(tensors, "beit", separate_biases=True)


_CLIP_MARK = r"(?<!embeddings\.)class_embedding"
LAYOUTS: dict[str, Layout] = {
    "torchvision vit": Layout(
        *(r"encoder\.layers\.encoder_layer_0\.ln_1\.weight", _torchvision_vit),
        fits=r"vit_\w+_patch\d+_\d+$",
    ),
    "torchvision convnext": Layout(r"features\.1\.0\.layer_scale", _torchvision_convnext, fits="convnext_"),
    "torchvision swin": Layout(
        *(r"features\.1\.0\.attn\.qkv\.weight", _torchvision_swin),
        fits=r"swin_\w+_window7_224|swinv2_\w+_window8_256",
        unlisted=("swin_small_patch4_window7_224",),
    ),
    "torchvision efficientnet": Layout(
        *(r"features\.1\.0\.block\.0\.0\.weight", _torchvision_efficientnet),
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
    "jax vit": Layout(
        *(r"Transformer\.encoderblock_0\.LayerNorm_0\.scale", _jax_vit),
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
    "meta convnext": Layout(r"downsample_layers\.0\.0\.weight", _meta_convnext, fits="convnext"),
    "microsoft swin": Layout(
        *(r"layers\.0\.downsample\.reduction\.weight", _microsoft_swin),
        fits="swin",
        unlisted=("swin_small_patch4_window7_224",),
    ),
}
