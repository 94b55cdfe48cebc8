"""Find the twin in timm of a network that Hugging Face's transformers saved as a folder.

config.json names the family (`model_type`) and its sizes. They are checked here and turned into a name and arguments of
timm's; the tensors are renamed by `transformers_tensors.py`. What the twin cannot compute the same way, such as another
activation, epsilon or position embedding, is refused.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from odcft.backbone.non_timm_networks import is_network, shapes
from odcft.backbone.transformers_tensors import add_class_position, rename
from odcft.errors import OdcftError
from odcft.text import short_repr

# timm fixes the epsilon of some norms. Up to this difference, features change by less than float32 rounds.
MAX_EPSILON_DIFFERENCE = 1.01e-6

_Size = Annotated[int, Field(ge=8, le=4096)]
_Side = _Size | Annotated[list[_Size], Field(min_length=2, max_length=2)]
_Patch = Annotated[int, Field(ge=1, le=64)]
_PatchSide = _Patch | Annotated[list[_Patch], Field(min_length=2, max_length=2)]
_Width = Annotated[int, Field(ge=1, le=16384)]
_Count = Annotated[int, Field(ge=1, le=128)]
_Epsilon = Annotated[float, Field(gt=0, le=1)]
_Stages = Annotated[list[_Count], Field(min_length=1, max_length=8)]
_Widths = Annotated[list[_Width], Field(min_length=1, max_length=8)]

# transformers' names of activations, and timm's.
_ACTIVATIONS = {
    **{name: name for name in ("gelu", "relu", "silu", "quick_gelu", "mish", "relu6", "leaky_relu", "elu")},
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "gelu_tanh"),
    "swish": "silu",
    "hardswish": "hard_swish",
}
# Outside of every backbone: heads, projections to text, tokens and buffers of pre-training.
_HEADS = re.compile(
    r"(classifier|cls_classifier|distillation_classifier|lm_head|decoder|pooler|text_model|text_projection|"
    r"visual_projection|logit_scale|logit_bias|fpn\d|decode_head|auxiliary_head)(\.|$)|"
    r"(^|.*\.)(mask_token|position_ids|relative_position_index|relative_coords_table|inv_freq)$"
)


class _Config(BaseModel):
    """What odcft reads of a config.json: of the right type, and bounded. Other fields do not matter."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())

    num_channels: Annotated[int, Field(ge=1, le=16)] = 3
    hidden_act: str = "gelu"


class _Vit(_Config):
    hidden_size: _Width
    num_hidden_layers: _Count
    num_attention_heads: _Count
    intermediate_size: _Width = 0
    mlp_ratio: Annotated[float, Field(gt=0, le=16)] = 4
    image_size: _Side = 224
    patch_size: _PatchSide = 16
    layer_norm_eps: _Epsilon = 1e-12
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False
    num_register_tokens: Annotated[int, Field(ge=0, le=64)] = 0


class _Dinov2(_Vit):
    layer_norm_eps: _Epsilon = 1e-6
    patch_size: _PatchSide = 14


class _Dinov3(_Vit):
    layer_norm_eps: _Epsilon = 1e-5
    query_bias: bool = True
    key_bias: bool = False
    value_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    rope_theta: float = 100.0
    rope_parameters: dict[str, Any] = {}
    use_gated_mlp: bool = False


class _Beit(_Vit):
    use_absolute_position_embeddings: bool = False
    use_relative_position_bias: bool = False
    use_shared_relative_position_bias: bool = False
    use_mean_pooling: bool = True
    layer_scale_init_value: Annotated[float, Field(ge=0, le=1)] = 0.1


class _Clip(_Vit):  # the sizes that an older config.json of CLIP leaves out
    hidden_size: _Width = 768
    num_hidden_layers: _Count = 12
    num_attention_heads: _Count = 12
    intermediate_size: _Width = 3072
    patch_size: _PatchSide = 32
    layer_norm_eps: _Epsilon = 1e-5
    hidden_act: str = "quick_gelu"


class _Siglip(_Clip):
    patch_size: _PatchSide = 16
    layer_norm_eps: _Epsilon = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"
    vision_use_head: bool = True


class _Swin(_Config):
    embed_dim: _Width
    depths: _Stages
    num_heads: _Stages
    window_size: Annotated[int, Field(ge=1, le=64)] = 7
    image_size: _Side = 224
    patch_size: _PatchSide = 4
    mlp_ratio: Annotated[float, Field(ge=0.25, le=16)] = 4
    qkv_bias: bool = True
    layer_norm_eps: _Epsilon = 1e-5
    use_absolute_embeddings: bool = False
    pretrained_window_sizes: Annotated[list[Annotated[int, Field(ge=0, le=64)]], Field(max_length=8)] = []


