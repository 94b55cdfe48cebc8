"""The samples memory and the centroids memory of Online Deep Clustering: pure tensors, no files, no collectives.

Shapes: N images, S of them on this rank, B batch, K clusters, D embedding.

For each cluster the memory keeps the sum of its images' features, as 64-bit integers in units of 2**-32. Integer sums
are exact: removing an image subtracts precisely what adding it had added. So the sums never drift, however many updates
there are, and do not depend on the order of the images or on how they are divided among ranks. And a centroid none of
whose images changed is recomputed to the same bits, so "recompute the involved centroids" (paper, sec. 3.1) and
"recompute all" (official code) are the same, where a cluster also counts as involved if only a feature in it changed.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from odcft.clustering.coarse_scores import CoarseCentroids, coarse_centroids, coarse_is_faster, nearest_by_coarse

UNIT = 2.0**-32  # of the fixed-point sums: finer than float32 above 2**-8, with room for 2**31 features of unit length
ROWS = 65536  # processed at a time
MEANS = 1024  # computed at a time on a CPU, so that what is computed on the way stays in its cache
MOVED = 4096  # images that change their labels at a time: their features in units should stay in the processor's cache
SCORES = 3 << 17  # computed at a time on a CPU: 1.5 MB, which stay in its cache


@dataclass(frozen=True)
class Rules:
    """The points on which the paper and its official code differ."""

    renormalise: bool  # samples-memory features to unit length after eq. 2
    # "euclidean" (eq. 3), or "dot": the largest dot product with the centroid, a mean that is not normalised.
    nearest: str
    threshold_is_small: bool  # a cluster of exactly `min_cluster` images is small
    until_none_is_small: bool  # split so that neither half is small, instead of as K-Means splits
    random_half: bool  # the new cluster takes a random half of the split one, instead of always the second
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
    `centroids_KD` (float32), recomputed every few steps from the sums and sizes of all ranks, which updates change.
    """

    features_SD: Tensor
    labels_S: Tensor
    sums_KD: Tensor  # int64, over this rank's images, in UNITs
    counts_K: Tensor  # int64, images on this rank
    sizes_K: Tensor  # int64, images on all ranks: the sum of their counts
    centroids_KD: Tensor  # the same on every rank
    minus_half_squares_K: Tensor  # -|c|^2 / 2 of each centroid c, precomputed for eq. 3
    coarse: CoarseCentroids | None = None  # made from the centroids when it is first needed, where it is of use


def to_units(features: Tensor) -> Tensor:
    """Features in the integer units of the sums: (..., D) of any float dtype to int64."""
    return (features.float() * (1 / UNIT)).round_().to(torch.int64)


def new_memory(
    features_SD: Tensor, labels_S: Tensor, clusters: int, dtype: torch.dtype = torch.float32, normalise: bool = True
) -> Memory:
    """A memory with these features and labels, whose centroids are still zero.

    Args:
        features_SD: (S, D), any float dtype, finite. Kept without a copy, and changed in place, if it has
            the memory's dtype.
        labels_S: (S,), integers in 0..clusters-1.
        clusters: K.
        dtype: of the stored features.
        normalise: scale the features to unit length (sec. 3.1); False for a memory that is read back.

    Returns:
        A memory on the features' device. `sizes_K` counts only this rank's images: sum it over ranks, then call
        `set_centroids`.
    """
    S, D = features_SD.shape
    device = features_SD.device
    stored_SD = features_SD if features_SD.dtype == dtype else torch.empty(S, D, dtype=dtype, device=device)
    sums_KD = torch.zeros(clusters, D, dtype=torch.int64, device=device)
    labels_S = labels_S.to(torch.int32)
    for start in range(0, S, ROWS):  # in pieces, so that nothing else of size S is ever allocated
        rows = slice(start, start + ROWS)
        piece_SD = features_SD[rows].float()
        stored_SD[rows] = (F.normalize(piece_SD, dim=1, eps=1e-10) if normalise else piece_SD).to(dtype)
        sums_KD.index_add_(0, labels_S[rows], to_units(stored_SD[rows]))
    counts_K = torch.bincount(labels_S, minlength=clusters)
    zeros_KD = torch.zeros(clusters, D, device=device)
    return Memory(stored_SD, labels_S, sums_KD, counts_K, counts_K.clone(), zeros_KD, minus_half_squares(zeros_KD))


