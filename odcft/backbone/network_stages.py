"""A network as a short list of stages, with the shape of what each gives and its parameters, for `odcft inspect`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from odcft.backbone.network import Backbone
from odcft.backbone.non_timm_networks import build

MAX_STAGES = 16  # that are listed
MAX_OPENED = 8  # children of a container that are listed one by one


@dataclass(frozen=True)
class Stage:
    """A part of a network.

    Attributes:
        name: as in the state dict.
        blocks: how many modules it has, where that is a row of equal ones; else 1.
        shape: what it gives for one image, such as (256, 56, 56) or (197, 384); None if unknown.
        parameters: how many numbers it learns.
    """

    name: str
    blocks: int
    shape: tuple[int, ...] | None
    parameters: int

    def __str__(self) -> str:
        parts = [self.name, f"{self.blocks} blocks" if self.blocks > 1 else ""]
        parts += [" x ".join(map(str, self.shape)) if self.shape else "", f"{self.parameters:,} parameters"]
        return " · ".join(filter(None, parts))


def stages(backbone: Backbone) -> list[Stage]:
    """The stages of a network that have parameters, in their order; the shapes are found without any memory."""
    shapes = _shapes(backbone)
    found = []
    alone = [name for name, _ in backbone.net.named_parameters(recurse=False)]
    if alone:
        few = ", ".join(alone[:4]) + (", …" if len(alone) > 4 else "")
        found.append(Stage(few, 1, None, sum(p.numel() for p in backbone.net.parameters(recurse=False))))
    for name, module in backbone.net.named_children():
        found += _opened(name, module, shapes)
    return found[:MAX_STAGES]


def _opened(name: str, module: nn.Module, shapes: dict[str, tuple[int, ...]]) -> list[Stage]:
    """A child as one stage, or as several if it is a row of stages that give different shapes."""
    if not (numbers := sum(parameter.numel() for parameter in module.parameters())):
        return []
    inner = {f"{name}.{key}": child for key, child in module.named_children()}
    row = isinstance(module, nn.Sequential | nn.ModuleList) and len(inner) > 1
    composed = any(any(child.children()) for child in inner.values())  # not a stem of a few single layers
    if row and composed and len({shapes.get(key) for key in inner}) > 1 and len(inner) <= MAX_OPENED:
        return [stage for key, child in inner.items() for stage in _opened(key, child, shapes)]
    last = next(reversed(inner), name) if row else name
    return [Stage(name, len(inner) if row and composed else 1, shapes.get(name, shapes.get(last)), numbers)]


def _shapes(backbone: Backbone) -> dict[str, tuple[int, ...]]:
    """What each module gives for one image of the network's size, without the batch: found on the meta device."""
    found: dict[str, tuple[int, ...]] = {}
    size, channels = backbone.size, backbone.input.channels

    def remember(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                found[name] = tuple(output.shape[1:])

        return hook

    try:
        with torch.device("meta"), torch.no_grad():
            net = build(backbone.arch, **backbone.arch_args).eval()
            for name, module in net.named_modules():
                if name.count(".") < 2:
                    module.register_forward_hook(remember(name))
            net(torch.zeros(1, channels, size, size))
    except Exception:  # the network is fine without: this is only shown
        return found
    return found
