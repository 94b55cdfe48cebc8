"""Handling small clusters (paper, sec. 3.2): disperse their images, then refill them by splitting the largest in two.

Shapes as in memory.py; M: some images, E: clusters to refill. All decisions are made from integer sums over all ranks,
or by rank 0, so all ranks agree, and the result does not depend on how many there are.

Which cluster is split next depends on the halves of those before it. So the ranks do not exchange sums in every step of
every split: they gather the few members of the largest clusters once, and then rank 0 makes all splits, on the host.
"""

import heapq
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from odcft.clustering.memory import (
    UNIT,
    Memory,
    Rules,
    change_labels,
    coarse_copy,
    nearest_centroid,
    put_centroids,
    to_units,
)
from odcft.distributed import dist, ownership
from odcft.distributed.delayed_reader import DelayedReader


def is_small(sizes_K: Tensor, min_cluster: int, rules: Rules) -> Tensor:
    """Which clusters are small (sec. 3.2): (K,) int64 to (K,) bool."""
    return sizes_K <= min_cluster if rules.threshold_is_small else sizes_K < min_cluster


def smallest_normal(min_cluster: int, rules: Rules) -> int:
    """The size of the smallest cluster that is not small."""
    return min_cluster + 1 if rules.threshold_is_small else min_cluster


def repair_is_due(sizes_K: Tensor, min_cluster: int, rules: Rules) -> Tensor:
    """Whether `handle_small_clusters` might have something to do: (K,) int64 to a bool tensor on the same device.

    Where there are too few images for all clusters to be normal, some always are small, which alone is no reason.
    """
    normal, largest = smallest_normal(min_cluster, rules), sizes_K.max()
    enough_images = sizes_K.sum() >= len(sizes_K) * normal
    empty = (sizes_K == 0).any() & (largest > 1)
    return is_small(sizes_K, min_cluster, rules).any() & (enough_images | (largest >= 2 * normal) | empty)


ROWS = 512  # processed at a time, like a batch
GATHERED = 1 << 28  # bytes of features that are gathered at a time: those of 262,144 images with 256 float32 values


class SmallClusterWatch:
    """Tells in every step whether small clusters should be handled, without making the host wait for an accelerator.

    On a CPU the answer is for this step; on an accelerator it comes one step later, so small clusters are handled one
    step later.
    """

    def __init__(self) -> None:
        self.reader = DelayedReader()

    def repair_is_due(self, sizes_K: Tensor, min_cluster: int, rules: Rules) -> bool:
        """Whether small clusters should be handled: now (CPU), or one step ago (accelerator). sizes_K: (K,) int64."""
        answer = self.reader.read(repair_is_due(sizes_K, min_cluster, rules))
        return answer is not None and bool(answer)


def handle_small_clusters(memory: Memory, min_cluster: int, rules: Rules, generator: torch.Generator) -> int:
    """Move the images of small clusters to the nearest normal ones, and refill each with half of the largest cluster.

    `paper` splits the largest so that neither half is small, so one pass is enough; `official` takes the halves as
    K-Means gives them. If the largest cluster cannot give two normal ones, nothing is done: a departure from both,
    which only matters if K is close to images / threshold. If it can, but a later split cannot, a half may stay small.

    With a threshold above images / K (fig. 4) some clusters are always small. Handling all of them could move nearly
    all images at once; instead only the smallest are handled, as many as larger clusters can be split for without a
    half becoming small, and the empty ones. So every call leaves fewer empty or fewer small clusters, or does nothing.

    However many clusters are small, there are eight collectives, and the host waits for the device about a dozen times;
    more only if the clusters to split have more than `GATHERED` bytes of features.

    Args:
        memory: changed in place, in the same way on every rank.
        min_cluster: the threshold of sec. 3.2, in images.
        rules: of the variant.
        generator: on the CPU, in the same state on every rank.

    Returns:
        How many clusters were refilled.
    """
    sizes_K = memory.sizes_K.cpu()
    if not repair_is_due(sizes_K, min_cluster, rules):
        return 0
    small_K, normal = is_small(sizes_K, min_cluster, rules), smallest_normal(min_cluster, rules)
    small, normal_C = small_K.nonzero()[:, 0].tolist(), (~small_K).nonzero()[:, 0]
    if int(sizes_K.sum()) < len(sizes_K) * normal:
        small = _smallest_to_refill(sizes_K, small, normal)
    elif int(sizes_K.max()) < 2 * normal:
        return 0
    if len(normal_C):
        _disperse(memory, small, normal_C.to(memory.labels_S.device), rules)
    at_least = normal if rules.until_none_is_small else 1
    return _refill(memory, small, at_least, rules, generator)


