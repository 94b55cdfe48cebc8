"""The samples memory and the centroids memory of Online Deep Clustering: pure tensors, no files, no collectives.

Shapes: N images, S of them on this rank, B batch, K clusters, D embedding.

The memory keeps, for each cluster, the sum of its members' features as 64-bit integers in units of 2**-32. Integer sums
are exact: taking a member out subtracts precisely what putting it in had added. So the sums never drift, however many
updates there are; they are the same in whatever order the members come and however they are divided among ranks; and a
centroid none of whose members changed is recomputed to the same bits, which makes "recompute the involved centroids"
(paper, sec. 3.1) and "recompute all" (official code) one and the same.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

UNIT = 2.0**-32  # of the fixed-point sums: finer than float32 for anything above 2**-8, room for 2**31 unit members
ROWS = 65536  # at a time


@dataclass(frozen=True)
class Rules:
    """Where the paper and its official code differ on the memory."""

    renormalise: bool  # samples-memory features back to unit length after eq. 2
    nearest: str  # "euclidean" (eq. 3), or "dot": the largest product with the mean, not normalised, centroid
    threshold_is_small: bool  # a cluster of exactly `min_cluster` images is small
    until_none_is_small: bool  # halves are cut so that neither is small, instead of as they fall
    random_half: bool  # the new cluster is a random half of the split one, instead of always the second
    normalised_weights: bool  # loss weights sum to 1 (the scale cancels in a weighted mean)


VARIANTS = {
    "paper": Rules(
        renormalise=False,
        nearest="euclidean",
        threshold_is_small=True,
        until_none_is_small=True,
        random_half=True,
        normalised_weights=False,
    ),
    "official": Rules(
        renormalise=True,
        nearest="dot",
        threshold_is_small=False,
        until_none_is_small=False,
        random_half=False,
        normalised_weights=True,
    ),
}


@dataclass
class Memory:
    """Both memories of one rank.

    The samples memory is `features_SD` (float32 or float16) and `labels_S` (int32). The centroids memory is
    `centroids_KD` (float32), remade every few steps from `sums_KD` and `counts_K`, which follow every update.
    """

    features_SD: Tensor
    labels_S: Tensor
    sums_KD: Tensor  # int64, of this rank's members, in UNITs
    counts_K: Tensor  # int64, of this rank's members
    sizes_K: Tensor  # int64, of all ranks' members: the sum of their counts
    centroids_KD: Tensor  # the same on every rank
    half_squares_K: Tensor  # -|c|^2 / 2 of each centroid c, which eq. 3 needs


def to_units(features: Tensor) -> Tensor:
    """Features as the integers that the sums are made of: (..., D) of any float dtype to int64."""
    return (features.float() * (1 / UNIT)).round_().to(torch.int64)


def new_memory(
    features_SD: Tensor, labels_S: Tensor, clusters: int, dtype: torch.dtype = torch.float32, normalise: bool = True
) -> Memory:
    """A memory with these features and labels; its centroids are still zero.

    Args:
        features_SD: (S, D), any float dtype, finite. The memory takes it over where the dtype is the memory's.
        labels_S: (S,), integers in 0..clusters-1.
        clusters: K.
        dtype: of the stored features.
        normalise: bring the features to unit length (sec. 3.1); not for a memory that is read back.

    Returns:
        A memory on the features' device. `sizes_K` is this rank's; sum it over ranks, then `set_centroids`.
    """
    S, D = features_SD.shape
    device = features_SD.device
    stored_SD = features_SD if features_SD.dtype == dtype else torch.empty(S, D, dtype=dtype, device=device)
    sums_KD = torch.zeros(clusters, D, dtype=torch.int64, device=device)
    labels_S = labels_S.to(torch.int32)
    for start in range(0, S, ROWS):  # in pieces, so that nothing else N-sized is ever made
        rows = slice(start, start + ROWS)
        piece_SD = features_SD[rows].float()
        stored_SD[rows] = (F.normalize(piece_SD, dim=1, eps=1e-10) if normalise else piece_SD).to(dtype)
        sums_KD.index_add_(0, labels_S[rows], to_units(stored_SD[rows]))
    counts_K = torch.bincount(labels_S, minlength=clusters)
    none_KD = torch.zeros(clusters, D, device=device)
    return Memory(stored_SD, labels_S, sums_KD, counts_K, counts_K.clone(), none_KD, half_squares(none_KD))


def set_centroids(memory: Memory, sums_KD: Tensor) -> None:
    """Each centroid becomes the mean of its members (sec. 3.1); an empty cluster keeps the centroid it had.

    Args:
        memory: its `sizes_K` are those of all ranks.
        sums_KD: (K, D) int64, the members' sums over all ranks.
    """
    sizes_K1 = memory.sizes_K.unsqueeze(1)
    means_KD = sums_KD.float().mul_(UNIT).div_(sizes_K1.clamp(min=1))
    memory.centroids_KD = torch.where(sizes_K1 > 0, means_KD, memory.centroids_KD)
    memory.half_squares_K = half_squares(memory.centroids_KD)


def half_squares(centroids_KD: Tensor) -> Tensor:
    """-|c|^2 / 2 of each centroid: (K, D) to (K,). |f - c|^2 is smallest where f.c - |c|^2 / 2 is largest."""
    return centroids_KD.square().sum(1).mul_(-0.5)


def nearest_centroid(features_BD: Tensor, centroids_KD: Tensor, half_squares_K: Tensor, rules: Rules) -> Tensor:
    """The label of each feature (eq. 3).

    Args:
        features_BD: (B, D) float32.
        centroids_KD: (K, D) float32.
        half_squares_K: (K,) of these centroids.
        rules: "euclidean" takes the nearest centroid, "dot" the largest product.

    Returns:
        (B,) int64.
    """
    if rules.nearest == "dot":
        return (features_BD @ centroids_KD.T).argmax(1)
    return torch.addmm(half_squares_K, features_BD, centroids_KD.T).argmax(1)


def last_of_each(row_B: Tensor) -> Tensor:
    """For each place in a batch, the last place that holds the same row: (B,) int64 to (B,) int64."""
    sorted_B, order_B = torch.sort(row_B, stable=True)
    # The last of a run of equal rows is where the search for that row, from the right, ends.
    return order_B.index_select(0, torch.searchsorted(sorted_B, row_B, right=True) - 1)


def update_samples(memory: Memory, row_B: Tensor, features_BD: Tensor, momentum: float, rules: Rules) -> Tensor:
    """Blend a batch into the samples memory (eq. 2), and move each image to its nearest centroid (eq. 3).

    The sums and counts of the clusters follow; the centroids stay as they are. When an image is in the batch twice, the
    last of the two wins, and counts once.

    Args:
        memory: changed in place.
        row_B: (B,) int64, rows of this rank.
        features_BD: (B, D), as they leave the neck, not normalised.
        momentum: m of eq. 2, in (0, 1].
        rules: of the variant.

    Returns:
        (B,) bool: which images changed their label.
    """
    old_BD = memory.features_SD.index_select(0, row_B)
    old_label_B = memory.labels_S.index_select(0, row_B)
    blend_BD = momentum * F.normalize(features_BD.float(), dim=1, eps=1e-10) + (1 - momentum) * old_BD.float()
    if rules.renormalise:
        blend_BD = F.normalize(blend_BD, dim=1, eps=1e-10)
    new_BD = blend_BD.to(old_BD.dtype)  # what is stored is also what is compared and summed
    new_label_B = nearest_centroid(new_BD.float(), memory.centroids_KD, memory.half_squares_K, rules).to(torch.int32)
    moved_B = new_label_B != old_label_B

    last_B = last_of_each(row_B)
    memory.features_SD.index_copy_(0, row_B, new_BD.index_select(0, last_B))
    memory.labels_S.index_copy_(0, row_B, new_label_B.index_select(0, last_B))
    counts_B = (last_B == torch.arange(len(row_B), device=row_B.device)).to(torch.int64)  # 0 for the overwritten
    memory.sums_KD.index_add_(0, old_label_B, to_units(old_BD).mul_(-counts_B.unsqueeze(1)))
    memory.sums_KD.index_add_(0, new_label_B, to_units(new_BD).mul_(counts_B.unsqueeze(1)))
    memory.counts_K.index_add_(0, old_label_B, -counts_B)
    memory.counts_K.index_add_(0, new_label_B, counts_B)
    return moved_B


def move(memory: Memory, row_M: Tensor, label_M: Tensor) -> None:
    """Give rows (each named once) of this rank other labels; sums and counts follow, features stay.

    Args:
        memory: changed in place.
        row_M: (M,) int64.
        label_M: (M,) integers.
    """
    units_MD = to_units(memory.features_SD[row_M])
    old_M = memory.labels_S[row_M]
    ones_M = torch.ones_like(row_M)
    memory.labels_S[row_M] = label_M.to(torch.int32)
    memory.sums_KD.index_add_(0, old_M, -units_MD).index_add_(0, label_M, units_MD)
    memory.counts_K.index_add_(0, old_M, -ones_M).index_add_(0, label_M, ones_M)


def loss_weights(sizes_K: Tensor, rules: Rules) -> Tensor:
    """How much an image of each cluster weighs in the loss, 1 / sqrt(N_c) (sec. 3.2).

    Args:
        sizes_K: (K,) int64, the clusters' sizes N_c over all ranks.
        rules: of the variant; the official code adds 1e-5 to the sizes and makes the weights sum to 1.

    Returns:
        (K,) float32. Only ratios matter: the loss divides by the weights of its batch.
    """
    if rules.normalised_weights:
        weights_K = (sizes_K + 1e-5).rsqrt()
        return weights_K / weights_K.sum()
    return sizes_K.clamp(min=1).to(torch.float32).rsqrt()


def small_clusters(sizes_K: Tensor, min_cluster: int, rules: Rules) -> Tensor:
    """Which clusters are small (sec. 3.2): (K,) int64 to (K,) bool."""
    return sizes_K <= min_cluster if rules.threshold_is_small else sizes_K < min_cluster
