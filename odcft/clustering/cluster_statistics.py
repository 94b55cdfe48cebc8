"""Statistics of a clustering: how even the clusters are, how far apart, and how much two clusterings agree."""

import math

import torch
from torch import Tensor


def cluster_figures(sizes_K: Tensor, centroids_KD: Tensor) -> dict[str, float]:
    """How evenly the images are distributed over the clusters, and how far apart the centroids are.

    Args:
        sizes_K: (K,) integers, images in each cluster, on all ranks.
        centroids_KD: (K, D) float32.

    Returns:
        `empty`: the number of empty clusters. `smallest`, `largest`: numbers of images. `largest_share`: the largest
        cluster's share of all images. `entropy`: of the sizes, divided by ln K: 1 if all are equal, 0 if one cluster
        has every image. `centroid_spread`: the centroids' mean squared distance from their mean, divided by their mean
        squared length: 0 if all are the same, 1 if they point in all directions.
    """
    K = len(sizes_K)
    share_K = sizes_K.double() / sizes_K.sum()
    entropy = -torch.special.xlogy(share_K, share_K).sum().clamp(max=0) / math.log(K)
    weight_K = (sizes_K > 0).float() / (sizes_K > 0).sum()
    squares = weight_K @ centroids_KD.square().sum(1)
    spread = (1 - (weight_K @ centroids_KD).square().sum() / squares.clamp(min=1e-12)) * (squares > 1e-12)
    counts = {"empty": (sizes_K == 0).sum(), "smallest": sizes_K.min(), "largest": sizes_K.max()}
    figures = {**counts, "largest_share": share_K.max(), "entropy": entropy, "centroid_spread": spread}
    values = torch.stack([figure.double() for figure in figures.values()]).tolist()  # waits for the device only once
    return {name: int(value) if name in counts else value for name, value in zip(figures, values, strict=True)}


def nmi(before_S: Tensor, after_S: Tensor) -> float:
    """Normalised mutual information of two labellings of this rank's images, (S,) each: 0 to 1.

    With several ranks, rank 0's images serve as a sample of all.
    """
    from sklearn.metrics import normalized_mutual_info_score

    return float(
        normalized_mutual_info_score(before_S.cpu().numpy(), after_S.cpu().numpy(), average_method="geometric")
    )
