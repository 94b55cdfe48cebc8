"""Recognise a checkpoint's architecture by the names and shapes of its tensors.

For each of timm's networks `timm_index.json` (written by tools/index_timm.py) keeps hashes of a few tensors that few
other networks have. A network whose hashes are all found in the file is compared in full.
"""

import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from odcft.backbone.checkpoint_files import Contents
from odcft.backbone.non_timm_networks import NETWORKS, is_network, shapes
from odcft.backbone.original_layouts import LAYOUTS, hidden_arguments, may_be, twins_by_shape, without_place
from odcft.backbone.tensor_matching import Match, match, renamings
from odcft.errors import OdcftError
from odcft.text import short_repr

# Tried when nothing in the index fits: the file may be incomplete, or hold a network of another width.
COMMON_ARCHITECTURES = (
    *("resnet50", "resnet18", "resnet34", "resnet101", "resnet152", "wide_resnet50_2", "resnext50_32x4d"),
    *("vit_small_patch16_224", "vit_base_patch16_224", "vit_tiny_patch16_224", "vit_large_patch16_224"),
    *("vit_small_patch8_224", "vit_base_patch8_224", "vit_base_patch32_224", "vit_small_patch14_dinov2"),
    *("convnext_tiny", "convnext_small", "convnext_base", "swin_tiny_patch4_window7_224"),
    *("efficientnet_b0", "mobilenetv3_large_100", "regnety_016", "densenet121", "vgg16_bn", "vgg16"),
)

MIN_TENSORS = 10  # every backbone has at least as many
MAX_COMPARED = 100  # networks compared in full

Kwargs = dict[str, Any]
NamedShapes = set[tuple[str, tuple[int, ...]]]


def recognise(
    contents: Contents, arch: str | None = None, arch_args: Mapping[str, Any] | None = None
) -> tuple[str, Kwargs, Match]:
    """Find the network that a file's tensors cover best.

    Args:
        contents: what the file holds.
        arch: the architecture the user named, if any; no other is tried.
        arch_args: arguments the user gave for it; they win over the file's own.

    Returns:
        Its name, further arguments for `networks.build` (in_chans, img_size, num_heads), and the match.

    Raises:
        OdcftError: `arch` is unknown or cannot be built with these arguments, or no network fits.
    """
    user_args = dict(arch_args or {})
    if arch is not None and not is_network(arch):
        raise OdcftError(f"--arch {arch}: timm has no such network{nearest_name(arch)}.")
    best: tuple[str, Kwargs, Match] | None = None
    certain = arch or contents.metadata.architecture
    for candidate, kwargs in islice(_candidates(contents, arch), MAX_COMPARED):
        try:
            found = candidate, *_adjusted(contents, candidate, {**kwargs, **user_args}, user_args)
        except OdcftError:  # not every candidate takes the user's arguments
            if certain:
                raise
            continue
        rank = (*_rank(found[2]), -len(found[1]))
        if best is None or rank > (*_rank(best[2]), -len(best[1])):
            best = found
        if found[2].coverage == 1 and candidate not in NETWORKS:
            break
    if best is None or not best[2].tensors:
        raise OdcftError(
            f"{contents.path} fits no backbone that odcft knows. If you know its timm architecture, pass --arch NAME."
        )
    name, kwargs, found_match = best
    if left := without_place(contents.layout, found_match.dropped):
        raise OdcftError(
            f"{contents.path} is nearly a {name}, but that has no place for {short_repr(left, 200, quotes=False)}. "
            "If it is another network, pass --arch NAME."
        )
    told = {"act_layer", "window_size"} & {*user_args, *contents.told_arguments}
    if certain is None and not told and (equal := twins_by_shape(contents.layout, name)):
        raise OdcftError(
            f"{contents.path} fits {' and '.join(equal)}, which differ in what no tensor shows. Pass --arch with the "
            "one it was trained as; of CLIP's, OpenAI's weights have the quick GELU."
        )
    return name, {**_with_hidden_arguments(contents, name, kwargs, found_match), **user_args}, found_match


