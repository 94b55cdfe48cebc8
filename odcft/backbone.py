"""A checkpoint or a name in, a network out that turns images into pooled features (B, F)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from odcft.checkpoint import Contents, Match, match, read
from odcft.color import lab
from odcft.errors import OdcftError

# Tried in this order when the file does not name its architecture: the plain networks that self-supervised code trains.
COMMON = (
    *("resnet50", "resnet18", "resnet34", "resnet101", "resnet152", "wide_resnet50_2", "resnext50_32x4d"),
    *("vit_small_patch16_224", "vit_base_patch16_224", "vit_tiny_patch16_224", "vit_large_patch16_224"),
    *("vit_small_patch8_224", "vit_base_patch8_224", "vit_base_patch32_224", "vit_small_patch14_dinov2"),
    *("convnext_tiny", "convnext_small", "convnext_base", "convnext_large", "swin_tiny_patch4_window7_224"),
    *("efficientnet_b0", "mobilenetv3_large_100", "regnety_016", "densenet121", "vgg16_bn", "vgg16"),
    *("test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_byobnet"),
)
CHANNELS = {"rgb": 3, "lab_l": 1}  # of the first convolution, by what the network is shown
COVER = 0.9  # of the backbone's tensors that a checkpoint must have


class Backbone(nn.Module):
    """A timm network without its classifier, and the normalisation of its input.

    Attributes:
        arch: the timm name.
        width: F, the length of a feature.
        input: "rgb", or "lab_l", one channel of lightness.
        size: pixels of the input it was made for; `fixed_size` tells whether it takes no other.
    """

    def __init__(self, arch: str, pretrained_cfg: dict[str, Any] | None = None, input: str = "rgb") -> None:
        super().__init__()
        import timm

        self.input = input
        net: Any = timm.create_model(arch, pretrained=False, num_classes=0, in_chans=CHANNELS[input])
        self.net = net
        self.arch = arch
        # Pooled features may be wider than the last block.
        self.width: int = getattr(net, "head_hidden_size", None) or net.num_features
        cfg: dict[str, Any] = {**net.pretrained_cfg, **(pretrained_cfg or {})}
        self.size: int = cfg["input_size"][-1]
        self.fixed_size: bool = bool(cfg.get("fixed_input_size"))
        self.mean: tuple[float, ...] = tuple(cfg["mean"])
        self.std: tuple[float, ...] = tuple(cfg["std"])
        self._mean: Tensor
        self._std: Tensor
        # Not part of the state dict: they say how to call the network, and config.json keeps them.
        self.register_buffer("_mean", torch.tensor(self.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(self.std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), RGB in 0..1, to pooled features (B, F)."""
        return self.net(self.normalised(images))

    def normalised(self, images: Tensor) -> Tensor:
        """What the network itself is given: images (B, 3, H, W), RGB in 0..1, in its own colours and scale."""
        if self.input == "lab_l":
            images = lab(images)[:, :1]
        return (images - self._mean) / self._std


@dataclass
class Loaded:
    """A backbone and how it came about."""

    backbone: Backbone
    source: str  # as the user named it
    match: Match | None  # None for random weights and for weights from timm


def load_backbone(ckpt: str | Path, arch: str | None = None) -> Loaded:
    """The backbone of a checkpoint.

    Args:
        ckpt: a checkpoint file, a timm folder, a finished RUN, or `timm:NAME`, `torchvision:NAME`, `scratch:NAME`.
        arch: a timm name, where the file's own word or our guess is not to be followed.

    Returns:
        The backbone on the CPU, in evaluation mode, and what was matched.

    Raises:
        OdcftError: an unreadable file, an unknown architecture, or one covered to less than 90 %.
    """
    name = str(ckpt)
    scheme, _, rest = name.partition(":")
    if scheme in ("timm", "torchvision", "scratch") and rest:
        return _load_named(name, scheme, rest)
    path = Path(ckpt)
    if (path / "backbone" / "config.json").exists():  # a RUN
        path = path / "backbone"
    contents = read(path)
    input = contents.config.get("odcft", {}).get("input", "rgb")
    best: tuple[float, str, Match] | None = None
    for candidate in _candidates(contents, arch):
        found = match(contents, _shapes(candidate, CHANNELS[input]))
        if best is None or found.share > best[0]:
            best = (found.share, candidate, found)
        if found.share == 1 or (candidate == arch and arch):
            break
    if best is None or best[0] == 0:
        raise OdcftError(f"{path} fits no backbone odcft knows. If you know its timm architecture, say --arch NAME.")
    share, found_arch, found = best
    if share < COVER:
        lacking = ", ".join(found.missing[:3]) + (" …" if len(found.missing) > 3 else "")
        raise OdcftError(
            f"{path} has only {len(found.tensors)} of the {found.expected} tensors of {found_arch}, "
            f"the nearest backbone ({share:.0%}; missing: {lacking}). "
            f"At least {COVER:.0%} are needed; if it is another network, say --arch NAME."
        )
    backbone = Backbone(found_arch, contents.config.get("pretrained_cfg"), input)
    # Partial cover is allowed down to COVER and always reported; every tensor that is loaded has been matched by shape.
    backbone.net.load_state_dict({**backbone.net.state_dict(), **found.tensors})
    return Loaded(backbone.eval(), name, found)


