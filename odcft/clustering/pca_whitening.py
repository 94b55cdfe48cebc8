"""PCA and whitening of features before K-Means: DeepCluster's, and those of a start layer."""

import torch
from torch import Tensor

from odcft.distributed import dist
from odcft.precision import exact_products

ROWS = 16384  # processed at a time


@exact_products()
def whiten(features_SF: Tensor, components: int) -> Tensor:
    """Project the features onto the principal components over all ranks, and scale each to variance 1.

    Sums are taken in pieces and in float64; besides the result, nothing as large as the features is allocated.

    Args:
        features_SF: (S, F) float, of this rank.
        components: D, unless F or the number of images less one is smaller.

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
    # Dividing by a variance of almost zero would only amplify rounding errors: such directions stay close to zero.
    scale_D = variance_F[-D:].clamp(min=1e-6 * float(variance_F[-1]) + 1e-12).rsqrt()
    projection_FD = (direction_FF[:, -D:] * scale_D).float()
    dist.broadcast_(projection_FD)  # the sign of an eigenvector depends on the library
    return torch.cat([(piece_SF.float() - mean_F) @ projection_FD for piece_SF in features_SF.split(ROWS)])
