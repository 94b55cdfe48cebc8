"""Recognise the input that a checkpoint's network was trained on: size, colours and normalisation."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from odcft.backbone.arch_arguments import Kwargs
from odcft.backbone.checkpoint_files import Contents
from odcft.backbone.network_input import IMAGENET, Input, bands_input, default_input
from odcft.backbone.non_timm_networks import NETWORKS
from odcft.backbone.original_layouts import LAYOUTS
from odcft.backbone.tensor_matching import Match
from odcft.data.view import INTERPOLATIONS
from odcft.errors import OdcftError
from odcft.recipe import MAX_BANDS


def recognise_input(contents: Contents, arch: str, kwargs: Kwargs, found: Match, cfg: Mapping[str, Any]) -> Input:
    """Tell what a network was trained on, as far as the file reveals it.

    Args:
        contents: what the file holds.
        arch, kwargs: the network's architecture, and what it is built with.
        found: how the file covers it.
        cfg: timm's pretrained_cfg of the architecture: input_size, mean, std …

    Returns:
        The file's own description of its input, or else what the number of channels and the file's writer imply.

    Raises:
        OdcftError: the network takes more channels than MAX_BANDS.
    """
    metadata = contents.metadata
    if metadata.input is not None:
        channels = kwargs.get("in_chans", NETWORKS[arch][1].channels if arch in NETWORKS else 3)
        if metadata.input.channels == channels:
            return metadata.input
        metadata.ignored.append(f"input of {metadata.input.channels} channels: the first convolution takes {channels}")
    if arch in NETWORKS:
        return _input_of_own_network(contents, arch, kwargs)
    size = kwargs.get("img_size") or {**cfg, **metadata.cfg}["input_size"][-1]
    if "last_stride" in kwargs:
        return default_input("lab_l", size)
    channels = kwargs.get("in_chans", 3)
    if kwargs.get("small_stem"):
        size = 32
    if channels != 3:
        return _input_of_channels(contents, channels, size)
    if contents.container == "pickle" and "blobs" in contents.outer_keys:  # Caffe2
        return default_input("bgr", size)
    if metadata.cfg or metadata.architecture is not None:
        if len(metadata.cfg.get("mean", cfg["mean"])) != 3:
            metadata.ignored.append("mean and std should have 3 numbers")
            metadata.cfg = {name: value for name, value in metadata.cfg.items() if name not in ("mean", "std")}
        input = input_from_cfg({**cfg, **metadata.cfg}, size)
        return with_color(input, metadata.color) if metadata.color else input
    if contents.layout and LAYOUTS[contents.layout].uses_timm_cfg:
        return input_from_cfg(cfg, size)
    return input_from_cfg(cfg, size) if _has_timm_classifier(found, cfg) else Input("rgb", size, *IMAGENET)


def _input_of_own_network(contents: Contents, arch: str, kwargs: Kwargs) -> Input:
    """The input of one of NETWORKS, which is in their table unless it has another number of channels."""
    input = NETWORKS[arch][1]
    if contents.container == "pickle" and input.color == "rgb":
        input = Input("bgr", input.size, input.mean[::-1], input.std[::-1])
    channels = kwargs.get("in_chans", input.channels)
    if channels == input.channels:
        return input
    return _input_of_channels(contents, channels, input.size)


def _has_timm_classifier(found: Match, cfg: Mapping[str, Any]) -> bool:
    """Whether a file has timm's classifier, as files from timm do; then timm's mean and std apply.

    Self-supervised code uses ImageNet's mean and std everywhere.
    """
    classifier = cfg.get("classifier") or ""
    classifiers = classifier if isinstance(classifier, tuple | list) else (classifier,)
    return any(f"{name}.weight" in key for name in classifiers if name for key in found.dropped)


def _input_of_channels(contents: Contents, channels: int, size: int) -> Input:
    """What a number of channels usually stands for: gray, gradients, RGB, or the bands of images that have as many."""
    if not 1 <= channels <= MAX_BANDS:
        raise OdcftError(
            f"{contents.path}: the first convolution takes {channels} channels; odcft gives networks 1 to {MAX_BANDS}."
        )
    color = {1: "gray", 2: "sobel", 3: "rgb"}.get(channels)
    return default_input(color, size) if color else bands_input(size, channels)


def input_from_cfg(cfg: Mapping[str, Any], size: int) -> Input:
    """The input that timm's pretrained_cfg describes, for images of `size` pixels."""
    interpolation = cfg.get("interpolation", "bilinear")
    known = interpolation if interpolation in INTERPOLATIONS else "bilinear"  # timm also has "random"
    return Input("rgb", size, cfg["mean"], cfg["std"], crop_fraction=cfg.get("crop_pct", 0.875), interpolation=known)


def with_color(input: Input, color: str) -> Input:
    """The input in the colours the user asked for (`--input`), with its own normalisation where that still applies."""
    if {color, input.color} == {"rgb", "bgr"}:
        return replace(input, color=color, mean=input.mean[::-1], std=input.std[::-1])
    return default_input(color, input.size).with_view(input.view)