def set_centroids(memory: Memory, sums_KD: Tensor) -> None:
    """Set each centroid to the mean of its images (sec. 3.1); an empty cluster keeps its old centroid.

    Args:
        memory: changed in place; its `sizes_K` must count the images on all ranks.
        sums_KD: (K, D) int64, the sums over all ranks.
    """
    sizes_K1, centroids_KD = memory.sizes_K.unsqueeze(1), torch.empty_like(memory.centroids_KD)
    at_a_time = MEANS if centroids_KD.device.type == "cpu" else len(centroids_KD)
    parts = (whole.split(at_a_time) for whole in (sums_KD, sizes_K1, memory.centroids_KD, centroids_KD))
    for sums_CD, sizes_C1, old_CD, new_CD in zip(*parts, strict=True):
        means_CD = sums_CD.float().mul_(UNIT).div_(sizes_C1.clamp(min=1))
        torch.where(sizes_C1 > 0, means_CD, old_CD, out=new_CD)
    put_centroids(memory, centroids_KD)


def put_centroids(memory: Memory, centroids_KD: Tensor) -> None:
    """Set the centroids, (K, D) float32; needed also after some of them were changed in place."""
    memory.centroids_KD, memory.minus_half_squares_K = centroids_KD, minus_half_squares(centroids_KD)
    memory.coarse = None


def minus_half_squares(centroids_KD: Tensor) -> Tensor:
    """-|c|^2 / 2 of each centroid: (K, D) to (K,). |f - c|^2 is smallest where f.c - |c|^2 / 2 is largest."""
    return centroids_KD.square().sum(1).mul_(-0.5)


def coarse_copy(centroids_KD: Tensor, minus_half_squares_K: Tensor, rules: Rules) -> CoarseCentroids | None:
    """What makes `nearest_centroid` faster as long as the centroids stay; None if nothing does. Arguments as there."""
    if not coarse_is_faster(centroids_KD):
        return None
    return coarse_centroids(centroids_KD, None if rules.nearest == "dot" else minus_half_squares_K)


