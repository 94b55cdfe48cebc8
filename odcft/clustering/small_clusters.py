"""Handling small clusters (paper, sec. 3.2): disperse their images, then refill them by splitting the largest in two.

Shapes as in memory.py; M: some rows of this rank. All decisions are made from integer sums over all ranks, so all ranks
agree, and the result does not depend on how many there are.
"""

import heapq

import torch
from torch import Tensor

from odcft.clustering.memory import UNIT, Memory, Rules, change_labels, minus_half_squares, nearest_centroid, to_units
from odcft.distributed import dist, ownership
from odcft.distributed.delayed_reader import DelayedReader


def is_small(sizes_K: Tensor, min_cluster: int, rules: Rules) -> Tensor:
    """Which clusters are small (sec. 3.2): (K,) int64 to (K,) bool."""
    return sizes_K <= min_cluster if rules.threshold_is_small else sizes_K < min_cluster


ROWS = 4096  # processed at a time


class SmallClusterWatch:
    """Tells in every step whether some cluster is small, without making the host wait for an accelerator.

    On a CPU the answer is for this step; on an accelerator it comes one step later, so small clusters are handled one
    step later.
    """

    def __init__(self) -> None:
        self.reader = DelayedReader()

    def any_small(self, sizes_K: Tensor, min_cluster: int, rules: Rules) -> bool:
        """Whether some cluster is small: now (CPU), or one step ago (accelerator). sizes_K: (K,) int64."""
        answer = self.reader.read(is_small(sizes_K, min_cluster, rules).any())
        return answer is not None and bool(answer)


def handle_small_clusters(memory: Memory, min_cluster: int, rules: Rules, generator: torch.Generator) -> int:
    """Move the images of small clusters to the nearest normal ones, and refill each with half of the largest cluster.

    `paper` splits the largest so that neither half is small, so one pass is enough; `official` takes the halves as
    K-Means gives them. If the largest cluster cannot give two normal ones, nothing is done: a departure from both,
    which only matters if K is close to images / threshold. If it can, but a later split cannot, a half may stay small.

    Args:
        memory: changed in place, in the same way on every rank.
        min_cluster: the threshold of sec. 3.2, in images.
        rules: of the variant.
        generator: on the CPU, in the same state on every rank.

    Returns:
        How many clusters were refilled.
    """
    small_K = is_small(memory.sizes_K, min_cluster, rules)
    smallest_normal = min_cluster + 1 if rules.threshold_is_small else min_cluster
    if not small_K.any() or int(memory.sizes_K.max()) < 2 * smallest_normal:
        return 0
    _disperse(memory, small_K, rules)
    at_least = smallest_normal if rules.until_none_is_small else 1
    return _refill(memory, small_K.nonzero()[:, 0].tolist(), at_least, rules, generator)


def rows_by_cluster(memory: Memory, clusters: list[int]) -> dict[int, Tensor]:
    """Find the rows of some clusters on this rank, in row order, in one pass over the labels.

    Args:
        memory: only read.
        clusters: their labels, each once.

    Returns:
        For each label, (M,) int64 rows.
    """
    device = memory.labels_S.device
    wanted_K = torch.zeros(len(memory.counts_K), dtype=torch.bool, device=device)
    wanted_K[torch.tensor(clusters, device=device)] = True
    row_M = wanted_K[memory.labels_S].nonzero()[:, 0]
    labels_M, order_M = torch.sort(memory.labels_S[row_M], stable=True)
    parts = row_M[order_M].split(torch.bincount(labels_M, minlength=len(wanted_K))[wanted_K].tolist())
    return dict(zip(sorted(clusters), parts, strict=True))


def _disperse(memory: Memory, small_K: Tensor, rules: Rules) -> None:
    """Move the images of all small clusters to the nearest normal ones."""
    normal_C = (~small_K).nonzero()[:, 0]  # labels of the C normal clusters
    row_M = small_K[memory.labels_S].nonzero()[:, 0]
    centroids_CD, minus_half_squares_C = memory.centroids_KD[normal_C], memory.minus_half_squares_K[normal_C]
    for row_B in row_M.split(ROWS):
        features_BD = memory.features_SD[row_B].float()
        change_labels(memory, row_B, normal_C[nearest_centroid(features_BD, centroids_CD, minus_half_squares_C, rules)])
    memory.sizes_K = dist.all_sum(memory.counts_K)


