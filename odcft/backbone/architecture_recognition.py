"""Recognise a checkpoint's architecture by the names and shapes of its tensors.

For each of timm's networks `timm_index.json` (written by tools/index_timm.py) keeps hashes of a few tensors that few
other networks have. A network whose hashes are all found in the file is compared in full.
"""

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from odcft.backbone.arch_arguments import Kwargs, match_adjusted, may_be_first_convolution, with_hidden_arguments
from odcft.backbone.checkpoint_files import Contents
from odcft.backbone.equal_networks import choose_equal
from odcft.backbone.leftover_layers import leftover_tensor
from odcft.backbone.non_timm_networks import NETWORKS, is_network, shapes
from odcft.backbone.original_layouts import LAYOUTS, may_be
from odcft.backbone.structure_index import twins
from odcft.backbone.structure_recognition import Structure, recognise_structure
from odcft.backbone.tensor_matching import Match, renamings
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
MIN_COVERAGE = 0.9  # share of the backbone's tensors that a checkpoint must have
MAX_COMPARED = 100  # networks compared in full

Found = tuple[str, Kwargs, Match]
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
    certain = arch or contents.metadata.architecture
    named = list(islice(_candidates(contents, arch), MAX_COMPARED))
    best = _best_of(contents, named, user_args, bool(certain))
    by_shapes = None
    suspect = best is not None and best[0] not in NETWORKS and not certain and leftover_tensor(contents, best[2])[0]
    if best is None or best[2].coverage < 1 or suspect:
        structure = recognise_structure(contents, certain, {**(named[0][1] if certain else {}), **user_args})
        if structure.fitting is None and not certain and {name for name, _ in named} <= set(contents.arch_hints):
            best = _best_of(contents, _fallbacks(contents, structure.near), user_args, False, best)
        by_shapes = structure.fitting
        best = by_shapes or _incomplete(contents, best, structure)
    name, kwargs, found_match = best
    if by_shapes is None and name not in NETWORKS and found_match.coverage >= MIN_COVERAGE:
        _refuse_leftovers(contents, name, found_match, arch)
        if not certain:
            name = _among_equals(contents, named, best, user_args)
    return name, {**with_hidden_arguments(contents, name, kwargs, found_match), **user_args}, found_match


def _refuse_leftovers(contents: Contents, name: str, found: Match, arch: str | None) -> None:
    """Refuse a file whose network has layers, or tensors in its layers, that the one found by names lacks.

    With the user's `arch`, tensors in its layers are only noted.
    """
    left, whole = leftover_tensor(contents, found)
    if not left:
        return
    left = short_repr(left, 200, quotes=False)
    if arch and not whole:
        found.notes.append(f"{name} has no place for tensors in its layers, so features may differ: {left}")
        return
    raise OdcftError(
        f"{contents.path} is nearly a {name}, but that has no place for {left}. If it is another network, pass "
        f"--arch NAME{'' if whole else f'; to leave such tensors out, pass --arch {name}'}."
    )


def _among_equals(contents: Contents, named: list[tuple[str, Kwargs]], best: Found, user_args: Kwargs) -> str:
    """The name of the network found, or of another that has the same tensors and is the right one.

    Raises:
        OdcftError: several have them that compute something else, and nothing tells which it is.
    """
    fitting = [best[0], *(other for other, _ in named if _fits_as_well(contents, other, best, user_args))]
    every = dict.fromkeys(one for name in fitting for one in (name, *twins(name)))
    equal = [name for name in every if may_be(contents.layout, name)]
    if not equal:
        return best[0]
    name, rare = choose_equal(contents, equal, user_args)
    if rare and name not in COMMON_ARCHITECTURES:
        best[2].notes.append(
            f"the same tensors also fit {', '.join(rare)}: if that is the right network, pass --arch NAME"
        )
    return name


def _fits_as_well(contents: Contents, other: str, best: Found, user_args: Kwargs) -> bool:
    """Whether another candidate of as many tensors is covered in full too, with as few arguments."""
    name, kwargs, found = best
    if found.coverage < 1 or other == name or other in NETWORKS or not _count(name) or _count(other) != _count(name):
        return False
    try:
        other_kwargs, match = match_adjusted(contents, other, dict(user_args), user_args)
    except OdcftError:  # not every network takes the user's arguments
        return False
    return match.coverage == 1 and len(other_kwargs) <= len(kwargs)


def _count(name: str) -> int:
    """How many tensors one of timm's networks has; 0 if the index lists it under another name."""
    return _index().get(name, [0])[0]


