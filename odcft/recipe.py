"""The recipe: all settings of a run, as a YAML file and as a validated object.

Layers, each overriding the one before: the defaults below, the recipe's file, a preset, `--set a.b=c`. What can be
derived (the number of images, the width of the features) is not a setting. Fields that are `auto` are resolved once
checkpoint and images are known; the recipe saved in the RUN has no `auto` left.
"""

import contextlib
import difflib
import json
import math
import numbers
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from odcft.errors import OdcftError
from odcft.presets import preset_fields
from odcft.text import count_of, short_repr

MAX_BYTES, MAX_VALUE_LENGTH, MAX_DEPTH = 1 << 20, 10_000, 30  # of a recipe; characters of a value; nesting levels

# More than anyone needs, yet within memory; MOST_MEMBERS is of codc.
MAX_EPOCHS, MAX_IMAGE_SIZE, MAX_WIDTH, MAX_WORKERS, MAX_MEMBERS = 1_000_000, 4096, 65_536, 1024, 9
MAX_BANDS, MAX_PARTS = 16, 1024

Auto = Literal["auto"]


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)


def _black_to_white(pair: tuple[float, float]) -> tuple[float, float]:
    if not (pair[0] < pair[1] and math.isfinite(pair[1] - pair[0])):
        raise ValueError("a range of values is [black, white] with black < white")
    return pair


def percentiles(rule: str) -> tuple[float, float]:
    """The numbers of percentiles such as "1%..99%".

    Raises:
        ValueError: it is not written like that, or the first is not below the second, or they are not in 0..100.
    """
    match = re.fullmatch(r"\s*(\d{1,3}(?:\.\d{1,9})?)\s*%\s*\.\.\s*(\d{1,3}(?:\.\d{1,9})?)\s*%\s*", rule)
    if match is None:
        raise ValueError(
            "a rule for the range is auto, full, set, percentiles such as 1%..99%, or two numbers [black, white]"
        )
    low, high = float(match[1]), float(match[2])
    if not 0 <= low < high <= 100:
        raise ValueError("percentiles are low%..high% with 0 <= low < high <= 100")
    return low, high


def _known_rule(rule: str) -> str:
    if rule not in ("auto", "full", "set"):
        percentiles(rule)
    return rule


_RangeRule = Annotated[str, AfterValidator(_known_rule)]


def _on_or_off(value: Any) -> Any:
    """YAML reads a bare `on` as true, and `off` as false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _one_or_several(value: Any) -> Any:
    """A list of names, or a single name."""
    return [value] if isinstance(value, str) else value


class DataRecipe(_Group):
    """The pixels that the network sees: size, crop, value range and normalisation."""

    # pixels; auto: the network's own size (224 for transformers made for more), or the images' if they are smaller
    size: Auto | Annotated[int, Field(ge=8, le=MAX_IMAGE_SIZE)] = 224
    # without augmentation: the image is resized to size / crop_fraction and its centre cropped
    crop_fraction: float = Field(0.875, gt=0, le=1)
    # what becomes black and white in images with more than 8 bits a channel: [black, white]; full: the limits of their
    # type; set: the smallest and largest value of the data set; 1%..99%: its percentiles; auto: full, or the values the
    # set uses if they span less than half of the type (hot pixels left out)
    range: _RangeRule | Annotated[tuple[float, float], AfterValidator(_black_to_white)] = "auto"
    # data loader processes per rank; auto: by cores and device
    workers: Auto | Annotated[int, Field(ge=0, le=MAX_WORKERS)] = "auto"
    # of training crops. turbo: JPEGs by libjpeg-turbo, large ones at a fraction of their size; pil: Pillow, as for
    # features and evaluation; auto: turbo if simplejpeg is installed
    decoder: Literal["auto", "pil", "turbo"] = "auto"
    # keep small images decoded in memory while a run trains, as many as fit in a quarter of what is free: the same
    # result, faster from the second epoch on
    cache: Annotated[Literal["on", "off"], BeforeValidator(_on_or_off)] = "on"
    # of the images; auto: as many as the checkpoint takes, nearly always 3 (RGB). To others, one for RGB is widened
    bands: Auto | Annotated[int, Field(ge=2, le=MAX_BANDS)] = "auto"
    # of each channel, in 0..1 of its range; null: the checkpoint's own, or ImageNet's where it states none (of n bands:
    # as auto); auto: the checkpoint's own, or measured on the images where it states none
    mean: Auto | list[float] | None = None
    std: Auto | list[Annotated[float, Field(ge=1e-6)]] | None = None  # the standard deviation, likewise
    # the share of the images that may become unreadable while a run trains, before it stops
    max_broken: float = Field(0.01, ge=0, le=1)


def _low_to_high(pair: tuple[float, float]) -> tuple[float, float]:
    if not 0 < pair[0] <= pair[1]:
        raise ValueError("a range is [low, high] with 0 < low <= high")
    return pair


class AugmentRecipe(_Group):
    """Augmentation of training images (paper, sec. 3.4). Jitter strengths are those of torchvision's ColorJitter."""

    crop_scale: Annotated[tuple[float, float], AfterValidator(_low_to_high)] = (0.08, 1.0)  # share of the area
    crop_ratio: Annotated[tuple[float, float], AfterValidator(_low_to_high)] = (0.75, 4 / 3)  # width to height
    flip: float = Field(0.5, ge=0, le=1)  # probability, left to right
    vertical_flip: float = Field(0.0, ge=0, le=1)  # probability, top to bottom
    quarter_turns: bool = False  # rotate by 0, 90, 180 or 270 degrees, each equally often
    rotation: float = Field(2.0, ge=0, le=180)  # degrees, in either direction
    brightness: float = Field(0.4, ge=0)  # factor in (1 - b, 1 + b)
    contrast: float = Field(0.4, ge=0)  # likewise
    saturation: float = Field(1.0, ge=0)  # likewise
    hue: float = Field(0.5, ge=0, le=0.5)  # fraction of the colour circle, in either direction
    gray: float = Field(0.2, ge=0, le=1)  # probability


