"""Check what a checkpoint says about its own network, and bound it before anything is built from it.

An architecture must be a name that timm or odcft knows. It may be built with the `Arguments` below, each of its type
and within its bounds; sizes, means and standard deviations must be plausible for images. Anything else a file says is
ignored, and named in a note. The user's own `--arch-args` are checked against the same list, and refused if they fail.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from odcft.backbone.network_input import CHANNELS, COLORS, Input, input_from_json
from odcft.backbone.non_timm_networks import is_network
from odcft.data.view import INTERPOLATIONS
from odcft.errors import OdcftError
from odcft.files import MAX_JSON_BYTES
from odcft.text import short_repr

_Size = Annotated[int, Field(ge=8, le=4096)]  # pixels
_Channels = Annotated[int, Field(ge=1, le=16)]
_Width = Annotated[int, Field(ge=1, le=16384)]
_Depth = Annotated[int, Field(ge=1, le=128)]
_Rate = Annotated[float, Field(ge=0, lt=1)]
_Means = Annotated[list[Annotated[float, Field(ge=-1e5, le=1e5)]], Field(min_length=1, max_length=16)]
_Stds = Annotated[list[Annotated[float, Field(ge=1e-6, le=1e5)]], Field(min_length=1, max_length=16)]
_Stages = Annotated[list[_Depth], Field(min_length=1, max_length=8)]
_Crop = Annotated[float, Field(gt=0, le=1)]
# Pooling that gives one vector per image, as wide as the network says.
_Pool = Literal["avg", "max", "avgmax", "token", "map"]
_Activation = Literal[
    "relu", "relu6", "leaky_relu", "elu", "gelu", "gelu_tanh", "quick_gelu", "silu", "mish", "hard_swish"
]


class _Strict(BaseModel):
    """No unknown fields, no conversions, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Arguments(_Strict):
    """Arguments a network may be built with: some of timm's, and two of `networks.build` (the last two)."""

    in_chans: _Channels = 3
    img_size: _Size | Annotated[list[_Size], Field(min_length=2, max_length=2)] = 224
    patch_size: Annotated[int, Field(ge=1, le=64)] = 16
    window_size: Annotated[int, Field(ge=1, le=64)] = 7
    embed_dim: _Width = 768
    dims: Annotated[list[_Width], Field(min_length=1, max_length=8)] = []
    depth: _Depth = 12
    depths: _Stages = []
    num_heads: _Depth | _Stages = 12
    mlp_ratio: Annotated[float, Field(ge=0.25, le=16)] = 4
    init_values: Annotated[float, Field(ge=0, le=1)] = 1e-5
    qkv_bias: bool = True
    qk_norm: bool = False
    class_token: bool = True
    reg_tokens: Annotated[int, Field(ge=0, le=64)] = 0
    num_reg_tokens: Annotated[int, Field(ge=0, le=64)] = 0
    no_embed_class: bool = False
    pre_norm: bool = False
    fc_norm: bool = False
    final_norm: bool = True
    dynamic_img_size: bool = False
    dynamic_img_pad: bool = False
    pos_embed: Literal["learn", "rope", "none"] = "learn"
    use_abs_pos_emb: bool = True
    use_rel_pos_bias: bool = False
    use_shared_rel_pos_bias: bool = False
    pretrained_window_sizes: Annotated[list[Annotated[int, Field(ge=0, le=64)]], Field(min_length=1, max_length=8)] = []
    global_pool: _Pool = "avg"
    act_layer: _Activation = "gelu"
    cardinality: Annotated[int, Field(ge=1, le=256)] = 1
    base_width: Annotated[int, Field(ge=1, le=1024)] = 64
    stem_width: Annotated[int, Field(ge=1, le=512)] = 64
    stem_type: Literal["", "deep", "deep_tiered"] = ""
    avg_down: bool = False
    output_stride: Literal[8, 16, 32] = 32
    zero_init_last: bool = False
    bn_eps: Annotated[float, Field(ge=1e-8, le=0.1)] = 1e-5
    drop_rate: _Rate = 0
    drop_path_rate: _Rate = 0
    proj_drop_rate: _Rate = 0
    attn_drop_rate: _Rate = 0
    last_stride: Literal[1, 2] = 2
    small_stem: bool = False


