"""CIE Lab values of sRGB images, on whole batches and any device; and the colour bins that colorization predicts."""

from functools import cache

import torch
from torch import Tensor

# IEC 61966-2-1: the matrix from linear sRGB to XYZ, and the D65 white point by which XYZ is divided.
_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_WHITE = (0.95047, 1.0, 1.08883)


def rgb_to_lab(images: Tensor) -> Tensor:
    """Convert sRGB images to CIE Lab.

    The matrix product is written as sums, because autocast would compute a matmul with 8 bits of precision.

    Args:
        images: (B, 3, H, W) float in 0..1.

    Returns:
        (B, 3, H, W): L in 0..100, a (green to red) and b (blue to yellow) in about -110..110.
    """
    images = images.float()
    linear = torch.where(images > 0.04045, ((images.clamp(min=0) + 0.055) / 1.055).pow(2.4), images / 12.92)
    red, green, blue = linear.unbind(1)
    x, y, z = (
        _lab_root((r * red + g * green + b * blue) / white) for (r, g, b), white in zip(_XYZ, _WHITE, strict=True)
    )
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def _lab_root(share: Tensor) -> Tensor:
    """The cube root, with the linear segment of CIE Lab near black."""
    return torch.where(share > 0.008856, share.clamp(min=1e-8).pow(1 / 3), 7.787 * share + 16 / 116)


@cache
def ab_bins(width: float = 10.0) -> Tensor:
    """Return the centres of the ab bins that sRGB colours fall into (Zhang et al., ECCV 2016).

    Args:
        width: of a bin, in units of ab; 10 gives 260 bins (the paper has 313).

    Returns:
        (Q, 2) float32.
    """
    levels = torch.linspace(0, 1, 52)
    cube = torch.cartesian_prod(levels, levels, levels)  # (52^3, 3): every fifth of 256 levels, in each channel
    ab = rgb_to_lab(cube.view(-1, 3, 1, 1))[:, 1:].flatten(1)
    return (ab / width).round().unique(dim=0) * width


def nearest_bin(ab: Tensor, bins_Q2: Tensor) -> Tensor:
    """Return the index of the bin nearest to each colour: (..., 2) to (...) int64."""
    flat = ab.reshape(-1, 2).float()
    return torch.cdist(flat, bins_Q2.to(flat.device)).argmin(1).view(ab.shape[:-1])
