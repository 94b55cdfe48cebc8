"""Which network a checkpoint is of, who wrote it, and what it was shown.

Architectures are told by the names and shapes of tensors. For each of timm's networks `timm_index.json` keeps hashes of
a few tensors that few other networks have (tools/index_timm.py makes it); a network whose are all in the file is
compared in full.
"""

import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from odcft.backbone.checkpoint_files import Contents
from odcft.backbone.networks import NETWORKS, is_network, shapes
from odcft.backbone.tensor_matching import Match, match, views
from odcft.errors import OdcftError

# Tried when nothing in the index fits: the file may lack a part, or hold a network of another width.
COMMON = (
    *("resnet50", "resnet18", "resnet34", "resnet101", "resnet152", "wide_resnet50_2", "resnext50_32x4d"),
    *("vit_small_patch16_224", "vit_base_patch16_224", "vit_tiny_patch16_224", "vit_large_patch16_224"),
    *("vit_small_patch8_224", "vit_base_patch8_224", "vit_base_patch32_224", "vit_small_patch14_dinov2"),
    *("convnext_tiny", "convnext_small", "convnext_base", "swin_tiny_patch4_window7_224"),
    *("efficientnet_b0", "mobilenetv3_large_100", "regnety_016", "densenet121", "vgg16_bn", "vgg16"),
)

FEWEST = 10  # tensors of any backbone
MOST = 100  # networks that are compared in full

Kwargs = dict[str, Any]
NamedShapes = set[tuple[str, tuple[int, ...]]]


def recognise(
    contents: Contents, arch: str | None = None, arch_args: Mapping[str, Any] | None = None
) -> tuple[str, Kwargs, Match]:
    """The network that a file's tensors cover best.

    Args:
        contents: of the file.
        arch: the user's word for it, which is followed.
        arch_args: the user's word for what it is built with, which is followed, over the file's own.

    Returns:
        Its name, what `networks.build` needs besides (in_chans, img_size, num_heads), and the match.

    Raises:
        OdcftError: `arch` is unknown, cannot be built with these arguments, or nothing fits.
    """
    given = dict(arch_args or {})
    if arch is not None and not is_network(arch):
        raise OdcftError(f"--arch {arch}: timm has no such network{nearest_name(arch)}.")
    best: tuple[str, Kwargs, Match] | None = None
    sure = arch or contents.told.architecture
    for candidate, kwargs in islice(_candidates(contents, arch), MOST):
        try:
            found = candidate, *_fitted(contents, candidate, {**kwargs, **given}, given)
        except OdcftError:  # not every network takes the user's words
            if sure:
                raise
            continue
        rank = (*_rank(found[2]), -len(found[1]))
        if best is None or rank > (*_rank(best[2]), -len(best[1])):
            best = found
        if found[2].share == 1 and candidate not in NETWORKS:
            break
    if best is None or not best[2].tensors:
        raise OdcftError(
            f"{contents.path} fits no backbone odcft knows. If you know its timm architecture, say --arch NAME."
        )
    name, kwargs, found_match = best
    return name, {**_as_trained(contents, name, kwargs, found_match), **given}, found_match


def _rank(found: Match) -> tuple[bool, int, float]:
    """A network that is there in full is a better answer than one of which there is a part; then the larger one."""
    return found.share == 1, len(found.tensors) if found.share > 0.9 else 0, found.share


def _candidates(contents: Contents, arch: str | None) -> Iterator[tuple[str, Kwargs]]:
    """Names to try, the likeliest first: what the user says, the file, its tensors, and then what is common."""
    seen: set[str] = set()
    if name := arch or contents.told.architecture:
        same = name == contents.told.architecture
        yield name, dict(contents.told.arguments) if same else {}
        return
    told = [hint for hint in contents.hints if is_network(hint)]
    there = _named_shapes(contents)
    by_tensors = _by_tensors(there)
    # A file's own word counts where its tensors do not speak against it: DeepCluster's "alexnet" is not torchvision's.
    agreeing = [hint for hint in told if hint in by_tensors or hint not in _index()]
    # VISSL's trunks end where the convolutions do, even where fully connected layers are left in the file.
    trunk = bool({"model_state_dict", "classy_state_dict"} & set(contents.names))
    plain = [name for name in NETWORKS if _may_be(there, name) and not (trunk and name.endswith("_fc"))]
    for name in (*agreeing, *plain, *by_tensors):
        if name not in seen:
            seen.add(name)
            yield name, {}
    if not by_tensors and not plain and sum(map(len, contents.state_dicts.values())) >= FEWEST:
        for name in (*told, *COMMON):
            if name not in seen:
                seen.add(name)
                yield name, {}


