"""Turn the config.json of a folder of Hugging Face's transformers into a name and arguments of timm's.

What timm's network cannot compute the same way, such as another activation, epsilon or position embedding, is refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from odcft.backbone.non_timm_networks import is_network, shapes
from odcft.backbone.transformers_schemas import (
    Beit,
    Clip,
    Config,
    Convnext,
    Dinov2,
    Dinov3,
    Dinov3Convnext,
    Mobilevit,
    Regnet,
    Resnet,
    Siglip,
    Swin,
    Vit,
)
from odcft.backbone.transformers_tensors import to_timm
from odcft.errors import OdcftError
from odcft.text import short_repr

# timm fixes the epsilon of most norms at 1e-6, where transformers often has 1e-12. Next to variances around 1 that is
# some millionths; a larger difference is refused.
MAX_EPSILON_DIFFERENCE = 1.01e-6
# transformers' names of activations, and timm's.
_ACTIVATIONS = {
    **{name: name for name in ("gelu", "relu", "silu", "quick_gelu", "mish", "relu6", "leaky_relu", "elu")},
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "gelu_tanh"),
    "swish": "silu",
    "hardswish": "hard_swish",
}


@dataclass
class Plan:
    """How a family's tensors become those of a network of timm's."""

    arch: str
    arguments: dict[str, Any]
    table: str
    separate_biases: bool = False
    registers: bool = False
    notes: list[str] = field(default_factory=list)


def _refuse(where: Path, name: str, value: Any, why: str) -> NoReturn:
    raise OdcftError(
        f"{where}: {name}={short_repr(value)}, but {why}, so features would differ. Use another checkpoint."
    )


def _square(side: int | list[int], where: Path, name: str) -> int:
    """One number for both sides."""
    if isinstance(side, list):
        if side[0] != side[1]:
            _refuse(where, name, side, "odcft gives networks square images")
        return side[0]
    return side


def _activation(config: Any, where: Path) -> str:
    if config.hidden_act not in _ACTIVATIONS:
        _refuse(where, "hidden_act", config.hidden_act, "odcft knows no such activation")
    return _ACTIVATIONS[config.hidden_act]


def _only_activation(config: Any, where: Path, wanted: str, arch: str) -> None:
    """Refuse another activation than the one that timm's network always has."""
    if _activation(config, where) != wanted:
        _refuse(where, "hidden_act", config.hidden_act, f"timm's {arch} always has {wanted}")


def _epsilon_notes(config: Any, where: Path, own: float, arch: str) -> list[str]:
    """Refuse another epsilon than timm's; a note for one so near that it makes no difference."""
    if config.layer_norm_eps == own:
        return []
    if abs(config.layer_norm_eps - own) > MAX_EPSILON_DIFFERENCE:
        _refuse(where, "layer_norm_eps", config.layer_norm_eps, f"timm's {arch} has {own:g}")
    return [
        f"layer_norm_eps is {own:g} in timm's network, not {config.layer_norm_eps:g}, which changes next to nothing"
    ]


# Width, depth and heads of the usual sizes of vision transformers.
_VIT_SIZES = {
    (192, 12, 3): "tiny",
    (384, 12, 6): "small",
    (768, 12, 12): "base",
    (1024, 24, 16): "large",
    (1280, 32, 16): "huge",
}


def _vit_network(config: Any, where: Path, pattern: str, spare: str, ratio: float | None = None) -> tuple[str, dict]:
    """The name of a vision transformer of a usual size, or `spare` with its sizes as arguments.

    Args:
        config: its sizes.
        where: for messages.
        pattern: timm's name, with {size} and {patch} in it.
        spare: a name of the same kind, for other sizes.
        ratio: of the MLP's width to the network's; otherwise from `intermediate_size`, or `mlp_ratio`.
    """
    side, patch = _square(config.image_size, where, "image_size"), _square(config.patch_size, where, "patch_size")
    width, depth, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    if width % heads:
        _refuse(where, "num_attention_heads", heads, f"hidden_size={width} is not a multiple of it")
    ratio = ratio or mlp_ratio(width, config.intermediate_size or int(width * config.mlp_ratio))
    size = _VIT_SIZES.get((width, depth, heads), "")
    name = pattern.format(size=size, patch=patch)
    arguments: dict[str, Any] = {}
    if config.num_channels != 3:
        arguments["in_chans"] = config.num_channels
    if size and ratio == 4 and is_network(name):
        return name, arguments if side == _usual_side(name) else {"img_size": side, **arguments}
    sizes = {
        "img_size": side,
        "patch_size": patch,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": ratio,
    }
    return spare, {**arguments, **sizes}