def _rank(found: Match) -> tuple[bool, int, float]:
    """Sort key for matches: a complete network beats a partial one; then the larger one wins."""
    return found.coverage == 1, len(found.tensors) if found.coverage > 0.9 else 0, found.coverage


def _candidates(contents: Contents, arch: str | None) -> Iterator[tuple[str, Kwargs]]:
    """Names to try with their arguments, likeliest first.

    The user's or the file's own architecture is the only candidate; otherwise hints in the file, then networks its
    tensors point to, and where there are none, common architectures.
    """
    seen: set[str] = set()
    if name := arch or contents.metadata.architecture:
        same = name == contents.metadata.architecture
        yield name, dict(contents.metadata.arguments) if same else {}
        return
    hints = [hint for hint in contents.arch_hints if is_network(hint)]
    named_shapes = _named_shapes(contents)
    by_tensors = [name for name in _matching_timm_names(named_shapes) if may_be(contents.layout, name)]
    if contents.layout:
        by_tensors = [*LAYOUTS[contents.layout].unlisted, *by_tensors]
    # A hint counts unless the tensors contradict it: DeepCluster's "alexnet" is not torchvision's.
    agreeing = [hint for hint in hints if hint in by_tensors or hint not in _index()]
    # VISSL's trunks end at the last convolution, even where the file still has fully connected layers.
    trunk = bool({"model_state_dict", "classy_state_dict"} & set(contents.outer_keys))
    own = [name for name in NETWORKS if _looks_like(named_shapes, name) and not (trunk and name.endswith("_fc"))]
    for name in (*agreeing, *own, *by_tensors):
        if name not in seen:
            seen.add(name)
            yield name, {}
    if not by_tensors and not own and sum(map(len, contents.state_dicts.values())) >= MIN_TENSORS:
        for name in (*hints, *COMMON_ARCHITECTURES):
            if name not in seen:
                seen.add(name)
                yield name, {}


def _looks_like(named_shapes: NamedShapes, name: str) -> bool:
    """Whether a file has the second and the last weight of one of NETWORKS (the first depends on the input)."""
    weights = [(key, tuple(own.shape)) for key, own in shapes(name).items() if own.ndim > 1]
    return weights[1] in named_shapes and weights[-1] in named_shapes


def _named_shapes(contents: Contents) -> NamedShapes:
    """Every dotted suffix of every tensor name in a file, under every renaming, with the tensor's shape."""
    return {
        (suffix, tuple(tensors[key].shape))
        for tensors in contents.state_dicts.values()
        for names in renamings(tensors)
        for name, key in names.items()
        for suffix in _suffixes(name)
    }


def _suffixes(name: str) -> Iterator[str]:
    yield name
    while "." in name:
        name = name.split(".", 1)[1]
        yield name


def fingerprint(name: str, shape: Iterable[int]) -> int:
    """The index's hash of a tensor's name and shape."""
    return zlib.crc32(f"{name}:{'x'.join(map(str, shape))}".encode())


def without_input_channels(shape: Iterable[int]) -> tuple[int, ...]:
    """The shape of a first convolution without its input channels."""
    out_channels, _, *kernel = shape
    return (out_channels, *kernel)


@cache
def _index() -> dict[str, list[int]]:
    """By timm name: its number of tensors, then the fingerprints of its first convolution and of four more tensors."""
    index: dict[str, list[int]] = json.loads((Path(__file__).parent / "timm_index.json").read_text())
    return index


