"""Features of one layer besides the last, which give the images their first labels (`memory.start_layer`)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odcft.backbone.layers import LAST, outputs_of_layers
from odcft.backbone.network import Backbone
from odcft.errors import OdcftError
from odcft.text import short_repr

POOLED = 2048  # numbers per image, at most; one for each channel if there are more


class LastAndLayer(nn.Module):
    """Maps images (B, 3, H, W) to the backbone's features (B, F), and to those of a layer (B, L) of unit length.

    Args:
        backbone: the network, in eval mode.
        layer: the layer's name.
    """

    def __init__(self, backbone: Backbone, layer: str) -> None:
        super().__init__()
        self.backbone, self.layer = backbone, layer

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Run the images through the network once."""
        found = pooled_layers(self.backbone, images)
        return found[LAST], F.normalize(found[self.layer], dim=1, eps=1e-10)


def pooled_layers(backbone: Backbone, images: Tensor) -> dict[str, Tensor]:
    """Features (B, L) of every layer, pooled to at most POOLED numbers or one a channel, and of `last` as they are."""
    return {
        name: found if name == LAST else _pool(found.float()) for name, found in outputs_of_layers(backbone, images)
    }


def _pool(maps: Tensor) -> Tensor:
    side = max(1, min(math.isqrt(POOLED // maps.shape[1]), *maps.shape[2:]))
    return F.adaptive_avg_pool2d(maps, side).flatten(1)


@torch.no_grad()
def refuse_unknown_layer(backbone: Backbone, layer: str) -> None:
    """Refuse a layer that the network does not have.

    Raises:
        OdcftError: names the layers there are.
    """
    training, device = backbone.training, next(backbone.parameters()).device
    images = torch.zeros(1, backbone.input.bands, backbone.size, backbone.size, device=device)
    names = [name for name, _ in outputs_of_layers(backbone.eval(), images)]
    backbone.train(training)
    if layer not in names:
        raise OdcftError(
            f"memory.start_layer={short_repr(layer)}: {backbone.arch} has no such layer. Choose one of "
            f"{', '.join(names)}."
        )