_PartName = Annotated[str, Field(max_length=300)]


class BackboneRecipe(_Group):
    """How to load the checkpoint, to override what its file says or odcft detects."""

    input: Literal["rgb", "bgr", "gray", "lab_l", "sobel"] | None = None  # the colours it expects
    allow_partial: bool = False  # accept less than 90 % of the backbone; the rest starts from random weights
    # where in a file with several backbones one of them is; a list has one for each checkpoint
    part: _PartName | Annotated[list[_PartName | None], Field(min_length=1)] | None = None
    arch_args: dict[str, Any] | None = None  # arguments to build the network with: {patch_size: 8}


class NeckRecipe(_Group):
    """{fc-bn-relu-dropout-fc-relu} (paper, sec. 3.2)."""

    hidden: int = Field(512, ge=0, le=MAX_WIDTH)  # width of the layer between backbone and features; 0: only fc-relu
    dim: int = Field(256, ge=2, le=MAX_WIDTH)  # D, width of the features that are clustered
    relu: bool = True  # the last; without it features may be negative
    dropout: float = Field(0.5, ge=0, lt=1)  # probability
    bn_momentum: float = Field(0.001, gt=0, le=1)  # of the running statistics (official code)


class MemoryRecipe(_Group):
    """The samples memory and the centroids memory (paper, sec. 3.1 and 3.2)."""

    clusters: Auto | Annotated[int, Field(ge=2)] = "auto"  # K; auto: images / 128, at most 10,000
    momentum: float = Field(0.5, gt=0, le=1)  # m of eq. 2
    centroid_interval: int = Field(10, ge=1)  # steps between two refreshes of the centroids
    min_cluster: int = Field(20, ge=-1)  # clusters with this many images or fewer are dispersed and refilled
    variant: Literal["paper", "official"] = "paper"  # where paper and official code differ (docs/variants.md)
    # the layer of the backbone whose features give the images their first labels (`odcft evaluate --layers all` lists
    # them): of a pretext checkpoint an earlier one may be far better; last: the features that are clustered later, too;
    # auto: the deepest in which nearly as many neighbours of an image as in any stay when it is augmented
    start_layer: Annotated[str, Field(max_length=300)] = "last"
    # what the samples memory starts with: the output of the neck, or (odc, neck.relu=false) the features of start_layer
    # as neck.dim whitened components; then, for start_epochs, the memory stays as it is, and the network learns only to
    # find each image's own entry among those of its batch
    start_features: Literal["neck", "layer"] = "neck"
    # in which the images keep their first labels; auto: half of the epochs if another layer than the last gives them or
    # start_features is layer
    start_epochs: Auto | Annotated[float, Field(ge=0)] = "auto"
    # share of the loss by which the network learns to find each image's own entry of the samples memory among those of
    # its batch (only for odc); the rest is eq. 1. With 1, the network learns nothing from the clusters
    instance_share: float = Field(0.0, ge=0, le=1)
    reweight: bool = True  # loss weights 1 / sqrt(N_c)
    dtype: Literal["auto", "float16", "float32"] = "auto"  # of the stored features; auto: float16 on a GPU