def _best_of(
    contents: Contents,
    candidates: Iterable[tuple[str, Kwargs]],
    user_args: Kwargs,
    certain: bool,
    best: Found | None = None,
) -> Found | None:
    """The best match by names among candidates, and one that was found before.

    Raises:
        OdcftError: the candidate is certain, and does not take the user's arguments.
    """
    complete = 0
    for candidate, kwargs in candidates:
        if complete and _count(candidate) != complete:  # another that fits may need fewer arguments
            break
        try:
            found = candidate, *match_adjusted(contents, candidate, {**kwargs, **user_args}, user_args)
        except OdcftError:  # not every candidate takes the user's arguments
            if certain:
                raise
            continue
        rank = (*_rank(found[2]), -len(found[1]))
        if best is None or rank > (*_rank(best[2]), -len(best[1])):
            best = found
        if found[2].coverage == 1 and candidate not in NETWORKS:
            complete = _count(candidate)
            if not (complete and found[1]):
                break
    return best


def _incomplete(contents: Contents, by_names: Found | None, structure: Structure) -> Found:
    """What names found, if neither they nor shapes lead to one complete network.

    Raises:
        OdcftError: several networks fit equally by their shapes, or nothing fits at all.
    """
    covered = by_names is not None and by_names[2].coverage >= MIN_COVERAGE
    if structure.equal and not covered:
        raise OdcftError(
            f"{contents.path}: the names of its tensors are unknown, and their shapes fit networks that compute "
            f"different features: {', '.join(structure.equal)}. Pass --arch NAME with the right one."
        )
    if by_names is None or not by_names[2].tensors:
        near = " No network comes close by the shapes of its tensors either."
        if structure.nearest:
            near = f" The shapes of its tensors come closest to {structure.nearest}."
        raise OdcftError(
            f"{contents.path} fits no backbone that odcft knows.{near} "
            "If you know its timm architecture, pass --arch NAME."
        )
    by_names[2].nearest = structure.nearest
    return by_names


def _rank(found: Match) -> tuple[bool, int, float]:
    """Sort key for matches: a complete network beats a partial one; then the larger one wins."""
    return found.coverage == 1, len(found.tensors) if found.coverage > 0.9 else 0, found.coverage


def _candidates(contents: Contents, arch: str | None) -> Iterator[tuple[str, Kwargs]]:
    """Names to try with their arguments, likeliest first.

    The user's or the file's own architecture is the only candidate; otherwise hints in the file, then networks its
    tensors point to.
    """
    seen: set[str] = set()
    if name := arch or contents.metadata.architecture:
        same = name == contents.metadata.architecture
        yield name, dict(contents.metadata.arguments) if same else {}
        return
    hints = [hint for hint in contents.arch_hints if is_network(hint)]
    named_shapes = _named_shapes(contents)
    by_tensors = _matching_timm_names(named_shapes)
    if contents.layout:
        with_twins = [one for name in by_tensors for one in (name, *twins(name))]
        by_tensors = [
            name for name in (*LAYOUTS[contents.layout].unlisted, *with_twins) if may_be(contents.layout, name)
        ]
    # A hint counts unless the tensors contradict it: DeepCluster's "alexnet" is not torchvision's.
    agreeing = [hint for hint in hints if hint in by_tensors or hint not in _index()]
    # VISSL's trunks end at the last convolution, even where the file still has fully connected layers.
    trunk = bool({"model_state_dict", "classy_state_dict"} & set(contents.outer_keys))
    own = [name for name in NETWORKS if _looks_like(named_shapes, name) and not (trunk and name.endswith("_fc"))]
    for name in (*agreeing, *own, *by_tensors):
        if name not in seen:
            seen.add(name)
            yield name, {}


def _fallbacks(contents: Contents, near: Sequence[str] = ()) -> list[tuple[str, Kwargs]]:
    """Names to try where the tensors point to none: hints in the file, and networks near by shapes or else common."""
    if sum(map(len, contents.state_dicts.values())) < MIN_TENSORS:
        return []
    hints = [hint for hint in contents.arch_hints if is_network(hint)]
    return [(name, {}) for name in dict.fromkeys((*hints, *(near or COMMON_ARCHITECTURES)))]


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
    index = json.loads((Path(__file__).parent / "timm_index.json").read_text())
    return {name: entry[:-1] for name, entry in index.items() if len(entry) > 1}


def _matching_timm_names(named_shapes: NamedShapes) -> list[str]:
    """timm's networks whose fingerprints are all in a file, those with most tensors first."""
    found = {fingerprint(name, shape) for name, shape in named_shapes}
    found |= {
        fingerprint(name, without_input_channels(shape))
        for name, shape in named_shapes
        if may_be_first_convolution(shape)
    }
    matching = [name for name, (_, *prints) in _index().items() if all(one in found for one in prints)]
    common = {name: place for place, name in enumerate(COMMON_ARCHITECTURES)}
    return sorted(matching, key=lambda name: (-_index()[name][0], common.get(name, 99), len(name), name))


def nearest_name(arch: str) -> str:
    """Text to append for an unknown architecture: " (did you mean …?)", or "" if no name is close."""
    import difflib

    import timm

    close = difflib.get_close_matches(arch[:100], [*timm.list_models(), *NETWORKS], n=1)
    return f" (did you mean {close[0]}?)" if close else ""
