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
from torch import Tensor

from odcft.clustering.coarse_scores import keep_only
from odcft.clustering.memory import (
    UNIT,
    Memory,
    Rules,
    change_labels,
    coarse_copy,
    nearest_centroid,
    put_centroids,
)
from odcft.clustering.two_means import Halves, split_in_two
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
SPLIT = 2048  # images of clusters that are split at once, at most, if there are several: they should stay in cache
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
    centroids_CD, minus_half_squares_C = memory.centroids_KD, memory.minus_half_squares_K
    memory.coarse = coarse = memory.coarse or coarse_copy(centroids_CD, minus_half_squares_C, rules)
    if coarse is not None:  # the copy of all centroids is there: the small ones are left out
        coarse = keep_only(coarse, normal_C)
    else:
        centroids_CD = centroids_CD.index_select(0, normal_C)
        minus_half_squares_C = minus_half_squares_C.index_select(0, normal_C)
    for row_B in row_M.split(ROWS):
        features_BD = memory.features_SD.index_select(0, row_B).float()
        nearest_B = nearest_centroid(features_BD, centroids_CD, minus_half_squares_C, rules, coarse)
        change_labels(memory, row_B, nearest_B if coarse is not None else normal_C.index_select(0, nearest_B))
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
    draws = _draw(E, memory.features_SD.shape[1], rules, generator)
    while waiting and largest[0][0] < -1:
        labels, gathered = _next_to_split(memory, largest, len(waiting))
        features_GD, members = _gather_members(memory, labels) if gathered else _own_members(memory, labels)
        split = partial(_split, features_GD, members, at_least=at_least, on_all_ranks=not gathered)
        centroids: dict[int, Tensor] = {}
        if not gathered or dist.rank() == 0:
            centroids = _split_largest(split, members, largest, waiting, draws)
        if gathered:  # rank 0 decides: processors of different kinds may round differently
            decided = {0: (members, centroids, largest, waiting)} if dist.rank() == 0 else {}
            members, centroids, largest, waiting = dist.gather_dict(decided)[0]
        _set_members(memory, members, centroids)
    put_centroids(memory, memory.centroids_KD)
    memory.sizes_K = dist.all_sum(memory.counts_K)
    return E - len(waiting)


def _draw(splits: int, dim: int, rules: Rules, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """For each split a random direction (D,) to start from, and whether the halves change places."""
    if not rules.random_half:  # official: random_state=0
        return [(torch.randn(dim, generator=torch.Generator().manual_seed(0)), torch.tensor(False))] * splits
    # "randomly choose one" (sec. 3.2)
    draw = partial(torch.rand, (), generator=generator)
    return [(torch.randn(dim, generator=generator), draw() < 0.5) for _ in range(splits)]


def _split_largest(
    split: Callable[[list[tuple[int, int]], list[Tensor]], list[Halves]],
    members: dict[int, _Members],
    largest: list[tuple[int, int]],
    waiting: list[int],
    draws: list[tuple[Tensor, Tensor]],
) -> dict[int, Tensor]:
    """Fill empty clusters as long as the largest is one of those whose members are here.

    Several splits are made at once, as if no half were larger than the cluster that comes next. If one is, those after
    it are made again.

    Args:
        split: `_split` of these members.
        members: of some clusters; changed to those of the halves.
        largest: minus its size and the label of each, a heap. The halves are pushed back: they may be the next largest.
        waiting: the empty clusters, the first one last; those that are filled are removed.
        draws: for all splits, also those that were made before.

    Returns:
        The new centroid (D,) of every cluster that changed.
    """
    centroids: dict[int, Tensor] = {}
    made: list[tuple[int, Halves]] = []  # the first one last
    at_once = 1
    while waiting and largest[0][0] < -1 and largest[0][1] in members:
        source, done = largest[0][1], len(draws) - len(waiting)
        if not made or made[-1][0] != source:
            at_once = min(max(1, at_once // 2) if made else 2 * at_once, len(waiting))
            chosen = _next_in_order(heapq.nsmallest(at_once, largest), members)
            halves = split(chosen, [direction_D for direction_D, _ in draws[done : done + len(chosen)]])
            made = [(label, one) for (_, label), one in zip(chosen, halves, strict=True)][::-1]
        _, (second_M, sums_2D, sizes_2) = made.pop()
        if draws[done][1]:
            second_M, sums_2D, sizes_2 = ~second_M, sums_2D.flip(0), sizes_2[::-1]
        label, (row_M, image_M, old_label) = waiting.pop(), members[source]
        for part, side_M, sum_D, size in zip((source, label), (~second_M, second_M), sums_2D, sizes_2, strict=True):
            members[part] = _Members(row_M[side_M], image_M[side_M], old_label)
            centroids[part] = sum_D.float() * UNIT / size
        heapq.heapreplace(largest, (-sizes_2[0], source))
        heapq.heappush(largest, (-sizes_2[1], label))
    return centroids


def _next_in_order(largest: list[tuple[int, int]], members: dict[int, _Members]) -> list[tuple[int, int]]:
    """The first of the largest clusters: as many as should be split at once, at least one.

    Args:
        largest: minus its size and the label of each, in order.
        members: of some clusters, of which the first is one.
    """
    top, chosen = -largest[0][0], largest[:1]
    for negative_size, label in largest[1:]:
        # After a cluster of less than half the size, a half surely comes first.
        if label not in members or -2 * negative_size < top or (len(chosen) + 1) * top > SPLIT:
            break
        chosen.append((negative_size, label))
    return chosen


def _split(
    features_GD: Tensor,
    members: dict[int, _Members],
    chosen: list[tuple[int, int]],
    directions: list[Tensor],
    *,
    at_least: int,
    on_all_ranks: bool,
) -> list[Halves]:
    """Split clusters in two. chosen: minus its size and the label of each; directions: (D,) to start from, of each."""
    parts = [members[label] for _, label in chosen]
    return split_in_two(
        [features_GD.index_select(0, part.row_M).float() for part in parts],
        [part.image_M for part in parts],
        [min(at_least, -size // 2) for size, _ in chosen],  # a small cluster is better than an empty one
        torch.stack(directions),
        on_all_ranks=on_all_ranks,
    )


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
