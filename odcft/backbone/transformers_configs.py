"""Describe a network of timm's as the config.json of Hugging Face's transformers: the inverse of transformers_twins.py.

What is described is read off the network that was built, not off its name, so arguments and a new image size are in it.
Whether transformers computes the same is checked by `transformers_export.py`, which reads the description back.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import nn

from odcft.backbone.network import Backbone
from odcft.backbone.transformers_twins import mlp_ratio
from odcft.errors import OdcftError

# By model_type: the name of transformers' class.
CLASSES = {
    "vit": "ViTModel",
    "vit_mae": "ViTMAEModel",
    "vit_msn": "ViTMSNModel",
    "deit": "DeiTModel",
    "ijepa": "IJepaModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
    "dinov3_convnext": "DINOv3ConvNextModel",
    "beit": "BeitModel",
    "data2vec-vision": "Data2VecVisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "swin": "SwinModel",
    "swinv2": "Swinv2Model",
    "convnext": "ConvNextModel",
    "convnextv2": "ConvNextV2Model",
    "regnet": "RegNetModel",
    "mobilevit": "MobileViTModel",
    "resnet": "ResNetModel",
}
_TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}  # only the images' half is written
_FAMILIES = (
    "ViT (also as MAE and MSN), DeiT, I-JEPA, DINOv2, DINOv3, BEiT, Data2Vec, CLIP, SigLIP, Swin, ConvNeXt, RegNet, "
    "MobileViT and ResNet"
)
# By the name of a layer's class: what transformers calls an activation.
_ACTIVATIONS = {
    "GELUTanh": "gelu_pytorch_tanh",
    "QuickGELU": "quick_gelu",
    "ReLU": "relu",
    "ReLU6": "relu6",
    "LeakyReLU": "leaky_relu",
    "ELU": "elu",
    "SiLU": "silu",
    "Swish": "silu",
    "Mish": "mish",
    "Hardswish": "hardswish",
    "HardSwish": "hardswish",
}


@dataclass
class Description:
    """What a network is in transformers.

    Attributes:
        model_type: a key of CLASSES.
        config: the fields of config.json that say what it computes.
        features: which of the model's outputs are the features, as Python.
        arguments: of `AutoModel.from_pretrained` that these features need.
        class_position: timm adds no position embedding to the class token, where transformers does.
        twin: the name of timm's network that it must equal, where transformers_twins.py leaves it to the tensors.
    """

    model_type: str
    config: dict[str, Any]
    features: str = "pooler_output"
    arguments: dict[str, Any] = field(default_factory=dict)
    class_position: bool = False
    twin: str = ""


def refuse(backbone: Backbone, why: str) -> NoReturn:
    """Refuse a network that transformers cannot compute."""
    raise OdcftError(
        f"--format transformers: odcft knows no network of transformers that computes what this {backbone.arch} does "
        f"({why}). It writes {_FAMILIES}. Use --format timm or safetensors."
    )


def describe(backbone: Backbone) -> Description:
    """Describe a network as one of transformers' families: that of the folder it came from, if it fits.

    Raises:
        OdcftError: no family has such a network.
    """
    net: Any = backbone.net
    kind = type(net).__name__
    if kind not in _BY_CLASS:
        refuse(backbone, f"a network of the class {kind}")
    try:
        return _BY_CLASS[kind](backbone, net)
    except (AttributeError, IndexError, TypeError):  # a variant of the class, with other layers than the usual
        refuse(backbone, "its layers are of another kind")


def activation(layer: nn.Module) -> str:
    """What transformers calls an activation; "" for other layers."""
    kind = type(layer).__name__
    if kind == "GELU":
        return "gelu_pytorch_tanh" if getattr(layer, "approximate", "none") == "tanh" else "gelu"
    return _ACTIVATIONS.get(kind, "")


def _one(backbone: Backbone, values: list[Any], what: str) -> Any:
    """The value that all layers share."""
    if not values:
        refuse(backbone, "its norms are of another kind")
    if len(set(values)) != 1:
        refuse(backbone, f"its layers differ in {what}: {', '.join(map(str, dict.fromkeys(values)))}")
    return values[0]


def _square(backbone: Backbone, sides: Any, what: str) -> int:
    return int(_one(backbone, list(sides) if isinstance(sides, tuple | list) else [sides], what))


def _epsilon(backbone: Backbone) -> float:
    norms = [layer.eps for layer in backbone.net.modules() if isinstance(layer, nn.LayerNorm)]
    return float(_one(backbone, norms, "the epsilon of their norms"))


def _preferred(backbone: Backbone, *kinds: str) -> str:
    """The family of the folder that a network came from, if it is one of these; otherwise the first."""
    came_from = _TOWERS.get(backbone.model_type, backbone.model_type)
    return came_from if came_from in kinds else kinds[0]


def _transformer(backbone: Backbone, net: Any) -> dict[str, Any]:
    """Sizes, epsilon and activation of a transformer whose blocks are all alike."""
    first = net.blocks[0]
    if type(net.patch_embed).__name__ != "PatchEmbed":
        refuse(backbone, "its patches are embedded in another way")
    return {
        "hidden_size": net.embed_dim,
        "num_hidden_layers": len(net.blocks),
        "num_attention_heads": first.attn.num_heads,
        "intermediate_size": first.mlp.fc2.in_features,
        "image_size": _square(backbone, net.patch_embed.img_size, "the sides of its images"),
        "patch_size": _square(backbone, net.patch_embed.patch_size, "the sides of its patches"),
        "num_channels": net.patch_embed.proj.in_channels,
        "layer_norm_eps": _epsilon(backbone),
        "hidden_act": activation(first.mlp.act),
    }


def _vit(backbone: Backbone, net: Any) -> Description:
    config, first = _transformer(backbone, net), net.blocks[0]
    without_position = bool(net.no_embed_class and net.has_class_token)
    if net.attn_pool is not None:
        return Description("siglip_vision_model", {**config, "vision_use_head": True})
    if not isinstance(net.norm_pre, nn.Identity):
        return Description("clip_vision_model", config, class_position=without_position)
    config["qkv_bias"] = first.attn.qkv.bias is not None
    if not net.has_class_token:
        usual = "siglip_vision_model" if "siglip" in backbone.arch else "ijepa"
        model_type = _preferred(backbone, usual, "ijepa", "siglip_vision_model")
        if model_type == "siglip_vision_model":
            config["vision_use_head"] = False
        return Description(model_type, config, "last_hidden_state.mean(1)")
    if not isinstance(first.ls1, nn.Identity):
        return _dinov2(backbone, net, config, without_position)
    model_type = _preferred(backbone, "vit", "vit_mae", "vit_msn")
    if model_type == "vit_mae":
        config["mask_ratio"] = 0.0  # otherwise AutoModel leaves out three patches of four
    arguments = {"add_pooling_layer": False} if model_type == "vit" else {}
    return Description(model_type, config, "last_hidden_state[:, 0]", arguments, without_position)


def _dinov2(backbone: Backbone, net: Any, config: dict[str, Any], without_position: bool) -> Description:
    first, width, hidden = net.blocks[0], net.embed_dim, config.pop("intermediate_size")
    config["use_swiglu_ffn"] = swiglu = first.mlp.fc1.out_features == 2 * hidden
    # transformers computes the width of SwiGLU from a ratio: two thirds of it, up to the next multiple of 8.
    ratios = [
        ratio
        for ratio in range(1, 17)
        if ((int(width * ratio * 2 / 3) + 7) // 8 * 8 if swiglu else width * ratio) == hidden
    ]
    if not ratios:
        refuse(backbone, f"its MLP has {hidden} units, not a whole multiple of {width}")
    config["mlp_ratio"] = ratios[0]
    if net.reg_token is not None:
        config["num_register_tokens"] = net.reg_token.shape[1]
        return Description("dinov2_with_registers", config, class_position=without_position)
    return Description("dinov2", config, class_position=without_position)


def _deit(backbone: Backbone, net: Any) -> Description:
    config = {**_transformer(backbone, net), "qkv_bias": net.blocks[0].attn.qkv.bias is not None}
    return Description("deit", config, "last_hidden_state[:, :2].mean(1)", {"add_pooling_layer": False})


def _dinov3(backbone: Backbone, net: Any) -> Description:
    first = net.blocks[0]
    if type(net.rope).__name__ != "RotaryEmbeddingDinoV3":
        refuse(backbone, "its position embedding is not that of DINOv3")
    gated, biases = hasattr(first.mlp, "fc1_g"), first.attn.q_bias is not None
    config = {
        **_transformer(backbone, net),
        "num_register_tokens": 0 if net.reg_token is None else net.reg_token.shape[1],
        "use_gated_mlp": gated,
        "query_bias": biases,
        "key_bias": False,
        "value_bias": biases,
        "proj_bias": True,
        "mlp_bias": True,
        "rope_theta": 100.0,
    }
    if net.global_pool != "token":
        refuse(
            backbone,
            "it averages its patches, but DINOv3 in transformers gives the class token, as --arch-args "
            "global_pool=token does",
        )
    return Description("dinov3_vit", config)


def _beit(backbone: Backbone, net: Any) -> Description:
    first, mean = net.blocks[0], not isinstance(net.fc_norm, nn.Identity)
    if first.attn.q_bias is None:
        refuse(backbone, "its queries and values have no bias")
    config = {
        **_transformer(backbone, net),
        "use_absolute_position_embeddings": net.pos_embed is not None,
        "use_relative_position_bias": first.attn.relative_position_bias_table is not None,
        "use_shared_relative_position_bias": net.rel_pos_bias is not None,
        "use_mean_pooling": mean,
        "layer_scale_init_value": 0.0 if first.gamma_1 is None else 0.1,
    }
    model_type = _preferred(backbone, "beit", "data2vec-vision")
    return Description(model_type, config, arguments={"add_pooling_layer": True} if model_type != "beit" else {})


def _swin(backbone: Backbone, net: Any) -> Description:
    second = type(net).__name__ == "SwinTransformerV2"
    blocks = [stage.blocks[0] for stage in net.layers]
    windows = [_square(backbone, block.window_size, "the sides of their windows") for block in blocks]
    # Where images are small, both give SwinV2 smaller windows; Swin's have a table of one size.
    window = max(windows) if second else _one(backbone, windows, "the size of their windows")
    config = {
        "embed_dim": net.embed_dim[0] if isinstance(net.embed_dim, list | tuple) else net.embed_dim,
        "depths": [len(stage.blocks) for stage in net.layers],
        "num_heads": [block.attn.num_heads for block in blocks],
        "window_size": window,
        "image_size": _square(backbone, net.patch_embed.img_size, "the sides of its images"),
        "patch_size": _square(backbone, net.patch_embed.patch_size, "the sides of its patches"),
        "num_channels": net.patch_embed.proj.in_channels,
        "mlp_ratio": mlp_ratio(blocks[0].mlp.fc1.in_features, blocks[0].mlp.fc1.out_features),
        "qkv_bias": (blocks[0].attn.q_bias if second else blocks[0].attn.qkv.bias) is not None,
        "layer_norm_eps": _epsilon(backbone),
        "hidden_act": activation(blocks[0].mlp.act),
    }
    if second:
        config["pretrained_window_sizes"] = [
            _square(backbone, block.attn.pretrained_window_size, "the sides of their windows") for block in blocks
        ]
    return Description("swinv2" if second else "swin", config)


def _convnext(backbone: Backbone, net: Any) -> Description:
    blocks = [stage.blocks[0] for stage in net.stages]
    second = hasattr(blocks[0].mlp, "grn")
    config = {
        "num_channels": net.stem[0].in_channels,
        "patch_size": _square(backbone, net.stem[0].kernel_size, "the sides of its patches"),
        "hidden_sizes": [block.conv_dw.out_channels for block in blocks],
        "depths": [len(stage.blocks) for stage in net.stages],
        "hidden_act": activation(blocks[0].mlp.act),
        "layer_norm_eps": _epsilon(backbone),
        "image_size": backbone.size,
    }
    if second:
        return Description("convnextv2", config)
    if blocks[0].gamma is None:
        refuse(backbone, "it does not scale its layers")
    may_be_dinov3 = config["patch_size"] == 4
    model_type = _preferred(backbone, "convnext", *["dinov3_convnext"] * may_be_dinov3)
    return Description(model_type, config if model_type != "convnext" else {**config, "layer_scale_init_value": 1e-6})


def _regnet(backbone: Backbone, net: Any) -> Description:
    stages = [list(getattr(net, f"s{number}").children()) for number in range(1, 5)]
    blocks = [block for stage in stages for block in stage]
    first = blocks[0].conv2.conv
    group, squeezed = first.in_channels // first.groups, "SEModule" in {type(block.se).__name__ for block in blocks}
    for block in blocks:
        wide, groups = block.conv2.conv.out_channels, block.conv2.conv.groups
        if groups != max(1, wide // group):
            refuse(backbone, f"its convolutions of {wide} channels have {groups} groups")
        if squeezed and block.se.fc1.out_channels != round(block.conv1.conv.in_channels / 4):
            refuse(backbone, f"it squeezes {wide} channels to {block.se.fc1.out_channels}")
    config = {
        "num_channels": net.stem.conv.in_channels,
        "embedding_size": net.stem.conv.out_channels,
        "hidden_sizes": [stage[0].conv3.conv.out_channels for stage in stages],
        "depths": [len(stage) for stage in stages],
        "groups_width": group,
        "layer_type": "y" if squeezed else "x",
        "hidden_act": activation(net.stem.bn.act),
        "downsample_in_first_stage": True,
    }
    return Description("regnet", config, "pooler_output.flatten(1)")


def _mobilevit(backbone: Backbone, net: Any) -> Description:
    first, blocks = net.stages[0][0], [stage[1] for stage in net.stages[2:]]
    config = {
        "num_channels": net.stem.conv.in_channels,
        "image_size": backbone.size,
        "hidden_sizes": [block.norm.normalized_shape[0] for block in blocks],
        "neck_hidden_sizes": [
            net.stem.conv.out_channels,
            *(stage[0].conv3_1x1.conv.out_channels for stage in net.stages),
            net.final_conv.conv.out_channels,
        ],
        "num_attention_heads": blocks[0].transformer[0].attn.num_heads,
        "expand_ratio": first.conv1_1x1.conv.out_channels / first.conv1_1x1.conv.in_channels,
        "mlp_ratio": blocks[0].transformer[0].mlp.fc1.out_features / blocks[0].norm.normalized_shape[0],
        "hidden_act": activation(net.stem.bn.act),
        "layer_norm_eps": _epsilon(backbone),
        "conv_kernel_size": blocks[0].conv_kxk.conv.kernel_size[0],
        "patch_size": blocks[0].patch_size[0],
        "output_stride": 32,
        "qkv_bias": True,
    }
    return Description("mobilevit", config)


# timm's ResNets that are plain: depths of the four stages, and whether their blocks have three convolutions.
_RESNETS: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((2, 2, 2, 2), True): "resnet26",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}


def _resnet(backbone: Backbone, net: Any) -> Description:
    stages = [net.layer1, net.layer2, net.layer3, net.layer4]
    deep = hasattr(net.layer1[0], "conv3")
    depths = tuple(map(len, stages))
    if (depths, deep) not in _RESNETS:
        refuse(backbone, f"a ResNet of the depths {', '.join(map(str, depths))}")
    config = {
        "num_channels": net.conv1.in_channels,
        "embedding_size": net.conv1.out_channels,
        "hidden_sizes": [getattr(stage[0], "conv3" if deep else "conv2").out_channels for stage in stages],
        "depths": list(depths),
        "layer_type": "bottleneck" if deep else "basic",
        "hidden_act": activation(net.act1),
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    }
    return Description("resnet", config, "pooler_output.flatten(1)", twin=_RESNETS[depths, deep])


# By the name of timm's class.
_BY_CLASS: dict[str, Callable[[Backbone, Any], Description]] = {
    "VisionTransformer": _vit,
    "VisionTransformerDistilled": _deit,
    "Eva": _dinov3,
    "Beit": _beit,
    "SwinTransformer": _swin,
    "SwinTransformerV2": _swin,
    "ConvNeXt": _convnext,
    "RegNet": _regnet,
    "ByobNet": _mobilevit,
    "ResNet": _resnet,
}
