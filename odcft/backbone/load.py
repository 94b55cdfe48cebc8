"""A checkpoint or a name in, a network out that turns images into pooled features (B, F)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from odcft import seeds
from odcft.backbone.architecture_recognition import nearest_name, recognise
from odcft.backbone.checkpoint_files import Contents, read
from odcft.backbone.family_recognition import family
from odcft.backbone.input_recognition import input_of, overridden
from odcft.backbone.metadata import check_arguments
from odcft.backbone.network import Backbone
from odcft.backbone.network_input import CHANNELS, Adapter
from odcft.backbone.networks import NETWORKS, RGB, elements, is_network
from odcft.backbone.tensor_matching import Match, constant, not_finite
from odcft.errors import OdcftError
from odcft.text import brief

COVER = 0.9  # of the backbone's tensors that a checkpoint must have
FREE = 1 << 27  # numbers that a network may hold beyond what its file fills

# Classes beside the weights that say nothing of the network.
_HARMLESS = (
    *("argparse.", "numpy.", "_codecs.", "collections.", "builtins.", "__builtin__.", "datetime.", "pathlib.", "enum."),
    *("typing.", "copyreg.", "torch.optim.", "torch.amp.", "torch.cuda.amp.", "omegaconf.", "yacs.", "easydict."),
    *("addict.", "antlr4.", "pytorch_lightning.", "lightning."),
)


@dataclass
class Loaded:
    """A backbone and how it came about."""

    backbone: Backbone
    source: str  # as the user named it
    match: Match | None = None  # None for random weights and for weights from timm
    family: str = ""
    notes: list[str] = field(default_factory=list)  # what the user should know: odd tensors, parts that are missing
    told: bool = False  # whether the source itself says at which size, and how cropped, it sees images
    not_finite: list[str] = field(default_factory=list)  # tensors that hold NaN or infinity


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
) -> Loaded:
    """The backbone of a checkpoint.

    Args:
        ckpt: a checkpoint file, a timm folder, a finished RUN, or `timm:NAME`, `torchvision:NAME`, `scratch:NAME`
            (`scratch:alexnet` is the papers', with batch norm; elsewhere `alexnet` is torchvision's).
        arch: a name, where the file's own word or our guess is not to be followed.
        input: the colours it is to be shown, where the file's or our word is not to be followed. With another number
            of channels its first convolution is adapted (1 and 3 channels only; with `allow_partial` it starts random
            for any other), and a note says so. Of random weights the network is built for these colours.
        allow_partial: accept a file that covers less than 90 % of the backbone; the rest keeps random weights.
        seed: of a run; random weights depend on it and on `member` alone, on every process.
        member: which of several networks this is.
        arch_args: what the network is built with besides its name (`description.Arguments`), over the file's own word.
        mean, std: for each channel, in 0..1 of the input's range, where the file's or our word is not to be followed.
        finite: refuse weights that are not finite; else they are only listed.

    Returns:
        The backbone on the CPU, in evaluation mode, and what was matched.

    Raises:
        OdcftError: an unreadable file, an unknown architecture, one covered to less than 90 %, or weights that are
            not finite.
    """
    name = str(ckpt)
    scheme, _, rest = name.partition(":")
    arch_args = check_arguments(arch_args or {})
    if input is not None:
        _refuse_unknown_input(input)
    with seeds.weights(seed, "backbone", member):
        if scheme in ("timm", "torchvision", "scratch") and rest:
            loaded = _load_named(name, scheme, rest, input, arch_args)
        else:
            loaded = _load_file(name, Path(ckpt), arch, allow_partial, arch_args)
        if input is not None:
            _show(loaded, input, allow_partial)
    if mean is not None or std is not None:
        normalise(loaded.backbone, mean, std)
    if finite and loaded.not_finite:
        raise OdcftError(
            f"{name}: numbers in the backbone are not finite ({_some(loaded.not_finite)}), so it has no features. "
            "Take an earlier checkpoint."
        )
    return loaded


def _load_file(name: str, path: Path, arch: str | None, allow_partial: bool, arch_args: dict[str, Any]) -> Loaded:
    try:
        if (path / "backbone" / "config.json").exists():  # a RUN
            path = path / "backbone"
    except OSError as error:
        raise OdcftError(f"{brief(name, 200, quotes=False)} cannot be read: {error.strerror}.") from None
    contents = read(path)
    arch, kwargs, found = recognise(contents, arch, arch_args)
    if found.share < COVER and not allow_partial:
        lacking = ", ".join(found.missing[:3]) + (" …" if len(found.missing) > 3 else "")
        raise OdcftError(
            f"{path} has only {len(found.tensors)} of the {found.expected} tensors of {arch}, "
            f"the nearest backbone ({found.share:.0%}; missing: {lacking}). "
            f"At least {COVER:.0%} are needed; if it is another network, say --arch NAME; "
            "to start the rest from random weights, --allow-partial."
        )
    first = _first_convolution(arch)
    if first in found.misfits and not allow_partial:
        raise OdcftError(
            f"{path} is nearly a {arch}, but its first convolution has the shape {tuple(found.misfits[first].shape)}. "
            "Is it another network (--arch NAME)? To start that layer from random weights, --allow-partial."
        )
    filled = sum(tensor.untyped_storage().nbytes() // tensor.itemsize for tensor in found.tensors.values())
    if (needed := elements(arch, **kwargs)) > 4 * filled + FREE:
        raise OdcftError(
            f"{path} fills {filled:,} numbers of the {needed:,} of {arch}: too few to make such a network for."
        )
    backbone = Backbone(arch, random=bool(found.missing), **kwargs)
    cfg = getattr(backbone.net, "pretrained_cfg", {})
    own = backbone.size
    backbone.adapter = Adapter(input_of(contents, arch, kwargs, found, cfg))
    if contents.told.input is not None and (
        backbone.size != own if backbone.fixed_size else backbone.size < own and not backbone.takes(backbone.size)
    ):
        contents.told.left_out.append(f"input.size={backbone.size}: {arch} takes {own}")
        backbone.adapter = Adapter(replace(backbone.input, size=own))
    backbone.net.load_state_dict({**backbone.net.state_dict(), **found.tensors})
    told = contents.told.architecture is not None or contents.told.input is not None
    return Loaded(
        backbone.eval(),
        name,
        found,
        family(contents, arch, found),
        _notes(contents, found),
        told,
        not_finite(backbone.net.state_dict()),
    )


def _first_convolution(arch: str) -> str:
    import timm

    cfg = None if arch in NETWORKS else timm.get_pretrained_cfg(arch, allow_unregistered=True)
    first = getattr(cfg, "first_conv", None)
    return f"{first}.weight" if isinstance(first, str) else "conv1.weight"


def _notes(contents: Contents, found: Match) -> list[str]:
    notes = []
    if contents.told.left_out:
        notes.append(f"what the file says of itself is not followed here: {_some(contents.told.left_out, '; ')}")
    if found.missing:
        notes.append(f"{len(found.missing)} tensors are not in the file and start random: {_some(found.missing)}")
    if found.unexpected:
        notes.append(f"{len(found.unexpected)} tensors have another shape and were left out: {_some(found.unexpected)}")
    if contents.strange:
        notes.append(f"sparse, quantized and complex tensors were left out: {_some(contents.strange)}")
    if odd := [f"{name} is not finite" for name in not_finite(found.tensors)] + constant(found.tensors):
        notes.append(f"look at these tensors: {_some(odd)}")
    if replaced := [name for name in contents.replaced if not name.startswith(_HARMLESS)]:
        notes.append(f"objects of these classes were not loaded, only the tensors: {_some(replaced)}")
    return notes


def _refuse_unknown_input(color: str) -> None:
    if color not in CHANNELS:
        raise OdcftError(f"--input {color}: no such input. Choose from {', '.join(CHANNELS)}.")


def _show(loaded: Loaded, color: str, allow_partial: bool) -> None:
    """Follow the user's word on the colours, and adapt the first convolution where that needs it.

    Between one channel and three it is summed, or spread: an image whose channels are all alike gives what it gave
    before. Gradients (sobel) are not a colour in other units, and no sum of filters for colours is a filter for them:
    there the first convolution starts random, if it may.
    """
    backbone = loaded.backbone
    if color == backbone.input.color:
        return
    here, wanted = backbone.input.channels, CHANNELS[color]
    if here != wanted and {here, wanted} == {1, 3}:
        first = next(m for m in backbone.net.modules() if isinstance(m, nn.Conv2d) and m.in_channels == here)
        with torch.no_grad():
            weight = first.weight.sum(1, keepdim=True) if wanted == 1 else first.weight.expand(-1, 3, -1, -1) / 3
        first.weight, first.in_channels = nn.Parameter(weight.clone()), wanted
        backbone.kwargs = {**backbone.kwargs, "in_chans": wanted}
        loaded.notes.append(
            f"the first convolution was adapted from {here} to {wanted} channels, as --input {color} asks"
        )
    elif here != wanted:
        if not allow_partial:
            can = ", ".join(c for c, n in CHANNELS.items() if n == here) or backbone.input.color
            raise OdcftError(
                f"--input {color} gives {wanted} channels, and {backbone.arch} takes {here}: there is no way to adapt "
                f"its first convolution. It can be shown {can}; to start that layer from random weights, "
                "--allow-partial."
            )
        fresh = Backbone(backbone.arch, backbone.input, **{**backbone.kwargs, "in_chans": wanted})
        new, old = fresh.net.state_dict(), backbone.net.state_dict()
        kept = {name: tensor for name, tensor in old.items() if tensor.shape == new[name].shape}
        fresh.net.load_state_dict({**new, **kept})
        loaded.backbone = fresh.eval()
        changed = _some([name for name in old if name not in kept])
        loaded.notes.append(
            f"the first convolution ({changed}) takes {wanted} channels now and starts random, as --input {color} asks"
        )
    loaded.backbone.adapter = Adapter(overridden(backbone.input, color))


def normalise(backbone: Backbone, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Follow the user's word on mean and deviation, of each channel in 0..1 of its range."""
    input = backbone.input
    told = {"mean": input.mean, "std": input.std}
    for title, numbers in (("mean", mean), ("std", std)):
        if numbers is None:
            continue
        if len(numbers) != len(input.mean):
            raise OdcftError(
                f"data.{title}={brief(list(numbers))}: {backbone.arch} is shown {input.color}; "
                f"give {len(input.mean)} number{'s' if len(input.mean) > 1 else ''}, one a channel."
            )
        if not all(math.isfinite(number) and (number > 0 or title == "mean") for number in numbers):
            raise OdcftError(
                f"data.{title}={brief(list(numbers))}: give finite numbers{' above 0' * (title == 'std')}."
            )
        told[title] = tuple(number * input.range for number in numbers)
    backbone.adapter = Adapter(replace(input, mean=told["mean"], std=told["std"]))