def _matching_timm_names(named_shapes: NamedShapes) -> list[str]:
    """timm's networks whose fingerprints are all in a file, those with most tensors first."""
    found = {fingerprint(name, shape) for name, shape in named_shapes}
    found |= {fingerprint(name, without_input_channels(shape)) for name, shape in named_shapes if _may_be_first(shape)}
    matching = [name for name, (_, *prints) in _index().items() if all(one in found for one in prints)]
    common = {name: place for place, name in enumerate(COMMON_ARCHITECTURES)}
    return sorted(matching, key=lambda name: (-_index()[name][0], common.get(name, 99), len(name), name))


def _may_be_first(shape: tuple[int, ...]) -> bool:
    """Whether this is a convolution of few enough input channels to be the first."""
    return len(shape) == 4 and shape[1] < 8


def _adjusted(contents: Contents, arch: str, kwargs: Kwargs, user_args: Kwargs) -> tuple[Kwargs, Match]:
    """Match a network, adjusted to the file's input channels, stem and position embedding where that fits better.

    Returns:
        The arguments to build it with, and its match.

    Raises:
        OdcftError: the network does not take these arguments.
    """
    network = shapes(arch, **kwargs)
    found, adjusted = match(contents, network), kwargs
    for name, tensor in found.misfits.items():
        adjusted = {**adjusted, **_explaining(arch, network, name, tensor)}
    adjusted = {**adjusted, **user_args}
    if adjusted == kwargs:
        return kwargs, found
    try:
        better = match(contents, shapes(arch, **adjusted))
    except OdcftError:  # not all of timm's networks take these arguments
        return kwargs, found
    return (adjusted, better) if len(better.tensors) > len(found.tensors) else (kwargs, found)


def _explaining(arch: str, network: Mapping[str, Tensor], name: str, tensor: Tensor) -> Kwargs:
    """Arguments that would give a network's tensor the shape it has in the file; none if nothing explains it."""
    own = network[name]
    if tensor.ndim == own.ndim == 4 and tensor.shape[0] == own.shape[0] and tensor.shape[2:] == own.shape[2:]:
        first = tensor.shape[1] > 0 and _may_be_first(tensor.shape) and _may_be_first(own.shape)
        return {"in_chans": tensor.shape[1]} if first else {}
    if arch.startswith("resnet") and name == "conv1.weight" and tensor.shape[2:] == (3, 3):
        channels = {"in_chans": tensor.shape[1]} if tensor.shape[1] != 3 else {}
        return {"small_stem": True, **channels}
    if name.endswith("pos_embed") and tensor.ndim == own.ndim == 3 and tensor.shape[2] == own.shape[2]:
        patches = network.get(name.replace("pos_embed", "patch_embed.proj.weight"))
        extra = own.shape[1] - math.isqrt(own.shape[1]) ** 2  # tokens that are not patches (class, registers)
        side = math.isqrt(max(0, tensor.shape[1] - extra))
        patch = 0 if patches is None else patches.shape[-1]
        if side * side + extra == tensor.shape[1] and 8 <= side * patch <= 4096:
            return {"img_size": side * patch}
    return {}


def _with_hidden_arguments(contents: Contents, arch: str, kwargs: Kwargs, found: Match) -> Kwargs:
    """Add arguments that change no tensor's shape, so that only the code that wrote the file tells them."""
    if arch.startswith("vit_small") and "base_encoder." in found.where:
        return {**kwargs, "num_heads": 12}  # MoCo v3; timm's has 6
    kwargs = {**kwargs, **contents.told_arguments, **hidden_arguments(contents.layout, arch)}
    goyal = contents.container == "pickle" or "_feature_blocks." in found.where
    if arch == "resnet50" and kwargs.get("in_chans") == 1 and goyal:
        return {**kwargs, "last_stride": 1}
    return kwargs


def nearest_name(arch: str) -> str:
    """Text to append for an unknown architecture: " (did you mean …?)", or "" if no name is close."""
    import difflib

    import timm

    close = difflib.get_close_matches(arch[:100], [*timm.list_models(), *NETWORKS], n=1)
    return f" (did you mean {close[0]}?)" if close else ""