class PretrainedCfg(_Strict):
    """The fields of timm's pretrained_cfg that odcft uses."""

    input_size: Annotated[list[int], Field(min_length=3, max_length=3)] = [3, 224, 224]
    mean: _Means = []
    std: _Stds = []
    crop_pct: _Crop = 0.875
    interpolation: Literal[INTERPOLATIONS] = "bilinear"  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _has_square_images(self) -> "PretrainedCfg":
        channels, height, width = self.input_size
        if not 1 <= channels <= 16 or height != width or not 8 <= width <= 4096:
            raise ValueError("input_size should be [channels, size, size], with a size of 8 to 4096")
        return self


class _InputFields(_Strict):
    """The fields that `network_input.Input.dump` writes."""

    color: Literal[COLORS]  # type: ignore[valid-type]
    size: _Size
    mean: _Means
    std: _Stds
    channels: _Channels = 1
    range: Annotated[list[Annotated[float, Field(ge=0, le=65535)]], Field(min_length=2, max_length=2)] = [0, 1]
    crop_fraction: _Crop = 0.875
    interpolation: Literal[INTERPOLATIONS] = "bilinear"  # type: ignore[valid-type]
    intensity: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    measured: bool = True

    @model_validator(mode="after")
    def _is_consistent(self) -> "_InputFields":
        channels = CHANNELS.get(self.color, self.channels)
        wanted = 3 if self.color == "sobel" else channels
        if not len(self.mean) == len(self.std) == wanted:
            raise ValueError(f"mean and std should have {wanted} numbers for {self.color}")
        if "channels" in self.model_fields_set and self.channels < channels:
            raise ValueError(f"channels should be at least {channels} for {self.color}")
        if self.range[0] != 0 or self.range[1] <= 0:
            raise ValueError("range should be [0, the largest value]")
        if self.intensity and not self.intensity[0] < self.intensity[1]:
            raise ValueError("intensity should be [low, high] with low < high")
        return self


@dataclass
class Metadata:
    """What a file says about its own network, as far as odcft follows it."""

    architecture: str | None = None  # a name that `networks.build` knows
    arguments: dict[str, Any] = field(default_factory=dict)  # checked against Arguments
    cfg: dict[str, Any] = field(default_factory=dict)  # checked against PretrainedCfg
    input: Input | None = None  # the complete input, from files that odcft wrote
    from_odcft: bool = False  # whether odcft wrote the file
    from_transformers: bool = False  # whether it is a folder of Hugging Face's transformers
    model_type: str = ""  # of the folder of transformers that it is, or came from
    from_open_clip: bool = False  # whether it is a folder of open_clip
    color: str = ""  # of its input, where the file says so without saying all of the input
    notes: list[str] = field(default_factory=list)  # how the network built here differs from the file's
    ignored: list[str] = field(default_factory=list)  # what is not followed, and why


def from_timm_config(config: Mapping[str, Any]) -> Metadata:
    """Read the config.json of a timm folder."""
    metadata, extra = Metadata(), config.get("odcft")
    _read_architecture(metadata, config.get("architecture"))
    if metadata.architecture is not None:
        _read_arguments(metadata, config.get("model_args"), "model_args")
        cfg = config.get("pretrained_cfg")
        if isinstance(cfg, dict):
            _read_cfg(metadata, {name: cfg[name] for name in PretrainedCfg.model_fields if name in cfg})
        elif cfg is not None:
            metadata.ignored.append(f"pretrained_cfg={short_repr(cfg)} should be an object")
    if isinstance(extra, dict):
        metadata.from_odcft = True
        _read_model_type(metadata, extra.get("model_type"))
        _read_input(metadata, extra.get("input"))
    return metadata


