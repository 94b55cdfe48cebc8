"""Load a backbone, a network that turns images into pooled features (B, F), from a checkpoint or by name."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from odcft import seeds
from odcft.backbone.architecture_recognition import MIN_COVERAGE, nearest_name, recognise
from odcft.backbone.backbone_parts import Part, complete_parts, only_part, why_taken
from odcft.backbone.band_widening import set_bands
from odcft.backbone.checkpoint_files import Contents, read
from odcft.backbone.checkpoint_metadata import check_arguments
from odcft.backbone.family_recognition import recognise_family
from odcft.backbone.input_recognition import recognise_input, with_color
from odcft.backbone.network import Backbone
from odcft.backbone.network_input import CHANNELS, Adapter, bands_input
from odcft.backbone.non_timm_networks import NETWORKS, RGB, count_elements, is_network
from odcft.backbone.tensor_matching import Match, constant, not_finite
from odcft.errors import OdcftError
from odcft.text import short_repr

MAX_RANDOM_ELEMENTS = 1 << 27  # numbers a network may hold beyond those its file fills

# Classes that often stand beside the weights and say nothing about the network.
_HARMLESS_CLASSES = (
    *("argparse.", "numpy.", "_codecs.", "collections.", "builtins.", "__builtin__.", "datetime.", "pathlib.", "enum."),
    *("typing.", "copyreg.", "torch.optim.", "torch.amp.", "torch.cuda.amp.", "omegaconf.", "yacs.", "easydict."),
    *("addict.", "antlr4.", "pytorch_lightning.", "lightning."),
)


@dataclass
class Loaded:
    """A backbone and where it came from."""

    backbone: Backbone
    source: str  # as the user named it
    match: Match | None = None  # None for random weights and for weights from timm
    family: str = ""
    notes: list[str] = field(default_factory=list)  # what the user should know: odd tensors, missing parts
    states_view: bool = False  # whether the source itself says which image size and crop its network expects
    not_finite: list[str] = field(default_factory=list)  # tensors that hold NaN or infinity
    parts: list[Part] = field(default_factory=list)  # complete backbones in the file, first the one that was taken
    why: str = ""  # it was taken, where there are several


def load_backbone(
    ckpt: str | Path,
    arch: str | None = None,
    input: str | None = None,
    allow_partial: bool = False,
    seed: int = 0,
    member: int = 0,
    arch_args: Mapping[str, Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    finite: bool = True,
    part: str | None = None,
    *,
    bands: int | None = None,
    fetch: bool = True,
) -> Loaded:
    """Load the backbone of a checkpoint.

    Args:
        ckpt: a checkpoint file, a timm folder, a finished RUN, or `timm:NAME`, `torchvision:NAME`, `scratch:NAME`
            (`scratch:alexnet` is the papers', with batch norm; elsewhere `alexnet` is torchvision's).
        arch: the architecture, to override what the file says or odcft guesses.
        input: the colours to show it, to override what the file says or odcft guesses; the first convolution is adapted
            where they need it (`_apply_input`). A network with random weights is built for these colours.
        allow_partial: accept a file that covers less than 90 % of the backbone; the rest keeps random weights.
        seed, member: of a run, and of this network among several; random weights depend on nothing else.
        arch_args: arguments to build the network with (`metadata.Arguments`), to override the file's own.
        mean, std: for each channel, in 0..1 of the input's range, to override what the file says or odcft guesses.
        finite: refuse weights that are not finite; otherwise only list them.
        part: where in the file to look (`only_part`), if it holds several backbones and another one is wanted.
        bands: of the images, if not what the network takes; a first convolution for RGB is widened (`set_bands`).
        fetch: weights of `timm:NAME` may come from the hub; not if a file and not the user says so.

    Returns:
        The backbone on the CPU, in evaluation mode, and what was matched.

    Raises:
        OdcftError: the file cannot be read, its network is unknown or incomplete, or weights are not finite.
    """
    name = str(ckpt)
    scheme, _, rest = name.partition(":")
    arch_args = check_arguments(arch_args or {})
    if input is not None:
        _refuse_unknown_input(input)
    with seeds.seeded_init(seed, "backbone", member):
        if scheme in ("timm", "torchvision", "scratch") and rest:
            if part is not None:
                raise OdcftError(f"--part {part}: {name} is not a file, so it has no parts. Drop --part.")
            loaded = _load_named(name, scheme, rest, input, arch_args, fetch)
        else:
            loaded = _load_file(name, Path(ckpt), arch, allow_partial, arch_args, part)
        _apply_input(loaded, input, allow_partial)
        _apply_bands(loaded, bands)
    set_mean_and_std(loaded.backbone, mean, std)
    if finite and loaded.not_finite:
        raise OdcftError(
            f"{name}: weights of the backbone are not finite ({first_few(loaded.not_finite)}), "
            "so it gives no features. Use an earlier checkpoint."
        )
    return loaded


def _load_file(
    name: str, path: Path, arch: str | None, allow_partial: bool, arch_args: dict[str, Any], part: str | None
) -> Loaded:
    try:
        if (path / "backbone" / "config.json").exists():  # a RUN
            path = path / "backbone"
    except OSError as error:
        raise OdcftError(f"{short_repr(name, 200, quotes=False)} cannot be read: {error.strerror}.") from None
    whole = read(path)
    contents = whole if part is None else only_part(whole, part)
    arch, kwargs, found = recognise(contents, arch, arch_args)
    if not allow_partial:
        _refuse_partial(path, arch, found)
    _refuse_mostly_empty(path, arch, kwargs, found)
    backbone = Backbone(arch, random=bool(found.missing), **kwargs)
    _set_input(backbone, contents, found)
    backbone.model_type = contents.metadata.model_type
    backbone.net.load_state_dict({**backbone.net.state_dict(), **found.tensors})
    parts = complete_parts(whole, backbone.net.state_dict(), found)
    return Loaded(
        backbone.eval(),
        name,
        found,
        recognise_family(contents, arch, found),
        _notes(contents, found),
        states_view=contents.metadata.architecture is not None or contents.metadata.input is not None,
        not_finite=not_finite(backbone.net.state_dict()),
        parts=parts,
        why=why_taken(parts, part) if len(parts) > 1 else "",
    )


def _refuse_partial(path: Path, arch: str, found: Match) -> None:
    """Refuse a file that lacks much of the backbone, or has a first convolution of another shape."""
    if found.coverage < MIN_COVERAGE:
        missing = ", ".join(found.missing[:3]) + (" …" if len(found.missing) > 3 else "")
        near = f" Whatever the names, its shapes come closest to {found.nearest}." if found.nearest else ""
        raise OdcftError(
            f"{path} has only {len(found.tensors)} of the {found.expected} tensors of {arch}, the closest backbone "
            f"({found.coverage:.0%}; missing: {missing}).{near} At least {MIN_COVERAGE:.0%} are needed: if it is "
            "another network, pass --arch NAME; to start the rest from random weights, pass --allow-partial."
        )
    first = _first_convolution(arch)
    if first in found.misfits:
        raise OdcftError(
            f"{path} is nearly a {arch}, but its first convolution has the shape {tuple(found.misfits[first].shape)}. "
            "If it is another network, pass --arch NAME; to start that layer from random weights, pass --allow-partial."
        )


def _refuse_mostly_empty(path: Path, arch: str, kwargs: dict[str, Any], found: Match) -> None:
    """Refuse to allocate a large network for a file that fills little of it."""
    filled = sum(tensor.untyped_storage().nbytes() // tensor.itemsize for tensor in found.tensors.values())
    if (needed := count_elements(arch, **kwargs)) > 4 * filled + MAX_RANDOM_ELEMENTS:
        raise OdcftError(
            f"{path} fills only {filled:,} of the {needed:,} numbers in {arch}, too few to build such a network."
        )


def _set_input(backbone: Backbone, contents: Contents, found: Match) -> None:
    """Show the backbone what the file was trained on, at a size that it takes."""
    own_size, cfg = backbone.size, getattr(backbone.net, "pretrained_cfg", {})
    backbone.adapter = Adapter(recognise_input(contents, backbone.arch, backbone.arch_args, found, cfg))
    if contents.metadata.input is None:
        return
    if backbone.fixed_size:
        usable = backbone.size == own_size
    else:
        usable = backbone.size >= own_size or backbone.accepts_size(backbone.size)
    if not usable:
        contents.metadata.ignored.append(f"input.size={backbone.size}: {backbone.arch} takes {own_size}")
        backbone.adapter = Adapter(replace(backbone.input, size=own_size))


def _first_convolution(arch: str) -> str:
    """The name of the weights of a network's first convolution."""
    import timm

    cfg = None if arch in NETWORKS else timm.get_pretrained_cfg(arch, allow_unregistered=True)
    first = getattr(cfg, "first_conv", None)
    return f"{first}.weight" if isinstance(first, str) else "conv1.weight"


