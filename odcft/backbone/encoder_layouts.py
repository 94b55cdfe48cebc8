"""timm's names for convolutional encoders of other libraries: CLIP's ResNets and efficientnet_pytorch.

segmentation_models_pytorch keeps the second in its models; its other encoders have torchvision's and timm's names.
"""

import re

from odcft.backbone.rename_tables import Tensors, renamed

_CLIP_LAYERS = {"1": "conv1_1x1", "2": "conv2_kxk", "3": "conv3_1x1"}


def clip_resnet(tensors: Tensors) -> Tensors:
    """The ResNets of OpenAI's CLIP and of open_clip, which end in attention over the image."""
    return renamed(
        tensors,
        (r"^(conv|bn)(\d)\.", r"stem.conv\2.\1."),
        (
            r"^layer(\d)\.(\d+)\.(conv|bn)([123])\.",
            lambda found: f"stages.{int(found[1]) - 1}.{found[2]}.{_CLIP_LAYERS[found[4]]}.{found[3]}.",
        ),
        (
            r"^layer(\d)\.(\d+)\.downsample\.([01])\.",
            lambda found: f"stages.{int(found[1]) - 1}.{found[2]}.shortcut.conv.{('conv', 'bn')[int(found[3])]}.",
        ),
        (r"^attnpool\.positional_embedding$", "head.pos_embed"),
        (r"^attnpool\.([qkv])_proj\.", r"head.\1."),
        (r"^attnpool\.c_proj\.", "head.proj."),
    )


# Of a block without and with expansion: efficientnet_pytorch's names, and timm's.
_EFFICIENTNET_PLAIN = {
    **{"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"},
    **{"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"},
}
_EFFICIENTNET_EXPANDED = {
    **{"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"},
    **{"_project_conv": "conv_pwl", "_bn2": "bn3", "_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"},
}
_EFFICIENTNET_ENDS = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}


def efficientnet_pytorch(tensors: Tensors) -> Tensors:
    """EfficientNets of efficientnet_pytorch, which counts blocks through; a stage is blocks of the same width."""
    places = _places_of_blocks(tensors)
    named: Tensors = {}
    for name, tensor in tensors.items():
        if (found := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)) and int(found[1]) in places:
            number, layer, leaf = found.groups()
            expanded = f"_blocks.{number}._expand_conv.weight" in tensors
            names = _EFFICIENTNET_EXPANDED if expanded else _EFFICIENTNET_PLAIN
            if layer in names:
                stage, block = places[int(number)]
                name = f"blocks.{stage}.{block}.{names[layer]}.{leaf}"
        elif (found := re.fullmatch(r"(\w+)\.(\w+)", name)) and found[1] in _EFFICIENTNET_ENDS:
            name = f"{_EFFICIENTNET_ENDS[found[1]]}.{found[2]}"
        named[name] = tensor
    return named


def _places_of_blocks(tensors: Tensors) -> dict[int, tuple[int, int]]:
    """By a block's number, that of its stage and its number therein."""
    widths = {
        int(found[1]): len(tensor)
        for name, tensor in tensors.items()
        if tensor.ndim and (found := re.fullmatch(r"_blocks\.(\d+)\._project_conv\.weight", name))
    }
    places: dict[int, tuple[int, int]] = {}
    stage, block, width = -1, 0, -1
    for number in sorted(widths):
        stage, block = (stage, block + 1) if widths[number] == width else (stage + 1, 0)
        width = widths[number]
        places[number] = stage, block
    return places
