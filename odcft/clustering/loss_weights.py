"""How much an image of each cluster weighs in the loss (paper, sec. 3.2)."""

import torch
from torch import Tensor

from odcft.clustering.memory import Rules


def loss_weights(sizes_K: Tensor, rules: Rules) -> Tensor:
    """The loss weight of an image in each cluster, 1 / sqrt(N_c) (sec. 3.2).

    Args:
        sizes_K: (K,) int64, the clusters' sizes N_c over all ranks.
        rules: of the variant; the official code adds 1e-5 to the sizes and makes the weights sum to 1.

    Returns:
        (K,) float32. Only ratios matter: the loss divides by the sum of the weights of its batch.
    """
    if rules.normalised_weights:
        weights_K = (sizes_K + 1e-5).rsqrt()
        return weights_K / weights_K.sum()
    return sizes_K.clamp(min=1).to(torch.float32).rsqrt()