def _notes(contents: Contents, found: Match) -> list[str]:
    notes = [*contents.metadata.notes, *found.notes]
    if ignored := contents.metadata.ignored:
        notes.append(f"ignored in the file's own description: {first_few(ignored, '; ')}")
    if found.missing:
        notes.append(
            f"{len(found.missing)} tensors are not in the file, so they start random: {first_few(found.missing)}"
        )
    if wrong := found.unexpected:
        notes.append(f"{len(wrong)} tensors have another shape and were left out: {first_few(wrong)}")
    if contents.unusable:
        notes.append(f"sparse, quantized and complex tensors were left out: {first_few(contents.unusable)}")
    if odd := [f"{name} is not finite" for name in not_finite(found.tensors)] + constant(found.tensors):
        notes.append(f"check these tensors: {first_few(odd)}")
    if replaced := [name for name in contents.replaced_classes if not name.startswith(_HARMLESS_CLASSES)]:
        notes.append(f"objects of these classes were not loaded, only the tensors: {first_few(replaced)}")
    return notes


def _refuse_unknown_input(color: str) -> None:
    if color not in CHANNELS:
        raise OdcftError(f"--input {color}: no such input. Choose from {', '.join(CHANNELS)}.")


def _apply_input(loaded: Loaded, color: str | None, allow_partial: bool) -> None:
    """Show the backbone the colours the user asked for, and adapt the first convolution where they need it.

    From three channels to one, its weights are summed; from one to three, they are spread. An image whose channels are
    all alike then gives the same features as before. Gradients (sobel) are not a colour in other units, and no sum of
    filters for colours is a filter for them: there the first convolution starts from random weights, if it may.
    """
    backbone = loaded.backbone
    if color is None or color == backbone.input.color:
        return
    here, wanted = backbone.input.channels, CHANNELS[color]
    if {here, wanted} == {1, 3}:
        _convert_first_convolution(backbone, here, wanted)
        loaded.notes.append(
            f"the first convolution was adapted from {here} to {wanted} channels, as --input {color} asks"
        )
    elif here != wanted:
        if not allow_partial:
            possible = ", ".join(c for c, n in CHANNELS.items() if n == here) or backbone.input.color
            raise OdcftError(
                f"--input {color} gives {wanted} channels, but {backbone.arch} takes {here} and there is no way to "
                f"adapt its first convolution. Choose --input from {possible}, or pass --allow-partial to start that "
                "layer from random weights."
            )
        loaded.backbone, replaced = _with_random_first_convolution(backbone, wanted)
        loaded.notes.append(
            f"the first convolution ({first_few(replaced)}) now takes {wanted} channels and starts random, "
            f"as --input {color} asks"
        )
    loaded.backbone.adapter = Adapter(with_color(backbone.input, color))