class DCRecipe(_Group):
    """Settings of DeepCluster alone; it also uses `memory.clusters` and `kmeans`."""

    interval: int = Field(1, ge=1)  # epochs between two clusterings
    pca: int = Field(256, ge=1)  # whitened principal components kept for K-Means
    balance: Literal["sampling", "reweighting"] = (
        "sampling"  # draw images uniformly over clusters, or weight losses by 1 / sqrt(N_c)
    )


class MemberRecipe(_Group):
    """The weights of the losses of one member of collaborative ODC."""

    cluster: float = Field(1.0, ge=0)  # predict the joint cluster of an image
    rotation: float = Field(0.0, ge=0)  # ROT: predict by how many quarter turns a copy was rotated
    mixup: float = Field(0.0, ge=0)  # CLS: predict the clusters of two images that were mixed

    @model_validator(mode="after")
    def _check_it_learns_from_clusters(self) -> "MemberRecipe":
        if self.cluster == self.mixup == 0:
            raise ValueError("a member needs a weight for cluster or mixup, or it learns nothing from the clusters")
        return self


class CODCRecipe(_Group):
    """Settings of collaborative ODC alone; it also uses memory, neck and kmeans as ODC does."""

    members: Auto | Annotated[list[MemberRecipe], Field(min_length=1)] = "auto"  # auto: a plain one per checkpoint
    alpha: float = Field(1.0, gt=0)  # mixup: the mixing ratio is drawn from Beta(alpha, alpha)


class KMeansRecipe(_Group):
    """K-Means: run once to initialise the memories (odc), or every few epochs (dc)."""

    iterations: int = Field(20, ge=1)  # at most
    engine: Literal["auto", "torch", "faiss"] = "auto"  # auto: torch


