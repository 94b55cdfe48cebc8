"""PCA and whitening of the features that DeepCluster gives to K-Means."""

import torch
from torch import Tensor

from odcft.distributed import dist
from odcft.precision import exact_products

ROWS = 16384  # at a time


@exact_products()
def whiten(features_SF: Tensor, components: int) -> Tensor:
    """Coordinates along the main directions of all ranks' features, each with variance 1.

    Sums are taken in pieces and in float64; nothing else as large as the features is made.

    Args:
        features_SF: (S, F) float, this rank's.
        components: D at most; no more than F, or than images less one.

    Returns:
        (S, D) float32.
    """
    S, width = features_SF.shape
    device = features_SF.device
    sums_F1 = torch.zeros(width + 1, dtype=torch.float64, device=device)
    for piece_SF in features_SF.split(ROWS):
        sums_F1[:-1] += piece_SF.double().sum(0)
    sums_F1[-1] = S
    dist.all_sum_(sums_F1)
    count, mean_F = int(sums_F1[-1]), (sums_F1[:-1] / sums_F1[-1]).float()

    covariance_FF = torch.zeros(width, width, dtype=torch.float64, device=device)
    for piece_SF in features_SF.split(ROWS):
        centred_SF = piece_SF.float() - mean_F
        covariance_FF += (centred_SF.T @ centred_SF).double()
    dist.all_sum_(covariance_FF)
    variance_F, direction_FF = torch.linalg.eigh(covariance_FF / count)  # smallest first
    D = max(1, min(components, width, count - 1))
    # Directions without variance would only blow up rounding: they are left at almost nothing.
    scale_D = variance_F[-D:].clamp(min=1e-6 * float(variance_F[-1]) + 1e-12).rsqrt()
    turn_FD = (direction_FF[:, -D:] * scale_D).float()
    dist.broadcast_(turn_FD)  # the sign of a direction is the library's choice
    return torch.cat([(piece_SF.float() - mean_F) @ turn_FD for piece_SF in features_SF.split(ROWS)])