def _refill(memory: Memory, empty: list[int], at_least: int, rules: Rules, generator: torch.Generator) -> int:
    """Fill each empty cluster with half of the currently largest one; return how many were filled."""
    # E splits only involve clusters that are now among the E largest, and their halves, so one search finds all rows.
    # The halves are pushed back, and may become the largest again.
    sizes = memory.sizes_K.tolist()
    largest = heapq.nsmallest(len(empty), ((-size, label) for label, size in enumerate(sizes)))  # sorted, so a heap
    rows = rows_by_cluster(memory, [label for _, label in largest])
    filled = 0
    for label in empty:
        negative_size, source = largest[0]
        if negative_size == -1:
            break
        row_M = rows[source]
        min_half = min(at_least, -negative_size // 2)  # a small cluster is better than an empty one
        draws = generator if rules.random_half else torch.Generator().manual_seed(0)  # official: random_state=0
        second_M, sums_2D, sizes_2 = split_in_two(memory.features_SD[row_M].float(), row_M, min_half, draws)
        if rules.random_half and torch.rand((), generator=generator) < 0.5:  # "randomly choose one" (sec. 3.2)
            second_M, sums_2D, sizes_2 = ~second_M, sums_2D.flip(0), sizes_2[::-1]
        change_labels(memory, row_M[second_M], torch.full_like(row_M[second_M], label))
        size_21 = torch.tensor(sizes_2, device=sums_2D.device).unsqueeze(1)
        memory.centroids_KD[[source, label]] = sums_2D.float() * UNIT / size_21
        rows[source], rows[label] = row_M[~second_M], row_M[second_M]
        heapq.heapreplace(largest, (-sizes_2[0], source))
        heapq.heappush(largest, (-sizes_2[1], label))
        filled += 1
    memory.minus_half_squares_K = minus_half_squares(memory.centroids_KD)
    memory.sizes_K = dist.all_sum(memory.counts_K)
    return filled


def split_in_two(
    features_MD: Tensor, row_M: Tensor, at_least: int, generator: torch.Generator, iterations: int = 20
) -> tuple[Tensor, Tensor, list[int]]:
    """Split the images of one cluster, on all ranks together, by K-Means with K = 2.

    The start is a cut perpendicular to the first principal component (two power iterations); then come Lloyd's
    iterations.

    Args:
        features_MD: (M, D) float32, of the cluster's images on this rank; M may be 0.
        row_M: (M,) int64, their rows: they decide between images with the same score.
        at_least: images that each side must have; all ranks together must have twice as many. If K-Means leaves fewer
            on one side, the cut is shifted until that side has as many.
        generator: on the CPU, in the same state on every rank.
        iterations: of Lloyd's algorithm, at most (20: official code).

    Returns:
        (M,) bool, True for the second side; (2, D) int64 sums of both sides over all ranks; their two sizes.
    """
    M, D = features_MD.shape
    device = features_MD.device
    units_MD = to_units(features_MD)
    total_D1 = torch.cat([units_MD.sum(0), units_MD.new_tensor([M])])  # the sums, then the count
    dist.all_sum_(total_D1)
    size = int(total_D1[-1])
    mean_D = total_D1[:-1].float() * (UNIT / size)

    centred_MD = features_MD - mean_D
    direction_D = torch.randn(D, generator=generator).to(device)
    for _ in range(2):
        # Summed row by row: the rounding of a matrix product would depend on how many rows a rank has.
        along_M1 = (centred_MD * direction_D).sum(1, keepdim=True)
        spread_D = to_units(centred_MD * along_M1).sum(0)
        dist.all_sum_(spread_D)
        direction_D = torch.nn.functional.normalize(spread_D.float(), dim=0)
    score_M = (centred_MD * direction_D).sum(1)
    second_M = score_M > 0

    before_D1 = total_D1
    for _ in range(iterations):
        second_D1 = torch.cat([(units_MD * second_M.unsqueeze(1)).sum(0), second_M.sum().unsqueeze(0)])
        dist.all_sum_(second_D1)
        second_size = int(second_D1[-1])
        if second_size in (0, size) or torch.equal(second_D1, before_D1):  # the same sums give the same cut
            break
        before_D1 = second_D1
        second_mean_D = second_D1[:-1].float() * (UNIT / second_size)
        first_mean_D = (total_D1 - second_D1)[:-1].float() * (UNIT / (size - second_size))
        middle_D = (first_mean_D + second_mean_D) / 2
        score_M = ((features_MD - middle_D) * (second_mean_D - first_mean_D)).sum(1)
        second_M = score_M > 0

    second_M = _enough_on_both_sides(score_M, second_M, row_M, at_least)
    second_D1 = torch.cat([(units_MD * second_M.unsqueeze(1)).sum(0), second_M.sum().unsqueeze(0)])
    dist.all_sum_(second_D1)
    sums_2D = torch.stack([(total_D1 - second_D1)[:-1], second_D1[:-1]])
    return second_M, sums_2D, [size - int(second_D1[-1]), int(second_D1[-1])]


def _enough_on_both_sides(score_M: Tensor, second_M: Tensor, row_M: Tensor, at_least: int) -> Tensor:
    """Shift the cut along the scores if one side has fewer than `at_least` images, until it has that many."""
    sizes = torch.stack([(~second_M).sum(), second_M.sum()])
    dist.all_sum_(sizes)
    first, second = sizes.tolist()
    second_size = min(max(second, at_least), first + second - at_least)
    if second_size == second:
        return second_M
    # Every rank gets the scores and image numbers of all, not the features, and sorts them in the same way.
    image_M = ownership.image_of(row_M)
    scores, images = dist.gather_rows(score_M), dist.gather_rows(image_M)
    by_image = torch.argsort(images)
    order = by_image[torch.argsort(scores[by_image], stable=True)]  # ties: by image number
    return torch.isin(image_M, images[order[len(order) - second_size :]])
