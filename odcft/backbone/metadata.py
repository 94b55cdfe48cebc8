"""What a file says of itself is data: here it is checked and bounded before anything is made of it.

An architecture is a name that timm or odcft knows. It may be built with the `Arguments` below, each of its type and
within its bounds; sizes, means and deviations are those of images. What else a file says is left out, and named. The
user's own `--arch-args` are read by the same list, and refused where they are not on it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from odcft.backbone.network_input import CHANNELS, Input, load
from odcft.backbone.networks import is_network
from odcft.data.view import INTERPOLATIONS
from odcft.errors import OdcftError
from odcft.files import LARGEST
from odcft.text import brief

_Size = Annotated[int, Field(ge=8, le=4096)]  # pixels
_Channels = Annotated[int, Field(ge=1, le=16)]
_Wide = Annotated[int, Field(ge=1, le=16384)]
_Deep = Annotated[int, Field(ge=1, le=128)]
_Rate = Annotated[float, Field(ge=0, lt=1)]
_PerChannel = Annotated[list[Annotated[float, Field(ge=-1e5, le=1e5)]], Field(min_length=1, max_length=16)]
_Spread = Annotated[list[Annotated[float, Field(ge=1e-6, le=1e5)]], Field(min_length=1, max_length=16)]
_Stages = Annotated[list[_Deep], Field(min_length=1, max_length=8)]
_Crop = Annotated[float, Field(gt=0, le=1)]
# Pools that leave one vector an image, as wide as the network says it is.
_Pool = Literal["avg", "max", "avgmax", "token", "map"]
_Activation = Literal[
    "relu", "relu6", "leaky_relu", "elu", "gelu", "gelu_tanh", "quick_gelu", "silu", "mish", "hard_swish"
]


class _Told(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Arguments(_Told):
    """What a network may be built with besides its name: words of timm's, and two of `networks.build`."""

    in_chans: _Channels = 3
    img_size: _Size | Annotated[list[_Size], Field(min_length=2, max_length=2)] = 224
    patch_size: Annotated[int, Field(ge=1, le=64)] = 16
    window_size: Annotated[int, Field(ge=1, le=64)] = 7
    embed_dim: _Wide = 768
    dims: Annotated[list[_Wide], Field(min_length=1, max_length=8)] = []
    depth: _Deep = 12
    depths: _Stages = []
    num_heads: _Deep | _Stages = 12
    mlp_ratio: Annotated[float, Field(ge=0.25, le=16)] = 4
    init_values: Annotated[float, Field(ge=0, le=1)] = 1e-5
    qkv_bias: bool = True
    qk_norm: bool = False
    class_token: bool = True
    reg_tokens: Annotated[int, Field(ge=0, le=64)] = 0
    no_embed_class: bool = False
    pre_norm: bool = False
    fc_norm: bool = False
    final_norm: bool = True
    dynamic_img_size: bool = False
    dynamic_img_pad: bool = False
    pos_embed: Literal["learn", "rope", "none"] = "learn"
    global_pool: _Pool = "avg"
    act_layer: _Activation = "gelu"
    cardinality: Annotated[int, Field(ge=1, le=256)] = 1
    base_width: Annotated[int, Field(ge=1, le=1024)] = 64
    stem_width: Annotated[int, Field(ge=1, le=512)] = 64
    stem_type: Literal["", "deep", "deep_tiered"] = ""
    avg_down: bool = False
    output_stride: Literal[8, 16, 32] = 32
    zero_init_last: bool = False
    drop_rate: _Rate = 0
    drop_path_rate: _Rate = 0
    proj_drop_rate: _Rate = 0
    attn_drop_rate: _Rate = 0
    last_stride: Literal[1, 2] = 2
    small_stem: bool = False


class Normalisation(_Told):
    """timm's words on what its weights were shown, as far as odcft follows them."""

    input_size: Annotated[list[int], Field(min_length=3, max_length=3)] = [3, 224, 224]
    mean: _PerChannel = []
    std: _Spread = []
    crop_pct: _Crop = 0.875
    interpolation: Literal[INTERPOLATIONS] = "bilinear"  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _is_of_an_image(self) -> "Normalisation":
        channels, height, width = self.input_size
        if not 1 <= channels <= 16 or height != width or not 8 <= width <= 4096:
            raise ValueError("input_size should be [channels, size, size], with a size of 8 to 4096")
        return self