class OptimRecipe(_Group):
    """The optimizer and its schedule. The recipes say which of the values are the paper's."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    # passes over the images; auto: as many as make `auto_steps` steps, from 10 to 300
    epochs: Auto | Annotated[int, Field(ge=1, le=MAX_EPOCHS)] = 120
    auto_steps: int = Field(4400, ge=1, le=MAX_EPOCHS)  # what epochs=auto aims at; not used otherwise
    batch_size: int = Field(512, ge=2)  # over all ranks
    lr: float = Field(0.06, gt=0)  # for this batch size
    schedule: Literal["cosine", "step"] = "cosine"
    final_epochs: Auto | Annotated[float, Field(ge=0)] = (
        "auto"  # of schedule step: the last epochs, at lr * final_factor
    )
    final_factor: float = Field(0.1, ge=0, le=1)  # of schedule step: what lr is multiplied by
    warmup_epochs: float = Field(0.0, ge=0)  # in which lr rises from 0
    momentum: float = Field(0.9, ge=0, lt=1)  # for adamw, the first beta
    head_momentum: float = Field(0.0, ge=0, lt=1)  # the head's own (official code, after DeepCluster)
    head_lr: float = Field(1.0, gt=0)  # the head's learning rate, as a multiple of lr
    weight_decay: float = Field(1e-5, ge=0)  # sgd: of all weights; adamw: of matrices and filters
    # how many of the backbone's first stages keep their weights and statistics: 1: the stem, 2: also the first stage
    # or transformer block, … Their backward pass is saved
    freeze: int = Field(0, ge=0)
    # in how many parts, one after the other, a process computes its batch: the batch stays the same and needs less
    # memory, but batch norm sees one part at a time; auto: as few as fit on the GPU
    accumulate: Auto | Annotated[int, Field(ge=1, le=MAX_PARTS)] = 1
    # keep only the activations between the blocks of a network without batch norm (timm's gradient checkpointing), and
    # compute the others again: the same result with less memory, in about a third more time
    checkpointing: bool = False
    # do not multiply the padding around maps of one pixel, into which small images shrink (ResNet-18: from 32 pixels or
    # fewer): the same result but for rounding, and a ResNet-18 trains in 0.7 of the time on a CPU
    skip_padding: bool = False
    compile: bool = False  # the backbones with torch.compile
    # of autocast; auto: bfloat16 on a GPU that has it, float16 (with loss scaling) on a V100 or T4
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    # batch norm of the backbone over all processes, on GPUs only; auto: on (the neck's own never is, as in the code)
    sync_bn: Annotated[Literal["auto", "on", "off"], BeforeValidator(_on_or_off)] = "auto"
    channels_last: bool = True  # memory layout of images, faster on GPUs
    tf32: bool = True  # round float32 products on a GPU to TF32
    skip_non_finite: int = Field(0, ge=0)  # consecutive steps that may be skipped because a gradient is not finite


class LogRecipe(_Group):
    """How often a run logs, and saves its state."""

    interval: int = Field(50, ge=1)  # steps between two lines of metrics.jsonl
    tensorboard: bool = True  # also write event files
    # other trackers: wandb (Weights & Biases), mlflow; both keep to this machine unless the environment says otherwise
    trackers: Annotated[list[Literal["wandb", "mlflow"]], BeforeValidator(_one_or_several)] = Field(
        default_factory=list
    )
    # between two contact sheets of some clusters for the trackers, at the ends of epochs; 0: none
    sheet_minutes: float = Field(5.0, ge=0)
    report: bool = True  # report.html in the RUN: now and then while it trains, and in full at its end
    snapshot_minutes: float = Field(10.0, gt=0)  # between two states; one is also due at the end of every epoch
    # largest share of the time to spend on saving; states wait if it would be more
    snapshot_share: float = Field(0.02, gt=0, le=1)


class Recipe(_Group):
    """Every setting of a run besides the checkpoint and the images."""

    method: Literal["odc", "dc", "codc"] = "odc"
    seed: int = Field(0, ge=0)
    data: DataRecipe = Field(default_factory=DataRecipe)
    augment: AugmentRecipe = Field(default_factory=AugmentRecipe)
    backbone: BackboneRecipe = Field(default_factory=BackboneRecipe)
    neck: NeckRecipe = Field(default_factory=NeckRecipe)
    memory: MemoryRecipe = Field(default_factory=MemoryRecipe)
    dc: DCRecipe = Field(default_factory=DCRecipe)
    codc: CODCRecipe = Field(default_factory=CODCRecipe)
    kmeans: KMeansRecipe = Field(default_factory=KMeansRecipe)
    optim: OptimRecipe = Field(default_factory=OptimRecipe)
    log: LogRecipe = Field(default_factory=LogRecipe)

    @property
    def starts_with_layer(self) -> bool:
        """Whether the samples memory starts with the features of `memory.start_layer`."""
        return self.method == "odc" and self.memory.start_features == "layer"


DEFAULT = "odc_r50_finetune"


def shipped() -> dict[str, str]:
    """The recipes installed with the package: name to YAML text."""
    return {
        path.name.removesuffix(".yaml"): path.read_text(encoding="utf-8")
        for path in sorted(_folder().iterdir(), key=lambda path: path.name)
        if path.name.endswith(".yaml")
    }


def _folder() -> Any:
    try:
        return resources.files("odcft.recipes")
    except ModuleNotFoundError:  # run from a checkout, where recipes/ lies next to odcft/
        return Path(__file__).parent.parent / "recipes"


def load_recipe(
    name: "str | os.PathLike[str] | Recipe" = DEFAULT,
    overrides: Mapping[str, Any] | Sequence[str] | None = None,
    *,
    preset: str | None = None,
) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        name: a shipped recipe's name, a YAML file, or a Recipe (which is not changed).
        overrides: {"group.field": value}, or each "group.field=value" with the value in YAML.
        preset: one of `presets.PRESETS`; its fields override the recipe's, and `overrides` override both.

    Returns:
        The recipe, validated; fields may still be `auto`.

    Raises:
        OdcftError: no such recipe or preset, not YAML, an unknown field (with the nearest known name), or an invalid
            value.
    """
    recipes, origin = shipped(), "recipe" if isinstance(name, Recipe) else str(name)
    if isinstance(name, Recipe):
        fields = name.model_dump(mode="json")
    else:
        text = recipes[origin] if origin in recipes else _read_text(Path(name), recipes)
        fields = parse_yaml(text, origin) or {}
    if not isinstance(fields, dict):
        raise OdcftError(f"{origin} is not a recipe: it holds no fields. `odcft recipes {DEFAULT}` shows one.")
    for override in [*preset_fields(preset), *set_lines(overrides)]:
        _apply(fields, override)
    return make_recipe(fields, origin)