def _may_be(there: NamedShapes, name: str) -> bool:
    """Whether the second (the first depends on the input) and the last weights of one of our own networks are there."""
    weights = [(key, tuple(own.shape)) for key, own in shapes(name).items() if own.ndim > 1]
    return weights[1] in there and weights[-1] in there


def _named_shapes(contents: Contents) -> NamedShapes:
    """All ends of all names in a file, with their tensors' shapes."""
    return {
        (end, tuple(tensors[key].shape))
        for tensors in contents.state_dicts.values()
        for names in views(tensors)
        for name, key in names.items()
        for end in _ends(name)
    }


def _ends(name: str) -> Iterator[str]:
    yield name
    while "." in name:
        name = name.split(".", 1)[1]
        yield name


def fingerprint(name: str, shape: Iterable[int]) -> int:
    """Of a tensor in the index."""
    return zlib.crc32(f"{name}:{'x'.join(map(str, shape))}".encode())


def any_channels(shape: Iterable[int]) -> tuple[int, ...]:
    """The shape of a first convolution without its input channels."""
    wide, _, *kernel = shape
    return (wide, *kernel)


@cache
def _index() -> dict[str, list[int]]:
    """timm name: how many tensors it has, and the fingerprints of its first convolution and of four more."""
    index: dict[str, list[int]] = json.loads((Path(__file__).parent / "timm_index.json").read_text())
    return index


def _by_tensors(there: NamedShapes) -> list[str]:
    """timm's networks whose telling tensors are there, those with most tensors first."""
    found = {fingerprint(end, shape) for end, shape in there}
    found |= {fingerprint(end, any_channels(shape)) for end, shape in there if len(shape) == 4 and shape[1] < 8}
    known = [name for name, (_, *prints) in _index().items() if all(one in found for one in prints)]
    common = {name: place for place, name in enumerate(COMMON)}
    return sorted(known, key=lambda name: (-_index()[name][0], common.get(name, 99), len(name), name))


def _fitted(contents: Contents, arch: str, kwargs: Kwargs, given: Kwargs) -> tuple[Kwargs, Match]:
    """The network with the file's number of input channels and size of position embedding, and its match.

    Raises:
        OdcftError: the network does not take these arguments.
    """
    network = shapes(arch, **kwargs)
    found, fitted = match(contents, network), kwargs
    for name, tensor in found.misfits.items():
        own = network[name]
        if tensor.ndim == own.ndim == 4 and tensor.shape[0] == own.shape[0] and tensor.shape[2:] == own.shape[2:]:
            if 0 < tensor.shape[1] < 8 and own.shape[1] < 8:  # the first convolution
                fitted = {**fitted, "in_chans": tensor.shape[1]}
        elif arch.startswith("resnet") and name == "conv1.weight" and tensor.shape[2:] == (3, 3):
            fitted = {**fitted, "small_stem": True}
            if tensor.shape[1] != 3:
                fitted["in_chans"] = tensor.shape[1]
        elif name.endswith("pos_embed") and tensor.ndim == own.ndim == 3 and tensor.shape[2] == own.shape[2]:
            patches = network.get(name.replace("pos_embed", "patch_embed.proj.weight"))
            extra = own.shape[1] - math.isqrt(own.shape[1]) ** 2  # tokens that are no patches
            side = math.isqrt(max(0, tensor.shape[1] - extra))
            patch = 0 if patches is None else patches.shape[-1]
            if side * side + extra == tensor.shape[1] and 8 <= side * patch <= 4096:
                fitted = {**fitted, "img_size": side * patch}
    fitted = {**fitted, **given}
    if fitted == kwargs:
        return kwargs, found
    try:
        refound = match(contents, shapes(arch, **fitted))
    except OdcftError:  # timm's networks do not all take these words
        return kwargs, found
    return (fitted, refound) if len(refound.tensors) > len(found.tensors) else (kwargs, found)


def _as_trained(contents: Contents, arch: str, kwargs: Kwargs, found: Match) -> Kwargs:
    """What networks need whose tensors have the shapes of another's: told by who wrote them, whoever named them."""
    if arch.startswith("vit_small") and "base_encoder." in found.where:
        return {**kwargs, "num_heads": 12}  # MoCo v3; timm's has 6
    goyal = contents.container == "pickle" or "_feature_blocks." in found.where
    if arch == "resnet50" and kwargs.get("in_chans") == 1 and goyal:
        return {**kwargs, "last_stride": 1}
    return kwargs


def nearest_name(arch: str) -> str:
    """ " (did you mean …?)", for a name that no network has."""
    import difflib

    import timm

    close = difflib.get_close_matches(arch[:100], [*timm.list_models(), *NETWORKS], n=1)
    return f" (did you mean {close[0]}?)" if close else ""
