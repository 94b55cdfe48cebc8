"""timm's names for the tensors of torchvision's ViT, ConvNeXt, Swin and EfficientNet."""

import re
from collections.abc import Callable

from odcft.backbone.rename_tables import Tensors, renamed, with_separate_biases


def torchvision_vit(tensors: Tensors) -> Tensors:
    return renamed(
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


def torchvision_convnext(tensors: Tensors) -> Tensors:
    named = renamed(
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


def torchvision_swin(tensors: Tensors) -> Tensors:
    named = renamed(
        tensors,
        (r"^features\.0\.0\.", "patch_embed.proj."),
        (r"^features\.0\.2\.", "patch_embed.norm."),
        (r"^features\.([2468])\.(reduction|norm)\.", _half("layers.", "downsample")),
        (r"^features\.([1357])\.(\d+)\.", _half("layers.", "blocks")),
        (r"\.mlp\.0\.", ".mlp.fc1."),
        (r"\.mlp\.3\.", ".mlp.fc2."),
    )
    if any(".cpb_mlp." in name for name in named):  # version 2, which sets the bias of the keys to zero
        named = with_separate_biases(named)
    return named


# Of a block with this many parts, at this place of squeeze and excitation (0 for none): timm's names of the others.
_EFFICIENTNET_PARTS = {
    (1, 0): {0: ("conv", "bn1")},
    (2, 0): {0: ("conv_exp", "bn1"), 1: ("conv_pwl", "bn2")},
    (3, 1): {0: ("conv_dw", "bn1"), 2: ("conv_pw", "bn2")},
    (4, 2): {0: ("conv_pw", "bn1"), 1: ("conv_dw", "bn2"), 3: ("conv_pwl", "bn3")},
}


def torchvision_efficientnet(tensors: Tensors) -> Tensors:
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