def nearest_centroid(
    features_BD: Tensor,
    centroids_KD: Tensor,
    minus_half_squares_K: Tensor,
    rules: Rules,
    coarse: CoarseCentroids | None = None,
) -> Tensor:
    """The label of each feature (eq. 3); of equally near centroids, the first.

    With a coarse copy of the centroids, only the few that could be the nearest are compared. Otherwise, on a CPU, the
    scores of some centroids at a time stay in cache, and only rows that found a better one look for its index: `amax`
    is many times as fast as `argmax`.

    Args:
        features_BD: (B, D) float32.
        centroids_KD: (K, D) float32.
        minus_half_squares_K: (K,) of these centroids.
        rules: "euclidean" takes the nearest centroid, "dot" the largest product.
        coarse: `coarse_copy` of these centroids, if they stay for several calls; perhaps only some can be the nearest.

    Returns:
        (B,) int64.
    """
    B, K = len(features_BD), len(centroids_KD)
    if coarse is not None:
        label_B = nearest_by_coarse(features_BD, coarse)
        b_M = (label_B == K).nonzero()[:, 0]
        if len(b_M):
            rest_MD, kept_C = features_BD.index_select(0, b_M), coarse.kept_C
            if kept_C is None:
                label_M = nearest_centroid(rest_MD, centroids_KD, minus_half_squares_K, rules)
            else:
                kept = centroids_KD.index_select(0, kept_C), minus_half_squares_K.index_select(0, kept_C)
                label_M = kept_C.index_select(0, nearest_centroid(rest_MD, *kept, rules))
            label_B.index_copy_(0, b_M, label_M)
        return label_B
    at_a_time = max(1, SCORES // max(1, B)) if features_BD.device.type == "cpu" else K
    if at_a_time >= K:
        return _scores(features_BD, centroids_KD, minus_half_squares_K, rules).argmax(1)
    buffer = features_BD.new_empty(B * at_a_time)
    best_B, label_B = features_BD.new_full((B,), -torch.inf), torch.zeros(B, dtype=torch.int64)
    for first in range(0, K, at_a_time):
        some = slice(first, first + at_a_time)
        centroids_CD = centroids_KD[some]
        scores_BC = buffer[: B * len(centroids_CD)].view(B, len(centroids_CD))
        _scores(features_BD, centroids_CD, minus_half_squares_K[some], rules, out=scores_BC)
        score_B = scores_BC.amax(1)
        b_M = (score_B > best_B).nonzero()[:, 0]
        label_B.index_copy_(0, b_M, scores_BC.index_select(0, b_M).argmax(1).add_(first))
        best_B = torch.maximum(best_B, score_B)
    return label_B


def _scores(
    features_BD: Tensor, centroids_CD: Tensor, minus_half_squares_C: Tensor, rules: Rules, out: Tensor | None = None
) -> Tensor:
    """(B, C) scores, of which the highest is that of the nearest centroid."""
    if rules.nearest == "dot":
        return torch.mm(features_BD, centroids_CD.T, out=out)
    return torch.addmm(minus_half_squares_C, features_BD, centroids_CD.T, out=out)  # |f - c|^2 is smallest there


def last_of_each(row_B: Tensor) -> Tensor:
    """For each position in a batch, the last position with the same row: (B,) int64 to (B,) int64."""
    sorted_B, order_B = torch.sort(row_B, stable=True)
    # searchsorted from the right gives the end of a run of equal rows; the last of them is just before it.
    return order_B.index_select(0, torch.searchsorted(sorted_B, row_B, right=True) - 1)


def update_samples(
    memory: Memory, row_B: Tensor, features_BD: Tensor, momentum: float, rules: Rules, *, keep_labels: bool = False
) -> Tensor:
    """Blend a batch into the samples memory (eq. 2), and move each image to its nearest centroid (eq. 3).

    The sums and counts of the clusters are updated; the centroids stay as they are. If an image is in the batch twice,
    the last one wins, and counts once.

    Args:
        memory: changed in place.
        row_B: (B,) int64, rows of this rank.
        features_BD: (B, D), output of the neck, not normalised.
        momentum: m of eq. 2, in (0, 1].
        rules: of the variant.
        keep_labels: only blend; every image stays in its cluster.

    Returns:
        (B,) bool: which images changed their label.
    """
    old_BD = memory.features_SD.index_select(0, row_B)
    old_label_B = memory.labels_S.index_select(0, row_B)
    blend_BD = momentum * F.normalize(features_BD.float(), dim=1, eps=1e-10) + (1 - momentum) * old_BD.float()
    if rules.renormalise:
        blend_BD = F.normalize(blend_BD, dim=1, eps=1e-10)
    new_BD = blend_BD.to(old_BD.dtype)  # rounded as stored, then compared and summed
    new_label_B = old_label_B
    if not keep_labels:
        centroids_KD, minus_half_squares_K = memory.centroids_KD, memory.minus_half_squares_K
        memory.coarse = memory.coarse or coarse_copy(centroids_KD, minus_half_squares_K, rules)
        nearest_B = nearest_centroid(new_BD.float(), centroids_KD, minus_half_squares_K, rules, memory.coarse)
        new_label_B = nearest_B.to(torch.int32)
    moved_B = new_label_B != old_label_B

    last_B = last_of_each(row_B)
    memory.features_SD.index_copy_(0, row_B, new_BD.index_select(0, last_B))
    memory.labels_S.index_copy_(0, row_B, new_label_B.index_select(0, last_B))
    # 0 for positions that are overwritten: only in replayed traces of the official code, which draws with replacement.
    is_last_B = (last_B == torch.arange(len(row_B), device=row_B.device)).to(torch.int64)
    memory.sums_KD.index_add_(0, old_label_B, to_units(old_BD).mul_(-is_last_B.unsqueeze(1)))
    memory.sums_KD.index_add_(0, new_label_B, to_units(new_BD).mul_(is_last_B.unsqueeze(1)))
    memory.counts_K.index_add_(0, old_label_B, -is_last_B)
    memory.counts_K.index_add_(0, new_label_B, is_last_B)
    return moved_B


def change_labels(memory: Memory, row_M: Tensor, label_M: Tensor) -> None:
    """Give rows of this rank new labels, and update sums and counts; features stay as they are.

    Args:
        memory: changed in place.
        row_M: (M,) int64, each row at most once.
        label_M: (M,) integers.
    """
    for row_B, label_B in zip(row_M.split(MOVED), label_M.split(MOVED), strict=True):
        units_BD = to_units(memory.features_SD.index_select(0, row_B))
        old_B = memory.labels_S.index_select(0, row_B)
        ones_B = torch.ones_like(row_B)
        memory.labels_S.index_copy_(0, row_B, label_B.to(torch.int32))
        memory.sums_KD.index_add_(0, label_B, units_BD).index_add_(0, old_B, units_BD.neg_())
        memory.counts_K.index_add_(0, old_B, -ones_B).index_add_(0, label_B, ones_B)