def _some(names: list[str], between: str = ", ") -> str:
    """A few names from a file, on one line."""
    few = [brief(name, 200, quotes=False) for name in names[:4]]
    return between.join(few) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _load_named(name: str, scheme: str, rest: str, input: str | None, arch_args: dict[str, Any]) -> Loaded:
    arch = rest.split(".")[0] if scheme != "timm" else rest
    refuse_unknown(arch, name)
    if scheme != "scratch":
        return Loaded(_from_hub(name, scheme, arch, arch_args).eval(), name, None, scheme, told=True)
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
    color = input or {1: "gray", 2: "sobel", 3: "rgb"}.get(channels)
    if color is None or CHANNELS[color] != channels:
        raise OdcftError(
            f"{name}: odcft shows networks images of 1 (gray, lab_l), 2 (sobel) or 3 (rgb, bgr) channels, "
            f"not {channels}{f' for --input {input}' if input else ''}."
        )
    backbone = Backbone(arch, usual, **arch_args)  # drawn for these colours: nothing needs to be adapted
    backbone.adapter = Adapter(overridden(backbone.input, color))
    return Loaded(backbone.eval(), name, None, scheme)


def _from_hub(name: str, scheme: str, arch: str, arch_args: dict[str, Any]) -> Backbone:
    """timm's network with timm's weights, from the hub or from what was fetched before."""
    import timm

    from odcft.backbone import hub

    ours = [word for word in ("last_stride", "small_stem") if word in arch_args]
    if ours:
        raise OdcftError(f"--arch-args {ours[0]}: the weights of {name} are for the network as timm has it.")
    backbone = Backbone(arch, **arch_args)
    tag = arch if scheme == "timm" else f"{arch}.tv_in1k"
    with hub.no_longer_than_needed() as answers:
        try:
            backbone.net = timm.create_model(tag, pretrained=True, num_classes=0, **arch_args)
        except RuntimeError as error:
            raise OdcftError(f"{name}: {brief(str(error), 200, quotes=False)}.") from None
        except Exception as error:  # the hub's client has many ways to say that it cannot be reached
            why = type(error).__name__ if answers else "the hub does not answer, and they are not on this machine"
            raise OdcftError(
                f"{name}: its weights could not be fetched ({why}). Is there a network? A local file works without."
            ) from None
    return backbone


def refuse_unknown(arch: str, asked: str | None = None) -> None:
    """Refuse a name of no network, with the nearest there is."""
    if not is_network(arch):
        raise OdcftError(f"{asked or arch}: timm has no {arch}{nearest_name(arch)}.")