class _Convnext(_Config):
    hidden_sizes: _Widths
    depths: _Stages
    patch_size: _PatchSide = 4
    layer_norm_eps: _Epsilon = 1e-12
    layer_scale_init_value: Annotated[float, Field(ge=0, le=1)] = 1e-6


class _Dinov3Convnext(_Convnext):
    layer_norm_eps: _Epsilon = 1e-6


class _Regnet(_Config):
    hidden_act: str = "relu"
    hidden_sizes: _Widths
    depths: _Stages
    embedding_size: _Width = 32
    groups_width: _Width = 64
    layer_type: Literal["x", "y"] = "y"
    downsample_in_first_stage: bool = True


class _Resnet(_Config):
    hidden_act: str = "relu"
    downsample_in_bottleneck: bool = False


@dataclass
class Twin:
    """timm's network that computes what the folder's does, and its tensors."""

    arch: str
    arguments: dict[str, Any]  # for `non_timm_networks.build`
    tensors: dict[str, Tensor]  # by timm's names; heads keep their own
    notes: list[str] = field(default_factory=list)


@dataclass
class _Plan:
    """How a family's tensors become those of a network of timm's."""

    arch: str
    arguments: dict[str, Any]
    table: str
    separate_biases: bool = False
    registers: bool = False
    notes: list[str] = field(default_factory=list)