class _Shown(_Told):
    """The words of `inputs.Input.dump`."""

    color: Literal[tuple(CHANNELS)]  # type: ignore[valid-type]
    size: _Size
    mean: _PerChannel
    std: _Spread
    channels: _Channels = 1
    range: Annotated[list[Annotated[float, Field(ge=0, le=65535)]], Field(min_length=2, max_length=2)] = [0, 1]
    crop_fraction: _Crop = 0.875
    interpolation: Literal[INTERPOLATIONS] = "bilinear"  # type: ignore[valid-type]
    intensity: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> "_Shown":
        wanted = 3 if self.color == "sobel" else CHANNELS[self.color]
        if not len(self.mean) == len(self.std) == wanted:
            raise ValueError(f"mean and std should have {wanted} numbers for {self.color}")
        if "channels" in self.model_fields_set and self.channels < CHANNELS[self.color]:
            raise ValueError(f"channels should be at least {CHANNELS[self.color]} for {self.color}")
        if self.range[0] != 0 or self.range[1] <= 0:
            raise ValueError("range should be [0, the largest value]")
        if self.intensity and not self.intensity[0] < self.intensity[1]:
            raise ValueError("intensity should be [low, high] with low < high")
        return self


@dataclass
class Description:
    """What a file says of itself, as far as it may be followed."""

    architecture: str | None = None  # a name that `networks.build` knows
    arguments: dict[str, Any] = field(default_factory=dict)  # of Arguments
    cfg: dict[str, Any] = field(default_factory=dict)  # of Normalisation
    input: Input | None = None  # all of it, in odcft's own words
    ours: bool = False  # odcft wrote it
    left_out: list[str] = field(default_factory=list)  # what is not followed, and why


def of_timm(config: Mapping[str, Any]) -> Description:
    """Of the config.json of a timm folder."""
    told, odcfts = Description(), config.get("odcft")
    _architecture(told, config.get("architecture"))
    if told.architecture is not None:
        _arguments(told, config.get("model_args"), "model_args")
        cfg = config.get("pretrained_cfg")
        if isinstance(cfg, dict):
            _normalisation(told, {name: cfg[name] for name in Normalisation.model_fields if name in cfg})
        elif cfg is not None:
            told.left_out.append(f"pretrained_cfg={brief(cfg)} should be an object")
    if isinstance(odcfts, dict):
        told.ours = True
        _input(told, odcfts.get("input"))
    return told


def of_transformers(about: Mapping[str, Any]) -> Description:
    """Of the preprocessor_config.json of a folder of Hugging Face's transformers."""
    told = Description()
    if "image_mean" in about and "image_std" in about:
        _normalisation(told, {"mean": about["image_mean"], "std": about["image_std"]})
    return told


def of_export(words: Mapping[str, Any]) -> Description:
    """Of the words that `odcft export` writes beside the tensors of a file; of others' words nothing."""
    told = Description()
    if {"architecture", "arch_args", "input"} <= set(words):
        told.ours = True
        _architecture(told, words["architecture"])
        _arguments(told, _json(told, words["arch_args"], "arch_args"), "arch_args")
        _input(told, _json(told, words["input"], "input"))
    return told


def of_pretext(tree: Any) -> Description:
    """Of a checkpoint of `odcft pretext`; of any other nothing."""
    told = Description()
    if isinstance(tree, dict) and isinstance(tree.get("input"), str) and {"size", "mean", "std"} <= set(tree):
        told.ours = True
        _architecture(told, tree.get("arch"))
        _arguments(told, tree.get("arch_args"), "arch_args")
        words = ("size", "mean", "std", "crop_fraction", "intensity")
        _input(told, {name: tree[name] for name in words if name in tree} | {"color": tree["input"]})
    return told


def _architecture(told: Description, name: Any) -> None:
    if isinstance(name, str) and is_network(name):
        told.architecture = name
    elif isinstance(name, str) and re.fullmatch(r"\w+\.[\w-]+", name) and is_network(name.split(".")[0]):
        told.architecture = name.split(".")[0]
        told.left_out.append(f"architecture={brief(name)}: {told.architecture} is known, that tag of it is not")
    elif name is not None:
        told.left_out.append(f"architecture={brief(name)}: no network that timm or odcft knows; told by its tensors")


def _arguments(told: Description, arguments: Any, where: str) -> None:
    if isinstance(arguments, dict):
        arguments = {name: value for name, value in arguments.items() if name != "num_classes"}  # of the head
        sound, wrong = _sound(Arguments, arguments)
        told.arguments = _square(sound)
        if "img_size" in sound and "img_size" not in told.arguments:
            wrong.append(f"img_size={sound['img_size']} should be a square")
        told.left_out += [f"{where}.{one}" for one in wrong]
    elif arguments is not None:
        told.left_out.append(f"{where}={brief(arguments)} should be an object")