def _apply_bands(loaded: Loaded, bands: int | None) -> None:
    """Let the backbone take images of so many bands, with a note if its first convolution was widened for them."""
    if bands is None:
        return
    random = loaded.source.startswith("scratch:")
    loaded.backbone, notes = set_bands(loaded.backbone, bands, random)
    loaded.notes += notes


@torch.no_grad()
def _convert_first_convolution(backbone: Backbone, here: int, wanted: int) -> None:
    """Sum the first convolution's weights over its three input channels, or spread those of one over three."""
    first = next(m for m in backbone.net.modules() if isinstance(m, nn.Conv2d) and m.in_channels == here)
    weight = first.weight.sum(1, keepdim=True) if wanted == 1 else first.weight.expand(-1, 3, -1, -1) / 3
    first.weight, first.in_channels = nn.Parameter(weight.clone()), wanted
    backbone.arch_args = {**backbone.arch_args, "in_chans": wanted}


def _with_random_first_convolution(backbone: Backbone, channels: int) -> tuple[Backbone, list[str]]:
    """The same backbone for another number of channels, and the names of the tensors that start random in it."""
    fresh = Backbone(backbone.arch, backbone.input, **{**backbone.arch_args, "in_chans": channels})
    new, old = fresh.net.state_dict(), backbone.net.state_dict()
    kept = {name: tensor for name, tensor in old.items() if tensor.shape == new[name].shape}
    fresh.net.load_state_dict({**new, **kept})
    return fresh.eval(), [name for name in old if name not in kept]