def _usual_side(arch: str) -> int:
    """The side in pixels of the images that timm builds a network for."""
    import timm

    cfg = timm.get_pretrained_cfg(arch)
    return cfg.input_size[-1] if cfg is not None else 0


def has_fixed_size(arch: str) -> bool:
    import timm

    cfg = timm.get_pretrained_cfg(arch)
    return cfg is not None and bool(cfg.fixed_input_size)


def mlp_ratio(width: int, hidden: int) -> float:
    """The ratio from which timm computes exactly this number of hidden units."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _vit(config: Any, where: Path) -> Plan:
    arch, arguments = _vit_network(config, where, "vit_{size}_patch{patch}_224", "vit_base_patch16_224")
    own = 1e-6
    if config.layer_norm_eps > 5e-6:  # this one of timm's has another epsilon
        arch, arguments = _vit_network(config, where, "-", "vit_base_patch16_clip_224")
        arguments["pre_norm"], own = False, 1e-5
    if not config.qkv_bias:
        arguments["qkv_bias"] = False
    return _with_activation(config, where, Plan(arch, arguments, "vit", notes=_epsilon_notes(config, where, own, arch)))


def _deit(config: Any, where: Path) -> Plan:
    arch, arguments = _vit_network(
        config, where, "deit_{size}_distilled_patch{patch}_224", "deit_base_distilled_patch16_224"
    )
    if not config.qkv_bias:
        arguments["qkv_bias"] = False
    return _with_activation(
        config, where, Plan(arch, arguments, "vit", notes=_epsilon_notes(config, where, 1e-6, arch))
    )


def _ijepa(config: Any, where: Path) -> Plan:
    plan = _vit(config, where)
    plan.arguments |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    return plan


def _with_activation(config: Any, where: Path, plan: Plan, usual: str = "gelu") -> Plan:
    if (name := _activation(config, where)) != usual:
        plan.arguments["act_layer"] = name
    return plan


def _dinov2(config: Any, where: Path) -> Plan:
    registers, width = config.num_register_tokens, config.hidden_size
    kind = "reg4_dinov2" if registers else "dinov2"
    spare, ratio = f"vit_small_patch14_{kind}", None
    if config.use_swiglu_ffn:
        hidden = (int(int(width * config.mlp_ratio) * 2 / 3) + 7) // 8 * 8
        spare, ratio = f"vit_giant_patch14_{kind}", mlp_ratio(width, 2 * hidden)
    pattern = f"vit_{{size}}_patch{{patch}}_{kind}"
    arch, arguments = _vit_network(config, where, pattern, spare, ratio)
    if registers not in (0, 4):
        arguments["reg_tokens"] = registers
    if not config.qkv_bias:
        arguments["qkv_bias"] = False
    notes = _epsilon_notes(config, where, 1e-6, arch)
    table = "dinov2 swiglu" if config.use_swiglu_ffn else "dinov2"
    plan = Plan(arch, arguments, table, registers=registers > 0, notes=notes)
    return plan if config.use_swiglu_ffn else _with_activation(config, where, plan)


def _dinov3(config: Any, where: Path) -> Plan:
    theta = config.rope_parameters.get("rope_theta", config.rope_theta)
    if theta != 100:
        _refuse(where, "rope_theta", theta, "timm's DINOv3 has 100")
    for name in ("proj_bias", "mlp_bias"):
        if not getattr(config, name):
            _refuse(where, name, False, "timm's DINOv3 has that bias")
    if config.query_bias != config.value_bias:
        _refuse(where, "query_bias", config.query_bias, "timm's DINOv3 has the biases of query and value, or neither")
    plus, biases = "_plus" * config.use_gated_mlp, "_qkvb" * config.query_bias
    spare = f"vit_small{plus}_patch16_dinov3{biases}"
    arch, arguments = _vit_network(config, where, f"vit_{{size}}{plus}_patch{{patch}}_dinov3{biases}", spare)
    arguments["global_pool"] = "token"
    if config.num_register_tokens != 4:
        arguments["num_reg_tokens"] = config.num_register_tokens
    _only_activation(config, where, "silu" if plus else "gelu", arch)
    notes = _epsilon_notes(config, where, 1e-5, arch)
    return Plan(arch, arguments, "dinov3 gated" if plus else "dinov3", separate_biases=True, notes=notes)


def _beit(config: Any, where: Path) -> Plan:
    arch, arguments = _vit_network(config, where, "beit_{size}_patch{patch}_224", "beit_base_patch16_224")
    _only_activation(config, where, "gelu", arch)
    if config.use_absolute_position_embeddings:
        arguments["use_abs_pos_emb"] = True
    if not config.use_relative_position_bias:
        arguments["use_rel_pos_bias"] = False
    if config.use_shared_relative_position_bias:
        arguments["use_shared_rel_pos_bias"] = True
    if config.use_relative_position_bias and config.use_shared_relative_position_bias:
        _refuse(where, "use_shared_relative_position_bias", True, "timm's BEiT has that bias shared or not, not both")
    if not config.use_mean_pooling:
        arguments["global_pool"] = "token"
    if not config.layer_scale_init_value:
        arguments["init_values"] = 0.0
    notes = _epsilon_notes(config, where, 1e-6, arch)
    return Plan(arch, arguments, "beit", separate_biases=True, notes=notes)


def _clip(config: Any, where: Path) -> Plan:
    activation = _activation(config, where)
    kind = "clip_quickgelu_224" if activation == "quick_gelu" else "clip_224"
    arch, arguments = _vit_network(config, where, f"vit_{{size}}_patch{{patch}}_{kind}", f"vit_base_patch16_{kind}")
    plan = Plan(arch, arguments, "clip", notes=_epsilon_notes(config, where, 1e-5, arch))
    return _with_activation(config, where, plan, "quick_gelu" if activation == "quick_gelu" else "gelu")


def _siglip(config: Any, where: Path) -> Plan:
    kind = "siglip_224" if config.vision_use_head else "siglip_gap_224"
    arch, arguments = _vit_network(config, where, f"vit_{{size}}_patch{{patch}}_{kind}", f"vit_base_patch16_{kind}")
    plan = Plan(arch, arguments, "clip", notes=_epsilon_notes(config, where, 1e-6, arch))
    return _with_activation(config, where, plan)


# Width of the first stage and depths of the usual sizes of Swin.
_SWIN_SIZES = {
    (96, (2, 2, 6, 2)): "tiny",
    (96, (2, 2, 18, 2)): "small",
    (128, (2, 2, 18, 2)): "base",
    (192, (2, 2, 18, 2)): "large",
}


def _swin_network(config: Any, where: Path, pattern: str, spare: str) -> tuple[str, dict[str, Any]]:
    """The name of a Swin of a usual size, or `spare` with its sizes as arguments."""
    side, patch = _square(config.image_size, where, "image_size"), _square(config.patch_size, where, "patch_size")
    if config.use_absolute_embeddings:
        _refuse(where, "use_absolute_embeddings", True, "timm's Swin has no absolute position embedding")
    if len(config.depths) != len(config.num_heads):
        _refuse(where, "num_heads", config.num_heads, f"depths={config.depths} has another length")
    size = _SWIN_SIZES.get((config.embed_dim, tuple(config.depths)), "")
    name = pattern.format(size=size, window=config.window_size, side=side)
    usual = config.num_heads == [config.embed_dim // 32 * 2**stage for stage in range(len(config.depths))]
    arguments: dict[str, Any] = {"in_chans": config.num_channels} if config.num_channels != 3 else {}
    if not config.qkv_bias:
        arguments["qkv_bias"] = False
    if size and usual and patch == 4 and config.mlp_ratio == 4 and is_network(name):
        return name, {"img_size": side, **arguments}
    sizes = {"img_size": side, "patch_size": patch, "window_size": config.window_size, "embed_dim": config.embed_dim}
    stages = {"depths": config.depths, "num_heads": config.num_heads, "mlp_ratio": float(config.mlp_ratio)}
    return spare, {**arguments, **sizes, **stages}


def _swin(config: Any, where: Path) -> Plan:
    pattern, spare = "swin_{size}_patch4_window{window}_{side}", "swin_tiny_patch4_window7_224"
    arch, arguments = _swin_network(config, where, pattern, spare)
    _only_activation(config, where, "gelu", arch)
    return Plan(arch, arguments, "swin", notes=_epsilon_notes(config, where, 1e-5, arch))


def _swinv2(config: Any, where: Path) -> Plan:
    arch, arguments = _swin_network(config, where, "swinv2_{size}_window{window}_{side}", "swinv2_tiny_window8_256")
    if any(config.pretrained_window_sizes):
        arguments["pretrained_window_sizes"] = config.pretrained_window_sizes
    plan = Plan(arch, arguments, "swin", separate_biases=True, notes=_epsilon_notes(config, where, 1e-5, arch))
    return _with_activation(config, where, plan)


# Width of the first stage and depths of the usual sizes of ConvNeXt; later stages are twice as wide.
_CONVNEXT_SIZES = {
    (96, (3, 3, 9, 3)): "tiny",
    (96, (3, 3, 27, 3)): "small",
    (128, (3, 3, 27, 3)): "base",
    (192, (3, 3, 27, 3)): "large",
    (256, (3, 3, 27, 3)): "xlarge",
    (352, (3, 3, 27, 3)): "huge",
}


def _convnext(config: Any, where: Path, kind: str = "convnext") -> Plan:
    widths = config.hidden_sizes
    if len(widths) != len(config.depths):
        _refuse(where, "depths", config.depths, f"hidden_sizes={widths} has another length")
    size = _CONVNEXT_SIZES.get((widths[0], tuple(config.depths)), "")
    doubled = all(width == widths[0] * 2**stage for stage, width in enumerate(widths))
    arch, arguments = f"{kind}_{size}", {}
    if not (size and doubled and is_network(arch)):
        arch, arguments = f"{kind}_tiny", {"depths": config.depths, "dims": widths}
    patch = _square(config.patch_size, where, "patch_size")
    if patch != 4:
        arguments["patch_size"] = patch
    if config.num_channels != 3:
        arguments["in_chans"] = config.num_channels
    if kind == "convnext" and not config.layer_scale_init_value:
        _refuse(where, "layer_scale_init_value", 0, "timm's ConvNeXt scales its layers")
    plan = Plan(arch, arguments, "convnext", notes=_epsilon_notes(config, where, 1e-6, arch))
    return _with_activation(config, where, plan)


def _convnextv2(config: Any, where: Path) -> Plan:
    return _convnext(config, where, "convnextv2")


def _dinov3_convnext(config: Any, where: Path) -> Plan:
    plan = _convnext(config, where)
    plan.table = "dinov3 convnext"
    plan.notes = _epsilon_notes(config, where, 1e-6, plan.arch)
    return plan


def _regnet(config: Any, where: Path) -> Plan:
    if not config.downsample_in_first_stage:
        _refuse(where, "downsample_in_first_stage", False, "timm's RegNets do")
    _only_activation(config, where, "relu", "RegNet")
    arguments = {"in_chans": config.num_channels} if config.num_channels != 3 else {}
    return Plan("regnetx_002", arguments, f"regnet {config.layer_type}")


def regnet_name(config: Any, tensors: Mapping[str, Tensor], where: Path) -> str:
    """timm's RegNet of these depths, widths and groups: no argument of timm's builds another."""
    import timm

    named = to_timm(tensors, f"regnet {config.layer_type}")
    counts = [f"s{stage + 1}.b{depth}.conv1.conv.weight" for stage, depth in enumerate(config.depths)]
    wanted = {name: tuple(named[name].shape) for name in counts if name in named}
    second = "s1.b1.conv2.conv.weight"  # its shape tells the width of a group
    if len(wanted) == len(counts) and second in named:
        wanted[second] = tuple(named[second].shape)
        for name in timm.list_models(f"regnet{config.layer_type}_*"):
            own = shapes(name)
            same = all(key in own and tuple(own[key].shape) == shape for key, shape in wanted.items())
            longer = [f"s{stage + 1}.b{depth + 1}.conv1.conv.weight" for stage, depth in enumerate(config.depths)]
            if same and not any(key in own for key in longer):
                return name
    raise OdcftError(
        f"{where}: timm has no RegNet of the depths {config.depths} and widths {config.hidden_sizes}. "
        "Use another checkpoint."
    )


def _mobilevit(config: Any, where: Path) -> Plan:
    usual = {
        "mobilevit_xxs": [64, 80, 96],
        "mobilevit_xs": [96, 120, 144],
        "mobilevit_s": [144, 192, 240],
    }
    arch = next((name for name, widths in usual.items() if widths == config.hidden_sizes), "")
    if not arch:
        _refuse(where, "hidden_sizes", config.hidden_sizes, "timm's MobileViTs have others")
    _only_activation(config, where, "silu", arch)
    fixed = {"num_attention_heads": 4, "conv_kernel_size": 3, "output_stride": 32, "patch_size": 2, "qkv_bias": True}
    for name, value in fixed.items():
        if getattr(config, name) != value:
            _refuse(where, name, getattr(config, name), f"timm's {arch} has {value}")
    arguments = {"in_chans": config.num_channels} if config.num_channels != 3 else {}
    return Plan(arch, arguments, "mobilevit", notes=_epsilon_notes(config, where, 1e-5, arch))


def _resnet(config: Any, where: Path) -> None:
    """ResNets are recognised by their tensors; here only what no tensor tells is checked."""
    _only_activation(config, where, "relu", "ResNet")
    if config.downsample_in_bottleneck:
        _refuse(where, "downsample_in_bottleneck", True, "timm's ResNets downsample in their 3 x 3 convolution")


# By model_type: the fields of its config.json, the prefixes of its backbone, and how to build it.
FAMILIES: dict[str, tuple[type[Config], str, Callable[[Any, Path], Plan | None]]] = {
    "vit": (Vit, "vit.", _vit),
    "deit": (Vit, "deit.", _deit),
    "vit_mae": (Vit, "vit.", _vit),
    "vit_msn": (Vit, "vit.", _vit),
    "ijepa": (Vit, "ijepa.", _ijepa),
    "dinov2": (Dinov2, "dinov2.", _dinov2),
    "dinov2_with_registers": (Dinov2, "dinov2_with_registers.", _dinov2),
    "dinov3_vit": (Dinov3, "dinov3_vit.", _dinov3),
    "dinov3_convnext": (Dinov3Convnext, "dinov3_convnext.", _dinov3_convnext),
    "beit": (Beit, "beit.", _beit),
    "data2vec-vision": (Beit, "data2vec_vision.", _beit),
    "clip": (Clip, "vision_model.", _clip),
    "clip_vision_model": (Clip, "vision_model.", _clip),
    "siglip": (Siglip, "vision_model.", _siglip),
    "siglip_vision_model": (Siglip, "vision_model.", _siglip),
    "swin": (Swin, "swin.", _swin),
    "swinv2": (Swin, "swinv2.", _swinv2),
    "convnext": (Convnext, "convnext.", _convnext),
    "convnextv2": (Convnext, "convnextv2.", _convnextv2),
    "regnet": (Regnet, "regnet.", _regnet),
    "mobilevit": (Mobilevit, "mobilevit.", _mobilevit),
    "resnet": (Resnet, "resnet.", _resnet),
}
