"""Colorization (Zhang et al., ECCV 2016)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odcft.backbone.network import Backbone
from odcft.data.batches import Crops, in_order, loader
from odcft.data.feature_extraction import to_float
from odcft.data.lab_colors import colours, lab, nearest_colour
from odcft.data.sources import Images
from odcft.data.view import View
from odcft.errors import OdcftError
from odcft.plan import Plan


class Colorization(nn.Module):
    """Which colour has each place of a gray image (Zhang et al., ECCV 2016)?

    The backbone sees lightness alone. Each cell of its last feature map tells the colours of its own part of the image,
    4 x 4 of them: one cell at 32 pixels, 7 x 7 at 224. A colour is one of 260 squares of the ab plane; rare ones
    weigh more. The answer is the nearest square, where the paper spreads it over five.
    """

    CELL = 4

    def __init__(self, backbone: Backbone, images: Images, size: int, plan: Plan) -> None:
        super().__init__()
        self.backbone = backbone
        self.backbone.eval()  # looked at once, for its shape
        with torch.no_grad():
            maps = self._maps(torch.zeros(1, 3, size, size))
        if maps.ndim != 4 or maps.shape[1] != backbone.net.num_features:
            raise OdcftError(
                f"colorization needs feature maps (B, F, h, w), and {backbone.arch} gives {tuple(maps.shape)}. "
                "Take rotation or jigsaw, or a convolutional network."
            )
        self.colours_Q2: Tensor
        self.weight_C: Tensor
        self.register_buffer("colours_Q2", colours(), persistent=False)
        weight_C = rebalancing(images, size, self.colours_Q2, intensity=plan.view.intensity)
        self.register_buffer("weight_C", weight_C, persistent=False)
        self.head = nn.Conv2d(maps.shape[1], len(self.colours_Q2) * self.CELL**2, 1)

    def forward(self, images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, H), RGB in 0..1, to logits (M, Q) of all places and their colours (M,)."""
        logits = F.pixel_shuffle(self.head(self._maps(images)), self.CELL)  # (B, Q, h, w)
        ab = F.adaptive_avg_pool2d(lab(images)[:, 1:], (logits.shape[2], logits.shape[3])).permute(0, 2, 3, 1)
        return logits.permute(0, 2, 3, 1).flatten(0, 2), nearest_colour(ab, self.colours_Q2).flatten()

    def _maps(self, images: Tensor) -> Tensor:
        net: Any = self.backbone.net
        return net.forward_features(self.backbone.adapter(images))


def rebalancing(
    images: Images,
    size: int,
    colours_Q2: Tensor,
    most: int = 2000,
    intensity: tuple[float, float] | None = None,
) -> Tensor:
    """How much each colour weighs in the loss (Zhang et al., sec. 2.2): 1 over a mixture of its share and 1 / Q.

    Args:
        images: shares are counted in some 2,000 of them.
        size: pixels of the input.
        colours_Q2: (Q, 2).
        most: images to look at.
        intensity: as in `View`.

    Returns:
        (Q,) float32; the mean weight of a place is 1.
    """
    rows = range(0, len(images), max(1, len(images) // most))
    crops = Crops(images, View(size, 1.0, intensity=intensity))
    counts_Q = torch.zeros(len(colours_Q2))
    for batch in loader(crops, in_order(rows, 128), 0, torch.device("cpu")):
        if len(batch.index_B):
            ab = F.avg_pool2d(lab(to_float(batch.pixels, torch.device("cpu")))[:, 1:], 4).permute(0, 2, 3, 1)
            counts_Q += torch.bincount(nearest_colour(ab, colours_Q2).flatten(), minlength=len(colours_Q2))
    if counts_Q.sum() == 0:
        raise OdcftError(f"None of {len(rows):,} images of {images.source} can be read.")
    share_Q = counts_Q / counts_Q.sum()
    # Smoothed with a Gaussian of 5 units, so that a colour nobody has counted is not infinitely rare.
    near_QQ = torch.exp(-torch.cdist(colours_Q2, colours_Q2).square() / (2 * 5.0**2))
    share_Q = near_QQ / near_QQ.sum(0) @ share_Q
    weight_Q = 1 / (0.5 * share_Q + 0.5 / len(share_Q))
    return weight_Q / (share_Q * weight_Q).sum()