def set_lines(overrides: Mapping[str, Any] | Sequence[str] | None) -> list[str]:
    """Overrides as lines "group.field=value".

    Raises:
        OdcftError: they are neither a mapping nor a list of lines, or a value cannot be written in YAML.
    """
    if isinstance(overrides, Mapping):
        try:
            return [f"{path}={json.dumps(value, default=_plain)}" for path, value in overrides.items()]
        except (TypeError, ValueError) as error:
            raise OdcftError(f"set: {error}. Give numbers, text, lists and dicts.") from None
    if isinstance(overrides, str) or not all(isinstance(line, str) for line in overrides or ()):
        raise OdcftError(
            f'set={short_repr(overrides)}: give {{"memory.momentum": 0.3}} or a list such as ["memory.momentum=0.3"].'
        )
    return list(overrides or ())


def _plain(value: Any) -> int | float:
    """A number of numpy's as Python's own, for JSON."""
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"{short_repr(value)} ({type(value).__name__}) is not JSON")


def _read_text(path: Path, recipes: Any) -> str:
    try:
        if path.exists() and not path.is_file():
            raise OdcftError(
                f"{path} is not a file, so it cannot be a recipe. Give a YAML file, or one of: {', '.join(recipes)}."
            )
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise OdcftError(
                f"{path} has {path.stat().st_size:,} bytes, too many for a recipe (at most {MAX_BYTES:,})."
            )
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise OdcftError(
            f"{path}: no such recipe{_did_you_mean(str(path), recipes)}. "
            f"Give a YAML file, or one of: {', '.join(recipes)}."
        ) from None


class _RestrictedLoader(yaml.SafeLoader):
    """Loads YAML without aliases, with which a few lines can grow to a billion values, and without deep nesting.

    A field that appears twice is an error, because PyYAML would silently keep only one of them.
    """

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not allowed", mark)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, "it is nested too deeply", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.ScalarNode) and len(node.value) > MAX_VALUE_LENGTH:
            raise yaml.composer.ComposerError(None, None, "a value is too long", node.start_mark)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in found:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} appears twice", key.start_mark)
            found.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, origin: str) -> Any:
    """Parse YAML that need not be trusted.

    Raises:
        OdcftError: it is not YAML, has aliases or a field twice, is nested too deeply, or has a value that is too long.
    """
    if len(text) > MAX_BYTES:
        raise OdcftError(f"{origin} has {len(text):,} characters, too many for a recipe (at most {MAX_BYTES:,}).")
    try:
        return yaml.load(text, _RestrictedLoader)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where and "\n" in text.strip() else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise OdcftError(f"{origin} is not valid YAML{line}: {short_repr(problem, 100, quotes=False)}.") from None
    except Exception as error:  # such as the 40th of a month, or a number of 5,000 digits
        raise OdcftError(f"{origin} is not valid YAML: {short_repr(str(error), 100, quotes=False)}.") from None


def make_recipe(fields: dict[str, Any], origin: str = "recipe") -> Recipe:
    """Make a recipe from nested fields, as read from YAML.

    Raises:
        OdcftError: an unknown field (with the nearest known name) or an invalid value.
    """
    if not isinstance(fields, dict):
        raise OdcftError(f"{origin} is not a recipe: it holds no fields. `odcft recipes {DEFAULT}` shows one.")
    _refuse_unknown(fields, Recipe, "")
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if str(part) in _all_fields())
        problems = "; or ".join(
            dict.fromkeys(
                e["msg"]
                for e in error.errors()
                if e["loc"][: len(place.split("."))] == first["loc"][: len(place.split("."))]
            )
        )
        raise OdcftError(
            f"{place}={short_repr(first['input'])} is not valid: {short_repr(problems, 300, quotes=False)} "
            f"({origin}; `odcft recipes {DEFAULT}` shows the fields)."
        ) from None


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, with every field written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def flatten(fields: dict[str, Any]) -> dict[str, Any]:
    """The nested fields of a dumped recipe as a flat dict: "group.field" to value."""
    return {
        f"{group}.{name}" if name else group: value
        for group, inner in fields.items()
        for name, value in (inner.items() if isinstance(inner, dict) else [("", inner)])
    }


