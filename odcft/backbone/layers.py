"""Features of a backbone's layers, from the stem to the last stage, for protocols that compare layers.

Feature maps are pooled to about 9,000 numbers, as Goyal et al. (2019) do.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odcft.backbone.network import Backbone
from odcft.backbone.non_timm_networks import NamedLayers

LAST = "last"  # the name of the features that the backbone gives: pooled, and normalised where the network does
MAX_LAYERS = 12  # besides `last`; of deeper networks, so many spread evenly, the deepest among them
POOLED = 9216  # numbers per layer, at most

# Kernel, stride and padding of the average pooling of a ResNet at 224 pixels, by the sides of the map before and after
# (Goyal et al. 2019, as OpenSelfSup runs it). Other maps are pooled adaptively.
_PUBLISHED = {(112, 12): (10, 10, 4), (56, 6): (16, 8, 0), (28, 4): (13, 5, 0), (14, 3): (8, 3, 0), (7, 2): (6, 1, 0)}


class LayerFeatures(nn.Module):
    """Maps images to the features of several layers, side by side.

    Args:
        backbone: the network, in eval mode.
        size: side of the images in pixels; the network's own by default.

    Attributes:
        names: of the layers, in their order, `last` at the end.
        widths: the length of each layer's features.
    """

    def __init__(self, backbone: Backbone, size: int | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        first, side = next(backbone.parameters()), size or backbone.size
        with torch.no_grad():
            found = dict(self._features(torch.zeros(1, 3, side, side, device=first.device)))
        self.names = list(found)
        self.widths = [features.shape[1] for features in found.values()]

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), RGB in 0..1, to (B, sum of widths)."""
        return torch.cat([features.float() for _, features in self._features(images)], dim=1)

    def split(self, features_NF: Tensor) -> dict[str, Tensor]:
        """What `forward` gave, as one (N, F) for each layer."""
        return dict(zip(self.names, features_NF.split(self.widths, dim=1), strict=True))

    def _features(self, images: Tensor) -> Iterator[tuple[str, Tensor]]:
        for name, one in outputs_of_layers(self.backbone, images):
            yield name, one if name == LAST else pool(one)


def outputs_of_layers(backbone: Backbone, images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Name and feature maps (B, C, H, W) of each layer; at the end `last` and the features (B, F) of the backbone."""
    net = backbone.net
    given = backbone.adapter(images)
    if isinstance(net, NamedLayers):
        yield from _of_named_layers(net, given)
        return
    names = [str(info["module"]) for info in getattr(net, "feature_info", None) or ()]
    if not names or not hasattr(net, "forward_intermediates"):
        yield LAST, net(given)
        return
    chosen = _spread(len(names))
    final, maps = net.forward_intermediates(given, indices=chosen, output_fmt="NCHW")
    yield from ((names[number], one) for number, one in zip(chosen, maps, strict=True))
    yield LAST, net.forward_head(final, pre_logits=True)


def pool(maps: Tensor) -> Tensor:
    """Pool feature maps (B, C, H, W) to at most 9,216 numbers an image, averages over windows: (B, F)."""
    side = max(1, min(round(math.sqrt(POOLED / maps.shape[1])), *maps.shape[2:]))
    if maps.shape[2] == maps.shape[3] and (window := _PUBLISHED.get((maps.shape[2], side))):
        return F.avg_pool2d(maps, *window).flatten(1)
    return F.adaptive_avg_pool2d(maps, side).flatten(1)


def _of_named_layers(net: NamedLayers, given: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The outputs of activations that are maps: what a network's authors call conv1, conv2 …; and the features."""
    maps, output = [], given
    for name, output in net.layers(given):
        if isinstance(net.get_submodule(name), nn.ReLU) and output.ndim == 4:
            maps.append((name, output))
    for number in _spread(len(maps)):
        yield maps[number]
    yield LAST, output.mean((2, 3)) if output.ndim == 4 else output


def _spread(count: int) -> list[int]:
    """At most MAX_LAYERS of `count` layers, spread evenly, with the deepest."""
    if count <= MAX_LAYERS:
        return list(range(count))
    return [round((n + 1) * count / MAX_LAYERS) - 1 for n in range(MAX_LAYERS)]
