"""How evenly the images fall into clusters, and how clusters of two epochs agree."""

import math

import torch
from torch import Tensor


def cluster_figures(sizes_K: Tensor, centroids_KD: Tensor) -> dict[str, float]:
    """How evenly the images fall into clusters, and how far these are from being one and the same.

    Args:
        sizes_K: (K,) integers, images of each cluster over all ranks.
        centroids_KD: (K, D) float32.

    Returns:
        `empty`, `smallest`, `largest`: numbers of clusters and of images. `largest_share` of all images. `entropy` of
        the sizes over ln K: 1 where all are as large, 0 where one has everything. `centroid_spread`: the centroids'
        mean squared distance from their mean, over their mean squared length: 0 where all are the same, 1 where they
        point in all directions.
    """
    K = len(sizes_K)
    share_K = sizes_K.double() / sizes_K.sum()
    entropy = -torch.special.xlogy(share_K, share_K).sum().clamp(max=0) / math.log(K)
    weight_K = (sizes_K > 0).float() / (sizes_K > 0).sum()
    squares = weight_K @ centroids_KD.square().sum(1)
    spread = (1 - (weight_K @ centroids_KD).square().sum() / squares.clamp(min=1e-12)) * (squares > 1e-12)
    counts = [(sizes_K == 0).sum(), sizes_K.min(), sizes_K.max(), share_K.max(), entropy, spread]
    empty, smallest, largest, share, even, apart = torch.stack([count.double() for count in counts]).tolist()
    return {
        **{"empty": int(empty), "smallest": int(smallest), "largest": int(largest)},
        **{"largest_share": share, "entropy": even, "centroid_spread": apart},
    }


def nmi(before_S: Tensor, after_S: Tensor) -> float:
    """Normalised mutual information of two labellings of this rank's images, (S,) each: 0..1.

    With several ranks it is that of rank 0's share, a random sample of the images.
    """
    from sklearn.metrics import normalized_mutual_info_score

    return float(
        normalized_mutual_info_score(before_S.cpu().numpy(), after_S.cpu().numpy(), average_method="geometric")
    )