def _normalisation(told: Description, words: dict[str, Any]) -> None:
    cfg, wrong = _sound(Normalisation, words)
    told.left_out += wrong
    if {"mean", "std"} & set(words) - set(cfg) or len(cfg.get("mean", "")) != len(cfg.get("std", cfg.get("mean", ""))):
        told.left_out += [] if wrong else ["mean and std should have as many numbers"]
        cfg = {name: value for name, value in cfg.items() if name not in ("mean", "std")}
    told.cfg = cfg


def _input(told: Description, words: Any) -> None:
    if words is None:
        return
    if not isinstance(words, dict):
        told.left_out.append(f"input={brief(words)} should be an object")
        return
    known = {name: value for name, value in words.items() if name in _Shown.model_fields}
    told.left_out += [f"input.{brief(name)}: no such word" for name in words if name not in known]
    try:
        about = _Shown.model_validate(known)
    except ValidationError as error:
        told.left_out += [f"input.{one}" for _, one in _wrong(error, known)]
        return
    told.input = load(about.model_dump(exclude_unset=True))


M = TypeVar("M", bound=_Told)


def _sound(model: type[M], words: Mapping[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    """The words that are of the model, of its types and within its bounds; and what is wrong with the others."""
    words = {(name if isinstance(name, str) else brief(name)): value for name, value in words.items()}
    wrong: list[str] = []
    try:
        return model.model_validate(words).model_dump(exclude_unset=True), wrong
    except ValidationError as error:
        found = _wrong(error, words)
    sound = {name: value for name, value in words.items() if name not in {name for name, _ in found}}
    if len(sound) == len(words):  # what is wrong is no single word
        sound = {}
    return (_sound(model, sound)[0] if sound else {}), [text for _, text in found]


def _wrong(error: ValidationError, words: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of each word that will not do: its name, and what is wrong, once."""
    found: dict[str, str] = {}
    for one in error.errors(include_url=False, include_context=False):
        if not one["loc"]:
            found.setdefault("", one["msg"].removeprefix("Value error, "))
            continue
        name = str(one["loc"][0])
        if one["type"] == "extra_forbidden":
            found.setdefault(name, f"{brief(name, quotes=False)} is not among what a file may ask for")
        elif one["type"] == "missing":
            found.setdefault(name, f"{name} is missing")
        else:
            should = one["msg"].replace("Input should", "should").replace("List should", "should")
            found.setdefault(name, f"{name}={brief(words.get(name))} {brief(should, quotes=False)}")
    return list(found.items())


def _square(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments with one number for the size of a square, without that of another shape, and without our defaults."""
    size = arguments.get("img_size")
    if isinstance(size, list):
        arguments = {**arguments, "img_size": size[0]} if size[0] == size[1] else _without(arguments, "img_size")
    usual = {"last_stride": 2, "small_stem": False}  # words that timm does not know
    return {name: value for name, value in arguments.items() if name not in usual or value != usual[name]}


def _without(words: dict[str, Any], name: str) -> dict[str, Any]:
    return {one: value for one, value in words.items() if one != name}


def _json(told: Description, text: Any, name: str) -> Any:
    try:
        return json.loads(text[: LARGEST + 1])
    except (ValueError, TypeError, RecursionError):
        told.left_out.append(f"{name}: no JSON")
        return None


# ---------------------------------------------------------------- the user's word


def parse_arguments(text: str) -> dict[str, Any]:
    """The network's arguments in "patch_size=8,img_size=64"; values as in YAML.

    Raises:
        OdcftError: not of that form, or `check_arguments` refuses one.
    """
    from odcft.recipe import parse_yaml

    arguments: dict[str, Any] = {}
    for part in re.split(r",(?![^\[]*\])", text):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise OdcftError(f"--arch-args {brief(part)}: write name=value, for example patch_size=8,img_size=64.")
        arguments[name.strip()] = parse_yaml(value, f"--arch-args {name.strip()}")
    return check_arguments(arguments)


def check_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The user's arguments for a network.

    Raises:
        OdcftError: one that is unknown, of another type, or out of bounds.
    """
    sound, wrong = _sound(Arguments, arguments)
    unknown = [name for name in arguments if name not in Arguments.model_fields]
    if unknown:
        _refuse_argument(unknown[0])
    if wrong:
        raise OdcftError(f"--arch-args {wrong[0]}.")
    squared = _square(sound)
    if "img_size" in sound and "img_size" not in squared:
        raise OdcftError("--arch-args img_size: odcft shows networks squares; give one number.")
    return squared


def _refuse_argument(name: str) -> NoReturn:
    import difflib

    near = difflib.get_close_matches(str(name)[:100], Arguments.model_fields, n=1)
    meant = f" Did you mean {near[0]}?" if near else ""
    raise OdcftError(
        f"--arch-args {brief(name, quotes=False)}: no such argument.{meant} Possible are "
        f"{', '.join(Arguments.model_fields)}."
    )