def from_preprocessor_config(config: Mapping[str, Any]) -> Metadata:
    """Read the preprocessor_config.json of a folder of Hugging Face's transformers."""
    metadata = Metadata()
    if config.get("do_normalize") is False:
        config = {**config, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    fields = _view_fields(config)
    if "image_mean" in config and "image_std" in config:
        fields |= {"mean": config["image_mean"], "std": config["image_std"]}
    _read_cfg(metadata, fields)
    factor = 1 if config.get("do_rescale") is False else config.get("rescale_factor", 1 / 255)
    if (
        "mean" in metadata.cfg
        and isinstance(factor, int | float)
        and 1e-5 < factor <= 1
        and abs(255 * factor - 1) > 1e-6
    ):
        # They normalise other values than 0..1.
        for name in ("mean", "std"):
            metadata.cfg[name] = [value / (255 * factor) for value in metadata.cfg[name]]
    if config.get("do_flip_channel_order") is True:
        metadata.color = "bgr"
    return metadata


def _view_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of timm's pretrained_cfg from a preprocessor's size, crop and interpolation, as far as it has them."""
    fields: dict[str, Any] = {}
    resized, side = _pixels(config.get("size")), None
    if config.get("do_center_crop") is not False:
        side = _pixels(config.get("crop_size"))
    side = side or resized
    if config.get("do_resize") is not False and side is not None:
        fields["input_size"] = [3, side, side]
        if resized is not None and 0 < side <= resized:
            fields["crop_pct"] = config["crop_pct"] if "crop_pct" in config else side / resized
    filters = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # as PIL numbers them
    number = config.get("resample")
    if isinstance(number, int) and 0 <= number < len(filters):
        fields["interpolation"] = filters[number]
    return fields


def _pixels(size: Any) -> int | None:
    """The side in pixels that a preprocessor's size means: a number, a square, or the shorter edge."""
    if isinstance(size, dict):
        size = size.get("shortest_edge", size.get("height"))
    return size if isinstance(size, int) and not isinstance(size, bool) and 8 <= size <= 4096 else None


def from_exported_fields(fields: Mapping[str, Any]) -> Metadata:
    """Read the fields that `odcft export` writes beside the tensors of a file; other people's give empty metadata."""
    metadata = Metadata()
    if {"architecture", "arch_args", "input"} <= set(fields):
        metadata.from_odcft = True
        _read_architecture(metadata, fields["architecture"])
        _read_arguments(metadata, _parsed_json(metadata, fields["arch_args"], "arch_args"), "arch_args")
        _read_input(metadata, _parsed_json(metadata, fields["input"], "input"))
        _read_model_type(metadata, fields.get("model_type"))
    return metadata


def from_pretext_checkpoint(tree: Any) -> Metadata:
    """Read a checkpoint of `odcft pretext`; any other gives empty metadata."""
    metadata = Metadata()
    if isinstance(tree, dict) and isinstance(tree.get("input"), str) and {"size", "mean", "std"} <= set(tree):
        metadata.from_odcft = True
        _read_architecture(metadata, tree.get("arch"))
        _read_arguments(metadata, tree.get("arch_args"), "arch_args")
        names = ("size", "mean", "std", "crop_fraction", "intensity")
        _read_input(metadata, {name: tree[name] for name in names if name in tree} | {"color": tree["input"]})
    return metadata


def _read_model_type(metadata: Metadata, name: Any) -> None:
    """Which family of transformers the network came from; an unknown name only means that none is preferred."""
    if isinstance(name, str) and re.fullmatch(r"[\w-]{1,50}", name):
        metadata.model_type = name


def _read_architecture(metadata: Metadata, name: Any) -> None:
    if isinstance(name, str) and is_network(name):
        metadata.architecture = name
    elif isinstance(name, str) and re.fullmatch(r"\w+\.[\w-]+", name) and is_network(name.split(".")[0]):
        metadata.architecture = name.split(".")[0]
        metadata.ignored.append(
            f"architecture={short_repr(name)}: unknown tag, the network is built as {metadata.architecture}"
        )
    elif name is not None:
        metadata.ignored.append(
            f"architecture={short_repr(name)}: neither timm nor odcft has such a network, so its tensors decide"
        )


def _read_arguments(metadata: Metadata, arguments: Any, where: str) -> None:
    if isinstance(arguments, dict):
        arguments = {name: value for name, value in arguments.items() if name != "num_classes"}  # of the head
        valid, errors = _valid_fields(Arguments, arguments)
        metadata.arguments = _simplified(valid)
        if "img_size" in valid and "img_size" not in metadata.arguments:
            errors.append(f"img_size={valid['img_size']} should be a square")
        metadata.ignored += [f"{where}.{error}" for error in errors]
    elif arguments is not None:
        metadata.ignored.append(f"{where}={short_repr(arguments)} should be an object")


def _read_cfg(metadata: Metadata, fields: dict[str, Any]) -> None:
    cfg, errors = _valid_fields(PretrainedCfg, fields)
    metadata.ignored += errors
    one_is_invalid = {"mean", "std"} & set(fields) - set(cfg)
    if one_is_invalid or len(cfg.get("mean", "")) != len(cfg.get("std", cfg.get("mean", ""))):
        metadata.ignored += [] if errors else ["mean and std should have the same length"]
        cfg = {name: value for name, value in cfg.items() if name not in ("mean", "std")}
    metadata.cfg = cfg


def _read_input(metadata: Metadata, fields: Any) -> None:
    if fields is None:
        return
    if not isinstance(fields, dict):
        metadata.ignored.append(f"input={short_repr(fields)} should be an object")
        return
    known = {name: value for name, value in fields.items() if name in _InputFields.model_fields}
    metadata.ignored += [f"input.{short_repr(name)}: no such field" for name in fields if name not in known]
    try:
        valid = _InputFields.model_validate(known)
    except ValidationError as error:
        metadata.ignored += [f"input.{text}" for text in _errors_by_field(error, known).values()]
        return
    metadata.input = input_from_json(valid.model_dump(exclude_unset=True))


M = TypeVar("M", bound=_Strict)


def _valid_fields(model: type[M], fields: Mapping[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    """The fields that a model accepts, and what is wrong with the others."""
    fields = {(name if isinstance(name, str) else short_repr(name)): value for name, value in fields.items()}
    try:
        return model.model_validate(fields).model_dump(exclude_unset=True), []
    except ValidationError as error:
        errors = _errors_by_field(error, fields)
    rest = {name: value for name, value in fields.items() if name not in errors}
    if len(rest) == len(fields):  # the fields are wrong together, none on its own
        rest = {}
    return (_valid_fields(model, rest)[0] if rest else {}), list(errors.values())


def _errors_by_field(error: ValidationError, fields: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with each invalid field, by name; under "" what is wrong with the fields together."""
    found: dict[str, str] = {}
    for one in error.errors(include_url=False, include_context=False):
        if not one["loc"]:
            found.setdefault("", one["msg"].removeprefix("Value error, "))
            continue
        name = str(one["loc"][0])
        if one["type"] == "extra_forbidden":
            found.setdefault(name, f"{short_repr(name, quotes=False)} is not something a file may set")
        elif one["type"] == "missing":
            found.setdefault(name, f"{name} is missing")
        else:
            problem = one["msg"].replace("Input should", "should").replace("List should", "should")
            found.setdefault(name, f"{name}={short_repr(fields.get(name))} {short_repr(problem, quotes=False)}")
    return found


def _simplified(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments with one number as the size of a square and no other shape, and without defaults timm does not know."""
    size = arguments.get("img_size")
    if isinstance(size, list):
        arguments = {name: value for name, value in arguments.items() if name != "img_size" or size[0] == size[1]}
        if "img_size" in arguments:
            arguments["img_size"] = size[0]
    defaults = {"last_stride": 2, "small_stem": False}
    return {name: value for name, value in arguments.items() if name not in defaults or value != defaults[name]}


def _parsed_json(metadata: Metadata, text: Any, name: str) -> Any:
    try:
        return json.loads(text[: MAX_JSON_BYTES + 1])
    except (ValueError, TypeError, RecursionError):
        metadata.ignored.append(f"{name}: not JSON")
        return None


# ---------------------------------------------------------------- the user's --arch-args


def parse_arguments(text: str) -> dict[str, Any]:
    """Parse `--arch-args`, for example "patch_size=8,img_size=64"; values are YAML.

    Raises:
        OdcftError: the text has another form, or `check_arguments` refuses an argument.
    """
    from odcft.recipe import parse_yaml

    arguments: dict[str, Any] = {}
    for part in re.split(r",(?![^\[]*\])", text):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise OdcftError(f"--arch-args {short_repr(part)}: write name=value, for example patch_size=8,img_size=64.")
        arguments[name.strip()] = parse_yaml(value, f"--arch-args {name.strip()}")
    return check_arguments(arguments)


def check_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Check the user's arguments for a network.

    Raises:
        OdcftError: an argument is unknown, has another type or is out of bounds.
    """
    valid, errors = _valid_fields(Arguments, arguments)
    unknown = [name for name in arguments if name not in Arguments.model_fields]
    if unknown:
        _refuse_argument(unknown[0])
    if errors:
        raise OdcftError(f"--arch-args {errors[0]}.")
    simplified = _simplified(valid)
    if "img_size" in valid and "img_size" not in simplified:
        raise OdcftError(
            f"--arch-args img_size={valid['img_size']}: odcft gives networks square images; give one number."
        )
    return simplified


def _refuse_argument(name: str) -> NoReturn:
    import difflib

    close = difflib.get_close_matches(str(name)[:100], Arguments.model_fields, n=1)
    suggestion = f" Did you mean {close[0]}?" if close else ""
    raise OdcftError(
        f"--arch-args {short_repr(name, quotes=False)}: no such argument.{suggestion} Choose from "
        f"{', '.join(Arguments.model_fields)}."
    )