def _smallest_to_refill(sizes_K: Tensor, small: list[int], normal: int) -> list[int]:
    """The small clusters to handle where not all can become normal, in order.

    Splitting a cluster of s images until all parts have fewer than 2 x `normal` takes (s - 1) // (2 normal - 1) splits
    or more, however uneven they are.

    Args:
        sizes_K: (K,) int64, on the host.
        small: their labels.
        normal: the size of the smallest normal cluster.
    """
    sizes = sizes_K.tolist()
    splits = sum((size - 1) // (2 * normal - 1) for size in sizes if size)
    count = max(splits, sizes.count(0))
    return sorted(sorted(small, key=lambda label: (sizes[label], label))[:count])


def rows_of_clusters(memory: Memory, clusters: list[int]) -> Tensor:
    """Find the rows of some clusters on this rank, in one pass over the labels.

    Args:
        memory: only read.
        clusters: their labels.

    Returns:
        (M,) int64, in row order.
    """
    wanted_K = torch.zeros(len(memory.counts_K), dtype=torch.bool)
    wanted_K[clusters] = True
    return wanted_K.to(memory.labels_S.device).index_select(0, memory.labels_S).nonzero()[:, 0]


def _disperse(memory: Memory, small: list[int], normal_C: Tensor, rules: Rules) -> None:
    """Move the images of all small clusters to the nearest normal ones. normal_C: (C,) int64, labels of these."""
    row_M = rows_of_clusters(memory, small)
    centroids_CD = memory.centroids_KD.index_select(0, normal_C)
    minus_half_squares_C = memory.minus_half_squares_K.index_select(0, normal_C)
    # For a few rows, making a coarse copy takes longer than it saves.
    coarse = coarse_copy(centroids_CD, minus_half_squares_C, rules) if len(row_M) > ROWS else None
    for row_B in row_M.split(ROWS):
        features_BD = memory.features_SD.index_select(0, row_B).float()
        nearest_B = nearest_centroid(features_BD, centroids_CD, minus_half_squares_C, rules, coarse)
        change_labels(memory, row_B, normal_C.index_select(0, nearest_B))
    memory.sizes_K = dist.all_sum(memory.counts_K)


# ---------------------------------------------------------------- refilling


class _Members(NamedTuple):
    """Images of a cluster: all of them on the host, or this rank's on its device if they are too many to gather."""

    row_M: Tensor  # int64, their rows among the features that were gathered
    image_M: Tensor  # int64, their numbers
    label: int  # that the memory has for them


def _refill(memory: Memory, empty: list[int], at_least: int, rules: Rules, generator: torch.Generator) -> int:
    """Fill each empty cluster with half of the currently largest one; return how many were filled."""
    # E splits only involve clusters that are now among the E largest, and their halves.
    E = len(empty)
    size_K, label_K = memory.sizes_K.cpu().sort(descending=True, stable=True)
    pairs = zip(size_K[:E].tolist(), label_K[:E].tolist(), strict=True)
    largest, waiting = [(-size, label) for size, label in pairs], empty[::-1]
    while waiting and largest[0][0] < -1:
        labels, gathered = _next_to_split(memory, largest, len(waiting))
        features_GD, members = _gather_members(memory, labels) if gathered else _own_members(memory, labels)
        split = partial(split_in_two, on_all_ranks=not gathered)
        centroids: dict[int, Tensor] = {}
        if not gathered or dist.rank() == 0:
            centroids = _split_largest(split, features_GD, members, largest, waiting, at_least, rules, generator)
        if gathered:  # rank 0 decides: processors of different kinds may round differently
            decided = {0: (members, centroids, largest, waiting)} if dist.rank() == 0 else {}
            members, centroids, largest, waiting = dist.gather_dict(decided)[0]
        _set_members(memory, members, centroids)
    put_centroids(memory, memory.centroids_KD)
    memory.sizes_K = dist.all_sum(memory.counts_K)
    return E - len(waiting)


def _split_largest(
    split: Callable[..., tuple[Tensor, Tensor, list[int]]],
    features_GD: Tensor,
    members: dict[int, _Members],
    largest: list[tuple[int, int]],
    waiting: list[int],
    at_least: int,
    rules: Rules,
    generator: torch.Generator,
) -> dict[int, Tensor]:
    """Fill empty clusters as long as the largest is one of those whose members are here.

    Args:
        split: as `split_in_two`.
        features_GD: that the rows of the members are of.
        members: of some clusters; changed to those of the halves.
        largest: minus its size and the label of each, a heap. The halves are pushed back: they may be the next largest.
        waiting: the empty clusters, the first one last; those that are filled are removed.
        at_least: images that each half must have, if there are enough.
        rules: of the variant.
        generator: on the CPU, in the same state on every rank.

    Returns:
        The new centroid (D,) of every cluster that changed.
    """
    centroids: dict[int, Tensor] = {}
    while waiting and largest[0][0] < -1 and largest[0][1] in members:
        negative_size, source = largest[0]
        label = waiting.pop()
        min_half = min(at_least, -negative_size // 2)  # a small cluster is better than an empty one
        draws = generator if rules.random_half else torch.Generator().manual_seed(0)  # official: random_state=0
        row_M, image_M, old_label = members[source]
        second_M, sums_2D, sizes_2 = split(features_GD.index_select(0, row_M).float(), image_M, min_half, draws)
        if rules.random_half and torch.rand((), generator=generator) < 0.5:  # "randomly choose one" (sec. 3.2)
            second_M, sums_2D, sizes_2 = ~second_M, sums_2D.flip(0), sizes_2[::-1]
        for part, side_M, sum_D, size in zip((source, label), (~second_M, second_M), sums_2D, sizes_2, strict=True):
            members[part] = _Members(row_M[side_M], image_M[side_M], old_label)
            centroids[part] = sum_D.float() * UNIT / size
        heapq.heapreplace(largest, (-sizes_2[0], source))
        heapq.heappush(largest, (-sizes_2[1], label))
    return centroids


def _next_to_split(memory: Memory, largest: list[tuple[int, int]], splits: int) -> tuple[list[int], bool]:
    """Which of the largest clusters to split now.

    Args:
        memory: only read.
        largest: minus its size and the label of each.
        splits: how many are left to do.

    Returns:
        Their labels, and whether their members can be gathered. If not, it is one cluster with too many.
    """
    bytes_each = memory.features_SD.shape[1] * memory.features_SD.element_size()
    labels, room = [], GATHERED // bytes_each
    for negative_size, label in sorted(largest)[:splits]:
        room += negative_size
        if room < 0:
            break
        labels.append(label)
    return (labels, True) if labels else ([min(largest)[1]], False)


def _own_members(memory: Memory, clusters: list[int]) -> tuple[Tensor, dict[int, _Members]]:
    """The features of this rank, and its images of one cluster; on its device."""
    (label,), row_M = clusters, rows_of_clusters(memory, clusters)
    return memory.features_SD, {label: _Members(row_M, ownership.image_of(row_M), label)}


def _gather_members(memory: Memory, clusters: list[int]) -> tuple[Tensor, dict[int, _Members]]:
    """Features (G, D) on the host, as stored, with those of some clusters from all ranks; and which is which."""
    row_M = rows_of_clusters(memory, clusters)
    label_and_image_M2 = torch.stack([memory.labels_S.index_select(0, row_M).long(), ownership.image_of(row_M)], 1)
    label_G, image_G = dist.gather_rows(label_and_image_M2).cpu().unbind(1)
    if dist.world_size() == 1 and row_M.device.type == "cpu":  # nothing to gather
        features_GD, row_G = memory.features_SD, row_M
    else:
        features_GD = dist.gather_rows(memory.features_SD.index_select(0, row_M)).cpu()
        row_G = torch.arange(len(features_GD))
    order_G = torch.argsort(image_G)  # every rank goes through the images in the same order, whoever owns them
    order_G = order_G[torch.argsort(label_G[order_G], stable=True)]
    counts = torch.bincount(label_G, minlength=len(memory.counts_K))[sorted(clusters)].tolist()
    parts = zip(sorted(clusters), row_G[order_G].split(counts), image_G[order_G].split(counts), strict=True)
    return features_GD, {label: _Members(row_M, image_M, label) for label, row_M, image_M in parts}


def _set_members(memory: Memory, members: dict[int, _Members], centroids: dict[int, Tensor]) -> None:
    """Give the images of the clusters that were split their new labels, and these clusters their centroids."""
    device = memory.labels_S.device
    changed = [(part.image_M, label) for label, part in members.items() if part.label != label]
    image_M = torch.cat([image_M for image_M, _ in changed])
    label_M = torch.cat([torch.full_like(image_M, label) for image_M, label in changed])
    mine_M = ownership.is_mine(image_M).nonzero().flatten()
    row_M = ownership.row_of(image_M.index_select(0, mine_M))
    change_labels(memory, row_M.to(device), label_M.index_select(0, mine_M).to(device))
    changed_C = torch.tensor(list(centroids)).to(device)
    memory.centroids_KD.index_copy_(0, changed_C, torch.stack(list(centroids.values())).to(device))


def split_in_two(
    features_MD: Tensor,
    image_M: Tensor,
    at_least: int,
    generator: torch.Generator,
    *,
    iterations: int = 20,
    on_all_ranks: bool = False,
) -> tuple[Tensor, Tensor, list[int]]:
    """Split the images of one cluster by K-Means with K = 2.

    The start is a cut perpendicular to the first principal component (two power iterations); then come Lloyd's
    iterations.

    Args:
        features_MD: (M, D) float32, of the cluster's images; with `on_all_ranks`, M may be 0.
        image_M: (M,) int64, their numbers: they decide between images with the same score.
        at_least: images that each side must have; there must be twice as many. If K-Means leaves fewer on one side,
            the cut is shifted until that side has as many.
        generator: on the CPU, in the same state on every rank.
        iterations: of Lloyd's algorithm, at most (20: official code).
        on_all_ranks: each rank has some of the images, and they split them together.

    Returns:
        (M,) bool, True for the second side; (2, D) int64 sums of both sides; their two sizes. Of all ranks' images if
        they split them together.
    """
    units_M1 = F.pad(to_units(features_MD), (0, 1), value=1)  # (M, D + 1): a sum of rows then ends with their number
    total_1 = _sum_of_rows(units_M1, on_all_ranks)
    size = int(total_1[-1])
    score_M = _along_main_direction(features_MD - total_1[:-1].float() * (UNIT / size), generator, on_all_ranks)
    second_M = score_M > 0
    second_1 = _sum_of_rows(units_M1[second_M], on_all_ranks)
    for _ in range(iterations):
        second_size = int(second_1[-1])
        if second_size in (0, size):
            break
        second_mean_D = second_1[:-1].float() * (UNIT / second_size)
        first_mean_D = (total_1 - second_1)[:-1].float() * (UNIT / (size - second_size))
        middle_D = (first_mean_D + second_mean_D) / 2
        score_M = (features_MD - middle_D).mul_(second_mean_D - first_mean_D).sum(1)
        before_M, second_M = second_M, score_M > 0
        change_1 = _change_of_sum(units_M1, before_M, second_M, on_all_ranks)
        second_1 += change_1
        if not change_1.any():  # the same sums give the same cut
            break

    second_size = min(max(int(second_1[-1]), at_least), size - at_least)
    if second_size != int(second_1[-1]):
        before_M, second_M = second_M, _highest(score_M, image_M, second_size, on_all_ranks)
        second_1 += _change_of_sum(units_M1, before_M, second_M, on_all_ranks)
    return second_M, torch.stack([(total_1 - second_1)[:-1], second_1[:-1]]), [size - second_size, second_size]


def _along_main_direction(centred_MD: Tensor, generator: torch.Generator, on_all_ranks: bool) -> Tensor:
    """Project images onto their first principal component, after two power iterations: (M, D) to (M,)."""
    # Summed row by row: the rounding of a matrix product would depend on how many rows there are.
    direction_D = torch.randn(centred_MD.shape[1], generator=generator).to(centred_MD.device)
    for _ in range(2):
        along_M1 = (centred_MD * direction_D).sum(1, keepdim=True)
        spread_D = _sum_of_rows(to_units(centred_MD * along_M1), on_all_ranks)
        direction_D = F.normalize(spread_D.float(), dim=0)
    return (centred_MD * direction_D).sum(1)


def _sum_of_rows(units_MD: Tensor, on_all_ranks: bool) -> Tensor:
    """Exact: in whole units."""
    sum_D = units_MD.sum(0)
    if on_all_ranks:
        dist.all_sum_(sum_D)
    return sum_D


def _change_of_sum(units_MD: Tensor, before_M: Tensor, after_M: Tensor, on_all_ranks: bool) -> Tensor:
    """By how much a sum of rows changes if it is taken over others: most stay, so this is faster than a new sum."""
    row_C = (before_M != after_M).nonzero()[:, 0]
    sign_C1 = after_M.index_select(0, row_C).long().mul_(2).sub_(1).unsqueeze(1)
    return _sum_of_rows(units_MD.index_select(0, row_C).mul_(sign_C1), on_all_ranks)


def _highest(score_M: Tensor, image_M: Tensor, count: int, on_all_ranks: bool) -> Tensor:
    """(M,) bool: the images with the highest scores, so many; of equal scores, those with the highest numbers."""
    # Every rank gets the scores and image numbers of all, not the features, and sorts them in the same way.
    scores, images = (dist.gather_rows(score_M), dist.gather_rows(image_M)) if on_all_ranks else (score_M, image_M)
    by_image = torch.argsort(images)
    order = by_image[torch.argsort(scores[by_image], stable=True)]
    return torch.isin(image_M, images[order[len(order) - count :]])