# What the place of the state dict in the file says about who wrote it.
_FAMILIES = {
    "encoder_q.": "MoCo",
    "base_encoder.": "MoCo v3",
    "teacher": "DINO",
    "model_state_dict": "VISSL",
    "classy_state_dict": "VISSL",
    "backbone.": "a network with its backbone apart (OpenSelfSup, Lightning …)",
    "module.": "a training script (DataParallel)",
    "state_dict": "a training script",
}


def describe(loaded: Loaded) -> tuple[dict[str, Any], list[str]]:
    """What `odcft inspect` tells of a loaded checkpoint: INTERFACE's fields, and lines for people."""
    backbone, found = loaded.backbone, loaded.match
    family = loaded.source.split(":")[0] if found is None else "a plain state dict"
    if found is not None:
        family = next((name for mark, name in _FAMILIES.items() if mark in found.where), family)
    expected = len(backbone.net.state_dict()) if found is None else found.expected
    values: dict[str, Any] = {
        "family": family,
        "arch": backbone.arch,
        "input": {
            "channels": CHANNELS[backbone.input],
            "color": backbone.input,
            "range": [0, 100] if backbone.input == "lab_l" else [0, 1],
            "mean": list(backbone.mean),
            "std": list(backbone.std),
            "size": backbone.size,
        },
        "expected": expected,
        "matched": expected if found is None else len(found.tensors),
        "missing": [] if found is None else found.missing,
        "unexpected": [] if found is None else found.unexpected,
        "dropped": [] if found is None else found.dropped,
        "where": loaded.source if found is None else found.where,
    }
    lines = [
        (
            f"{family} · {backbone.arch} · {'Lab L' if backbone.input == 'lab_l' else 'RGB'} {backbone.size}"
            f"{' only' if backbone.fixed_size else ''}, "
            f"mean {_numbers(backbone.mean)}, std {_numbers(backbone.std)}"
        ),
        f"  backbone   {values['matched']} of {expected} tensors under {values['where']}",
    ]
    for title, key in (("missing", "missing"), ("left out", "dropped"), ("no fit", "unexpected")):
        if values[key]:
            some = ", ".join(values[key][:4]) + (f" and {len(values[key]) - 4} more" if len(values[key]) > 4 else "")
            lines.append(f"  {title:<10} {some}")
    lines.append(f"Fine-tune it:   odcft finetune {loaded.source} IMAGES/ --out RUN")
    return values, lines


def _numbers(values: tuple[float, ...]) -> str:
    return "/".join(f"{v:g}" for v in values)


def _load_named(name: str, scheme: str, rest: str) -> Loaded:
    import timm

    arch = rest.split(".")[0] if scheme != "timm" else rest
    refuse_unknown(arch, name)
    backbone = Backbone(arch)
    if scheme != "scratch":
        tag = arch if scheme == "timm" else f"{arch}.tv_in1k"
        try:
            backbone.net = timm.create_model(tag, pretrained=True, num_classes=0)
        except RuntimeError as error:
            raise OdcftError(f"{name}: {error}.") from None
        except Exception as error:  # the hub's client has many ways to say that it cannot be reached
            raise OdcftError(
                f"{name}: its weights could not be fetched ({type(error).__name__}). "
                "Is there a network? A local file works without."
            ) from None
    return Loaded(backbone.eval(), name, None)


def _candidates(contents: Contents, arch: str | None) -> Iterator[str]:
    import timm

    if arch is not None:
        if not timm.is_model(arch):
            raise OdcftError(f"--arch {arch}: timm has no such network{_nearest(arch)}.")
        yield arch
        return
    seen = set()
    for hint in (*contents.hints, *COMMON):
        if hint not in seen and timm.is_model(hint):
            seen.add(hint)
            yield hint


def refuse_unknown(arch: str, asked: str | None = None) -> None:
    """Refuse a name that timm does not have, with the nearest it has."""
    import timm

    if not timm.is_model(arch.split(".")[0]):
        raise OdcftError(f"{asked or arch}: timm has no {arch}{_nearest(arch)}.")


@cache
def _shapes(arch: str, channels: int = 3) -> dict[str, Tensor]:
    """Names and shapes of a network, on the meta device: nothing is allocated."""
    import timm

    with torch.device("meta"):
        return timm.create_model(arch, pretrained=False, num_classes=0, in_chans=channels).state_dict()


def _nearest(arch: str) -> str:
    import difflib

    import timm

    close = difflib.get_close_matches(arch, timm.list_models(), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