def set_mean_and_std(backbone: Backbone, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Normalise images with the mean and std the user gave: for each channel, in 0..1 of its range."""
    if mean is None and std is None:
        return
    input = backbone.input
    chosen = {"mean": input.mean, "std": input.std}
    for title, numbers in (("mean", mean), ("std", std)):
        if numbers is None:
            continue
        if len(numbers) != len(input.mean):
            raise OdcftError(
                f"data.{title}={short_repr(list(numbers))}: {backbone.arch} takes {input.color}; "
                f"give {len(input.mean)} number{'s' if len(input.mean) > 1 else ''}, one a channel."
            )
        if not all(math.isfinite(number) and (number > 0 or title == "mean") for number in numbers):
            raise OdcftError(
                f"data.{title}={short_repr(list(numbers))}: give finite numbers{' above 0' * (title == 'std')}."
            )
        chosen[title] = tuple(number * input.range for number in numbers)
    known = input.measured or (mean is not None and std is not None)
    backbone.adapter = Adapter(replace(input, mean=chosen["mean"], std=chosen["std"], measured=known))


def first_few(names: list[str], between: str = ", ") -> str:
    """The first four names from a file on one line, and how many more there are."""
    few = [short_repr(name, 200, quotes=False) for name in names[:4]]
    return between.join(few) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _load_named(name: str, scheme: str, rest: str, input: str | None, arch_args: dict[str, Any], fetch: bool) -> Loaded:
    """Load `timm:NAME` or `torchvision:NAME` with its weights, or `scratch:NAME` with random ones."""
    arch = rest.split(".")[0] if scheme != "timm" else rest
    refuse_unknown_arch(arch, name)
    if scheme != "scratch":
        return Loaded(_from_hub(name, scheme, arch, arch_args, fetch).eval(), name, None, scheme, states_view=True)
    usual = NETWORKS[arch][1] if arch in NETWORKS else None
    if name == "scratch:alexnet":  # the papers' (sec. 3.4, after DeepCluster): batch norm, and here RGB for Sobel
        arch, usual, arch_args = "alexnet_deepcluster", RGB, {"in_chans": 3, **arch_args}
    here = usual.channels if usual else 3
    wanted = here if input is None or (usual and input == usual.color) else CHANNELS[input]
    if arch_args.get("in_chans", here) == here and wanted != here:
        arch_args = {**arch_args, "in_chans": wanted}
    channels = arch_args.get("in_chans", here)
    if channels == here:
        return Loaded(Backbone(arch, usual, **arch_args).eval(), name, None, scheme)
    color = input or {1: "gray", 2: "sobel", 3: "rgb"}.get(channels, "bands")
    if CHANNELS.get(color, channels) != channels:
        raise OdcftError(
            f"{name}: odcft gives networks images of 1 (gray, lab_l), 2 (sobel) or 3 (rgb, bgr) channels, "
            f"not {channels}{f' for --input {input}' if input else ''}."
        )
    backbone = Backbone(arch, usual, **arch_args)  # weights drawn for these colours, so there is nothing to adapt
    size = backbone.size
    input_now = bands_input(size, channels) if color == "bands" else with_color(backbone.input, color)
    backbone.adapter = Adapter(input_now)
    return Loaded(backbone.eval(), name, None, scheme)


def _from_hub(name: str, scheme: str, arch: str, arch_args: dict[str, Any], fetch: bool) -> Backbone:
    """timm's network with timm's weights, from the hub or from this machine's cache of it."""
    import timm

    from odcft.backbone import hub_download

    changes = [argument for argument in ("last_stride", "small_stem") if argument in arch_args]
    if changes:
        raise OdcftError(f"--arch-args {changes[0]}: the weights of {name} only fit the network as timm builds it.")
    backbone = Backbone(arch, **arch_args)
    tag = arch if scheme == "timm" else f"{arch}.tv_in1k"
    with hub_download.offline_if_unreachable(fetch) as reachable:
        try:
            on_hub = getattr(timm.get_pretrained_cfg(tag), "hf_hub_id", None)
            if not (fetch or on_hub):  # timm would get them from another address, even offline
                raise OSError
            backbone.net = timm.create_model(tag, pretrained=True, num_classes=0, **arch_args)
        except RuntimeError as error:
            raise OdcftError(f"{name}: {short_repr(str(error), 200, quotes=False)}.") from None
        except Exception as error:  # the hub's client raises many kinds when it cannot fetch
            if not fetch:
                raise OdcftError(f"{name} is not on this machine, and was not asked for by name.") from None
            why = type(error).__name__ if reachable else "the hub does not answer, and they are not on this machine"
            raise OdcftError(
                f"{name}: its weights could not be fetched ({why}). Check the network connection, or give a local file."
            ) from None
    return backbone


def refuse_unknown_arch(arch: str, asked: str | None = None) -> None:
    """Refuse an unknown architecture, and name the nearest known one."""
    if not is_network(arch):
        raise OdcftError(f"{asked or arch}: timm has no {arch}{nearest_name(arch)}.")
