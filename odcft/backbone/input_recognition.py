"""What the network of a checkpoint was shown."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from odcft.backbone.architecture_recognition import Kwargs
from odcft.backbone.checkpoint_files import Contents
from odcft.backbone.network_input import IMAGENET, Input, default
from odcft.backbone.networks import NETWORKS
from odcft.backbone.tensor_matching import Match
from odcft.data.view import INTERPOLATIONS
from odcft.errors import OdcftError

# ---------------------------------------------------------------- what it was shown


def input_of(contents: Contents, arch: str, kwargs: Kwargs, found: Match, cfg: Mapping[str, Any]) -> Input:
    """What the network was shown, as far as the file tells.

    Args:
        contents: of the file.
        arch: of the network.
        kwargs: of the network.
        found: the match.
        cfg: timm's word on the network's own weights: input_size, mean, std.

    Returns:
        The file's own word, or else what the number of channels and the file's writer imply.
    """
    told = contents.told
    if told.input is not None:
        channels = kwargs.get("in_chans", NETWORKS[arch][1].channels if arch in NETWORKS else 3)
        if told.input.channels == channels:
            return told.input
        told.left_out.append(f"input of {told.input.channels} channels: the first convolution takes {channels}")
    if arch in NETWORKS:
        input = NETWORKS[arch][1]
        if contents.container == "pickle" and input.color == "rgb":
            input = Input("bgr", input.size, input.mean[::-1], input.std[::-1])
        channels = kwargs.get("in_chans", input.channels)
        return input if channels == input.channels else default(_color(contents, channels), input.size)
    size = kwargs.get("img_size") or {**cfg, **told.cfg}["input_size"][-1]
    if "last_stride" in kwargs:
        return default("lab_l", size)
    channels = kwargs.get("in_chans", 3)
    if kwargs.get("small_stem"):
        size = 32
    if channels != 3:
        return default(_color(contents, channels), size)
    if contents.container == "pickle" and "blobs" in contents.names:
        return default("bgr", size)
    if told.cfg or told.architecture is not None:
        if len(told.cfg.get("mean", cfg["mean"])) != 3:
            told.left_out.append("mean and std should have 3 numbers")
            told.cfg = {name: value for name, value in told.cfg.items() if name not in ("mean", "std")}
        return timm_input({**cfg, **told.cfg}, size)
    # timm's own files have timm's classifier; self-supervised code uses ImageNet's mean and deviation everywhere.
    classifier = cfg.get("classifier") or ""
    classifiers = classifier if isinstance(classifier, tuple | list) else (classifier,)
    timms = any(f"{name}.weight" in key for name in classifiers if name for key in found.dropped)
    return timm_input(cfg, size) if timms else Input("rgb", size, *IMAGENET)


def _color(contents: Contents, channels: int) -> str:
    """The colours that so many channels stand for, where nothing tells."""
    if channels not in (1, 2, 3):
        raise OdcftError(
            f"{contents.path}: the first convolution takes {channels} channels, and nothing tells which. "
            "odcft shows networks images of 1 (gray, lab_l), 2 (sobel) or 3 (rgb, bgr) channels."
        )
    return {1: "gray", 2: "sobel", 3: "rgb"}[channels]


def timm_input(cfg: Mapping[str, Any], size: int) -> Input:
    """What timm's word on a network's own weights comes to, for images of `size` pixels."""
    interpolation = cfg.get("interpolation", "bilinear")
    known = interpolation if interpolation in INTERPOLATIONS else "bilinear"  # timm also has "random"
    return Input("rgb", size, cfg["mean"], cfg["std"], crop_fraction=cfg.get("crop_pct", 0.875), interpolation=known)


def overridden(input: Input, color: str) -> Input:
    """The user's word for other colours (`--input`), with the file's own normalisation where it still applies."""
    if {color, input.color} == {"rgb", "bgr"}:
        return replace(input, color=color, mean=input.mean[::-1], std=input.std[::-1])
    return default(color, input.size).seen(input.view)