def load_options(recipe: Recipe, member: int = 0, members: int = 1) -> dict[str, Any]:
    """The options for `load_backbone` that a recipe sets for one of several checkpoints.

    A mean or std that is `auto` is decided after loading.

    Raises:
        OdcftError: the recipe lists parts for another number of checkpoints.
    """
    given = {name: getattr(recipe.data, name) for name in ("mean", "std", "bands")}
    options = {**recipe.backbone.model_dump(), **{name: None if v == "auto" else v for name, v in given.items()}}
    if isinstance(parts := recipe.backbone.part, list):
        if len(parts) != members:
            raise OdcftError(
                f"backbone.part lists {len(parts)} parts, but there {'is' if members == 1 else 'are'} "
                f"{count_of(members, 'checkpoint')}. Give one for all of them, or one for each in their order."
            )
        options["part"] = parts[member]
    return options


def _apply(fields: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals:
        raise OdcftError(f"--set {override}: write it as group.field=value, for example --set memory.momentum=0.3.")
    *groups, field = path.strip().split(".")
    _refuse_unknown_path(path.strip())
    for group in groups:
        if not isinstance(fields.setdefault(group, {}), dict):
            raise OdcftError(
                f"{group}={short_repr(fields[group])}: this is a group of fields, for example {path.strip()}."
            )
        fields = fields[group]
    fields[field] = parse_yaml(value, f"--set {short_repr(override, quotes=False)}")
    if isinstance(fields[field], str):  # YAML 1.1 reads 1e-5 as text, but people mean the number
        with contextlib.suppress(ValueError):
            fields[field] = float(fields[field])


def _refuse_unknown_path(path: str) -> None:
    model: Any = Recipe
    seen: list[str] = []
    for part in path.split("."):
        if not _is_group(model):
            raise OdcftError(f"{path}: no such field; {'.'.join(seen)} has no fields of its own.")
        _refuse_unknown({part: None}, model, ".".join(seen))
        model = model.model_fields[part].annotation
        seen.append(part)


def _refuse_unknown(fields: dict[str, Any], model: Any, prefix: str) -> None:
    for name, value in fields.items():
        path = f"{prefix}.{name}" if prefix else str(name)
        path = short_repr(path, quotes=False)
        if name not in model.model_fields:
            nearest = difflib.get_close_matches(str(name)[:100], model.model_fields, n=1)
            if nearest:
                hint = f" Did you mean {prefix + '.' if prefix else ''}{nearest[0]}?"
            else:
                elsewhere = [full for full in all_field_paths() if full.split(".")[-1] == name]
                hint = f" Did you mean {elsewhere[0]}?" if elsewhere else ""
            raise OdcftError(f"{path}: no such field.{hint} (`odcft recipes {DEFAULT}` shows all of them)")
        inner = model.model_fields[name].annotation
        if _is_group(inner):
            if not isinstance(value, dict | None):
                raise OdcftError(
                    f"{path}={short_repr(value)}: this is a group of fields, "
                    f"for example {path}.{next(iter(inner.model_fields))}."
                )
            _refuse_unknown(value or {}, inner, path)
        entry = _model_within(inner)
        for number, fields_of_one in enumerate(value if entry and isinstance(value, list) else []):
            if isinstance(fields_of_one, dict):
                _refuse_unknown(fields_of_one, entry, f"{path}[{number}]")


def _is_group(annotation: Any) -> bool:
    """Whether an annotation is a group of fields."""
    # In Python 3.10 `list[int]` passes for a type, and issubclass refuses it.
    return get_origin(annotation) is None and isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _model_within(annotation: Any) -> Any:
    """The group of fields that the entries of a list are, if the annotation allows such a list."""
    for part in get_args(annotation):
        if _is_group(part):
            return part
        if within := _model_within(part):
            return within
    return None


def all_field_paths() -> list[str]:
    paths = []
    for name, info in Recipe.model_fields.items():
        inner: Any = info.annotation
        if _is_group(inner):
            paths += [f"{name}.{field}" for field in inner.model_fields]
        else:
            paths.append(name)
    return paths


def _all_fields() -> set[str]:
    return {part for path in all_field_paths() for part in path.split(".")}


def _did_you_mean(name: str, known: Any) -> str:
    nearest = difflib.get_close_matches(name[:100], list(known), n=1)
    return f" (did you mean {nearest[0]}?)" if nearest else ""
