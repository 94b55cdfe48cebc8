"""Colorization (Zhang et al., ECCV 2016)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odcft.backbone.network import Backbone
from odcft.data.batches import Crops, make_loader, sequential_batches
from odcft.data.feature_extraction import to_float
from odcft.data.images import Images
from odcft.data.lab_colors import ab_bins, nearest_bin, rgb_to_lab
from odcft.data.view import View
from odcft.errors import OdcftError
from odcft.plan import Plan


class Colorization(nn.Module):
    """Predict the colour at each position of a gray image (Zhang et al., ECCV 2016).

    The backbone sees only lightness. Each cell of its last feature map (1 x 1 cells at 32 pixels, 7 x 7 at 224) gives
    4 x 4 predictions for its part of the image. The classes are 260 bins of the ab plane; rare ones weigh more.
    The target is the nearest bin; the paper spreads it over the nearest five.
    """

    PREDICTIONS_PER_SIDE = 4  # of a cell

    def __init__(self, backbone: Backbone, images: Images, size: int, plan: Plan) -> None:
        super().__init__()
        self.backbone = backbone
        self.backbone.eval()  # one forward pass, to get the shape of its feature maps
        with torch.no_grad():
            maps = self._feature_maps(torch.zeros(1, 3, size, size))
        if maps.ndim != 4 or maps.shape[1] != backbone.net.num_features:
            raise OdcftError(
                f"colorization needs feature maps (B, F, h, w), but {backbone.arch} gives {tuple(maps.shape)}. "
                "Use rotation or jigsaw, or a convolutional network."
            )
        self.bins_Q2: Tensor
        self.weight_C: Tensor
        self.register_buffer("bins_Q2", ab_bins(), persistent=False)
        weight_C = class_weights(images, size, self.bins_Q2, intensity=plan.view.intensity)
        self.register_buffer("weight_C", weight_C, persistent=False)
        self.head = nn.Conv2d(maps.shape[1], len(self.bins_Q2) * self.PREDICTIONS_PER_SIDE**2, 1)

    def forward(self, images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Map images (B, 3, H, H), RGB in 0..1, to logits (M, Q) and targets (M,) of all positions."""
        logits = F.pixel_shuffle(self.head(self._feature_maps(images)), self.PREDICTIONS_PER_SIDE)  # (B, Q, h, w)
        ab = F.adaptive_avg_pool2d(rgb_to_lab(images)[:, 1:], (logits.shape[2], logits.shape[3])).permute(0, 2, 3, 1)
        return logits.permute(0, 2, 3, 1).flatten(0, 2), nearest_bin(ab, self.bins_Q2).flatten()

    def _feature_maps(self, images: Tensor) -> Tensor:
        net: Any = self.backbone.net
        return net.forward_features(self.backbone.adapter(images))


def class_weights(
    images: Images,
    size: int,
    bins_Q2: Tensor,
    sample: int = 2000,
    intensity: tuple[float, float] | None = None,
) -> Tensor:
    """Return the weight of each colour bin in the loss (Zhang et al., sec. 2.2): 1 / (its share mixed with 1 / Q).

    Args:
        images: the training images.
        size: of the input, in pixels.
        bins_Q2: centres of the bins, (Q, 2).
        sample: about how many images to estimate the shares from, spread over the set.
        intensity: as in `View`.

    Returns:
        (Q,) float32, such that the mean weight over all positions is 1.
    """
    rows = range(0, len(images), max(1, len(images) // sample))
    crops = Crops(images, View(size, 1.0, intensity=intensity))
    counts_Q = torch.zeros(len(bins_Q2))
    for batch in make_loader(crops, sequential_batches(rows, 128), 0, torch.device("cpu")):
        if len(batch.index_B):
            ab = F.avg_pool2d(rgb_to_lab(to_float(batch.pixels, torch.device("cpu")))[:, 1:], 4).permute(0, 2, 3, 1)
            counts_Q += torch.bincount(nearest_bin(ab, bins_Q2).flatten(), minlength=len(bins_Q2))
    if counts_Q.sum() == 0:
        raise OdcftError(f"None of the {len(rows):,} images sampled from {images.source} can be read.")
    share_Q = counts_Q / counts_Q.sum()
    # Smooth with a Gaussian of 5 units, so that bins that were never counted do not get infinite weights.
    kernel_QQ = torch.exp(-torch.cdist(bins_Q2, bins_Q2).square() / (2 * 5.0**2))
    share_Q = kernel_QQ / kernel_QQ.sum(0) @ share_Q
    weight_Q = 1 / (0.5 * share_Q + 0.5 / len(share_Q))
    return weight_Q / (share_Q * weight_Q).sum()