def find_twin(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Twin | None:
    """Find timm's twin of the network in a folder of transformers, and give it the folder's tensors.

    Args:
        folder: for messages.
        config: its config.json.
        tensors: its weights, by transformers' names.

    Returns:
        The twin; None for families without one here, and where config.json leaves the sizes out.

    Raises:
        OdcftError: a field has a value that no network has, timm's twin would compute something else, or the tensors
            are not those that config.json describes.
    """
    where = folder / "config.json"
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        return None
    schema, prefix, plan_of = _FAMILIES[kind]
    nested = config.get("vision_config")
    if kind in ("clip", "siglip"):
        config = nested if isinstance(nested, Mapping) else {}
    if any(one.is_required() and name not in config for name, one in schema.model_fields.items()):
        return None
    try:
        checked = schema.model_validate(dict(config))
    except ValidationError as error:
        raise OdcftError(f"{where}: {_first_error(error, config)}. Is it the file that belongs to these weights?") from None
    plan = plan_of(checked, where)
    if plan is None:
        return None
    inside, heads = _split(tensors, prefix)
    if kind == "regnet":
        plan.arch = _regnet_name(checked, inside, where)
    named = rename(inside, plan.table, plan.separate_biases)
    if plan.registers:
        named = add_class_position(named)
    _refuse_other_tensors(where, plan, named)
    return Twin(plan.arch, plan.arguments, {**heads, **named}, plan.notes)


def _first_error(error: ValidationError, config: Mapping[str, Any]) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    problem = first["msg"].replace("Input should", "should").replace("List should", "should")
    return f"{name}={short_repr(config.get(name))} {problem}"


def _split(tensors: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The backbone's tensors without their prefix, and the others; without any prefix all are the backbone's."""
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not inside:
        return dict(tensors), {}
    return inside, {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}


def _refuse_other_tensors(where: Path, plan: _Plan, named: Mapping[str, Tensor]) -> None:
    """Refuse tensors of another shape than the twin's, and those it has no place for and that are not of a head."""
    own = shapes(plan.arch, **plan.arguments)
    for name, tensor in named.items():
        if name in own and tensor.shape != own[name].shape and tensor.numel() != own[name].numel():
            raise OdcftError(
                f"{where} describes a {plan.arch} whose {name} has the shape {tuple(own[name].shape)}, but in the "
                f"weights it has {tuple(tensor.shape)}. Use the config.json that was saved with these weights."
            )
        if name not in own and not _HEADS.match(name) and tensor.numel():
            raise OdcftError(
                f"{where}: timm's twin of this network, {plan.arch}, has no place for the tensor "
                f"{short_repr(name, 200, quotes=False)}, so it would give other features. Use another checkpoint."
            )


# ---------------------------------------------------------------- from config.json to timm's arguments


def _refuse(where: Path, name: str, value: Any, why: str) -> None:
    raise OdcftError(f"{where}: {name}={short_repr(value)}, but {why}, so features would differ. Use another checkpoint.")


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
    return [f"layer_norm_eps is {own:g} in timm's network, not {config.layer_norm_eps:g}, which changes next to nothing"]


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
    ratio = ratio or _mlp_ratio(width, config.intermediate_size or int(width * config.mlp_ratio))
    size = _VIT_SIZES.get((width, depth, heads), "")
    name = pattern.format(size=size, patch=patch)
    arguments: dict[str, Any] = {}
    if config.num_channels != 3:
        arguments["in_chans"] = config.num_channels
    if size and ratio == 4 and is_network(name):
        return name, arguments if side == _usual_side(name) else {"img_size": side, **arguments}
    sizes = {"img_size": side, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads, "mlp_ratio": ratio}
    return spare, {**arguments, **sizes}


def _usual_side(arch: str) -> int:
    """The side in pixels of the images that timm builds a network for."""
    import timm

    cfg = timm.get_pretrained_cfg(arch)
    return cfg.input_size[-1] if cfg is not None else 0


def _mlp_ratio(width: int, hidden: int) -> float:
    """The ratio from which timm computes exactly this number of hidden units."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _vit(config: Any, where: Path) -> _Plan:
    arch, arguments = _vit_network(config, where, "vit_{size}_patch{patch}_224", "vit_base_patch16_224")
    own = 1e-6
    if config.layer_norm_eps > 5e-6:  # this one of timm's has another epsilon
        arch, arguments = _vit_network(config, where, "-", "vit_base_patch16_clip_224")
        arguments["pre_norm"], own = False, 1e-5
    if not config.qkv_bias:
        arguments["qkv_bias"] = False
    return _with_activation(config, where, _Plan(arch, arguments, "vit", notes=_epsilon_notes(config, where, own, arch)))


def _deit(config: Any, where: Path) -> _Plan:
    arch, arguments = _vit_network(
        config, where, "deit_{size}_distilled_patch{patch}_224", "deit_base_distilled_patch16_224"
    )
    if not config.qkv_bias:
        arguments["qkv_bias"] = False
    return _with_activation(config, where, _Plan(arch, arguments, "vit", notes=_epsilon_notes(config, where, 1e-6, arch)))


def _ijepa(config: Any, where: Path) -> _Plan:
    plan = _vit(config, where)
    plan.arguments |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    return plan


def _with_activation(config: Any, where: Path, plan: _Plan, usual: str = "gelu") -> _Plan:
    if (name := _activation(config, where)) != usual:
        plan.arguments["act_layer"] = name
    return plan


def _dinov2(config: Any, where: Path) -> _Plan:
    registers, width = config.num_register_tokens, config.hidden_size
    kind = "reg4_dinov2" if registers else "dinov2"
    spare, ratio = f"vit_small_patch14_{kind}", None
    if config.use_swiglu_ffn:
        hidden = (int(int(width * config.mlp_ratio) * 2 / 3) + 7) // 8 * 8
        spare, ratio = f"vit_giant_patch14_{kind}", _mlp_ratio(width, 2 * hidden)
    pattern = f"vit_{{size}}_patch{{patch}}_{kind}"
    arch, arguments = _vit_network(config, where, pattern, spare, ratio)
    if registers not in (0, 4):
        arguments["reg_tokens"] = registers
    if not config.qkv_bias:
        arguments["qkv_bias"] = False
    notes = _epsilon_notes(config, where, 1e-6, arch)
    plan = _Plan(arch, arguments, "vit", registers=registers > 0, notes=notes)
    return plan if config.use_swiglu_ffn else _with_activation(config, where, plan)


def _dinov3(config: Any, where: Path) -> _Plan:
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
    return _Plan(arch, arguments, "dinov3 gated" if plus else "dinov3", separate_biases=True, notes=notes)


def _beit(config: Any, where: Path) -> _Plan:
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
        arguments["init_values"] = None
    notes = _epsilon_notes(config, where, 1e-6, arch)
    return _Plan(arch, arguments, "beit", separate_biases=True, notes=notes)


def _clip(config: Any, where: Path) -> _Plan:
    activation = _activation(config, where)
    kind = "clip_quickgelu_224" if activation == "quick_gelu" else "clip_224"
    arch, arguments = _vit_network(config, where, f"vit_{{size}}_patch{{patch}}_{kind}", f"vit_base_patch16_{kind}")
    plan = _Plan(arch, arguments, "clip", notes=_epsilon_notes(config, where, 1e-5, arch))
    return _with_activation(config, where, plan, "quick_gelu" if activation == "quick_gelu" else "gelu")


def _siglip(config: Any, where: Path) -> _Plan:
    kind = "siglip_224" if config.vision_use_head else "siglip_gap_224"
    arch, arguments = _vit_network(config, where, f"vit_{{size}}_patch{{patch}}_{kind}", f"vit_base_patch16_{kind}")
    plan = _Plan(arch, arguments, "clip", notes=_epsilon_notes(config, where, 1e-6, arch))
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


def _swin(config: Any, where: Path) -> _Plan:
    pattern, spare = "swin_{size}_patch4_window{window}_{side}", "swin_tiny_patch4_window7_224"
    arch, arguments = _swin_network(config, where, pattern, spare)
    _only_activation(config, where, "gelu", arch)
    return _Plan(arch, arguments, "swin", notes=_epsilon_notes(config, where, 1e-5, arch))


def _swinv2(config: Any, where: Path) -> _Plan:
    arch, arguments = _swin_network(config, where, "swinv2_{size}_window{window}_{side}", "swinv2_tiny_window8_256")
    if any(config.pretrained_window_sizes):
        arguments["pretrained_window_sizes"] = config.pretrained_window_sizes
    plan = _Plan(arch, arguments, "swin", separate_biases=True, notes=_epsilon_notes(config, where, 1e-5, arch))
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


def _convnext(config: Any, where: Path, kind: str = "convnext") -> _Plan:
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
        arguments["ls_init_value"] = None
    plan = _Plan(arch, arguments, "convnext", notes=_epsilon_notes(config, where, 1e-6, arch))
    return _with_activation(config, where, plan)


def _convnextv2(config: Any, where: Path) -> _Plan:
    return _convnext(config, where, "convnextv2")


def _dinov3_convnext(config: Any, where: Path) -> _Plan:
    plan = _convnext(config, where)
    plan.notes = _epsilon_notes(config, where, 1e-6, plan.arch)
    return plan


def _regnet(config: Any, where: Path) -> _Plan:
    if not config.downsample_in_first_stage:
        _refuse(where, "downsample_in_first_stage", False, "timm's RegNets do")
    _only_activation(config, where, "relu", "RegNet")
    return _Plan("regnetx_002", {"in_chans": config.num_channels} if config.num_channels != 3 else {}, "regnet")


def _regnet_name(config: Any, tensors: Mapping[str, Tensor], where: Path) -> str:
    """timm's RegNet of these depths, widths and groups: no argument of timm's builds another."""
    import timm

    named = rename(tensors, "regnet")
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


def _resnet(config: Any, where: Path) -> None:
    """ResNets are recognised by their tensors; here only what no tensor tells is checked."""
    _only_activation(config, where, "relu", "ResNet")
    if config.downsample_in_bottleneck:
        _refuse(where, "downsample_in_bottleneck", True, "timm's ResNets downsample in their 3 x 3 convolution")


# By model_type: the fields of its config.json, the prefixes of its backbone, and how to build it.
_FAMILIES: dict[str, tuple[type[_Config], str, Callable[[Any, Path], _Plan | None]]] = {
    "vit": (_Vit, "vit.", _vit),
    "deit": (_Vit, "deit.", _deit),
    "vit_mae": (_Vit, "vit.", _vit),
    "vit_msn": (_Vit, "vit.", _vit),
    "ijepa": (_Vit, "ijepa.", _ijepa),
    "dinov2": (_Dinov2, "dinov2.", _dinov2),
    "dinov2_with_registers": (_Dinov2, "dinov2_with_registers.", _dinov2),
    "dinov3_vit": (_Dinov3, "dinov3_vit.", _dinov3),
    "dinov3_convnext": (_Dinov3Convnext, "dinov3_convnext.", _dinov3_convnext),
    "beit": (_Beit, "beit.", _beit),
    "data2vec-vision": (_Beit, "data2vec_vision.", _beit),
    "clip": (_Clip, "vision_model.", _clip),
    "clip_vision_model": (_Clip, "vision_model.", _clip),
    "siglip": (_Siglip, "vision_model.", _siglip),
    "siglip_vision_model": (_Siglip, "vision_model.", _siglip),
    "swin": (_Swin, "swin.", _swin),
    "swinv2": (_Swin, "swinv2.", _swinv2),
    "convnext": (_Convnext, "convnext.", _convnext),
    "convnextv2": (_Convnext, "convnextv2.", _convnextv2),
    "regnet": (_Regnet, "regnet.", _regnet),
    "resnet": (_Resnet, "resnet.", _resnet),
}
