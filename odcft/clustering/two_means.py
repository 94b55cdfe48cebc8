"""Splitting clusters in two by K-Means with K = 2: many at once, with the same bits as one after the other.

Shapes: C clusters, M images of the largest of them on this rank (the others are filled up with zeros), A clusters
that may still change, R images of all, D embedding.

Sums are exact, in whole units, and scores are summed row by row. So nothing depends on which clusters are split
together, nor on how many ranks there are: the rounding of a matrix product would.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from odcft.clustering.memory import UNIT, to_units
from odcft.distributed import dist


class Halves(NamedTuple):
    """The two sides of a cluster that was split."""

    second_M: Tensor  # bool: which images of this rank are on the second side
    sums_2D: Tensor  # int64, of both sides and all ranks
    sizes: list[int]  # of both sides, on all ranks


def split_in_two(
    features: Sequence[Tensor],
    images: Sequence[Tensor],
    at_least: Sequence[int],
    directions_CD: Tensor,
    *,
    iterations: int = 20,
    on_all_ranks: bool = False,
) -> list[Halves]:
    """Split the images of each cluster.

    The start is a cut perpendicular to the first principal component (two power iterations); then come Lloyd's
    iterations.

    Args:
        features: (M, D) float32 of each cluster's images; with `on_all_ranks`, M may be 0.
        images: (M,) int64 of each, their numbers: they decide between images with the same score.
        at_least: images that each side must have; there must be twice as many. If K-Means leaves fewer on one side,
            the cut is shifted until that side has as many.
        directions_CD: random, from which the power iterations start.
        iterations: of Lloyd's algorithm, at most (20: official code).
        on_all_ranks: each rank has some of the images, and they split them together.

    Returns:
        The halves of each cluster.
    """
    device = features[0].device
    features_CMD = features[0].unsqueeze(0) if len(features) == 1 else pad_sequence(list(features), batch_first=True)
    own_C1 = torch.tensor([[len(one)] for one in features], device=device)
    valid_CM = torch.arange(features_CMD.shape[1], device=device) < own_C1
    units_CMD = to_units(features_CMD)
    total_C1 = _sums(units_CMD, valid_CM, on_all_ranks)
    centred_CMD = features_CMD - _means(total_C1).unsqueeze(1)
    score_CM = _along_main_direction(centred_CMD, valid_CM, directions_CD.to(device), on_all_ranks)
    second_CM, second_C1 = _lloyd(features_CMD, valid_CM, units_CMD, total_C1, score_CM, iterations, on_all_ranks)
    found = []
    for c, size in enumerate(total_C1[:, -1].tolist()):
        rows, sums_1 = len(features[c]), second_C1[c]
        second_M, second_size = second_CM[c, :rows], min(max(int(sums_1[-1]), at_least[c]), size - at_least[c])
        if second_size != int(sums_1[-1]):
            before_M, second_M = second_M, _highest(score_CM[c, :rows], images[c], second_size, on_all_ranks)
            units_1MD, before_1M, second_1M = units_CMD[c : c + 1, :rows], before_M.unsqueeze(0), second_M.unsqueeze(0)
            sums_1 = sums_1 + _change_of_sums(units_1MD, before_1M, second_1M, on_all_ranks)[0]
        sums_2D = torch.stack([(total_C1[c] - sums_1)[:-1], sums_1[:-1]])
        found.append(Halves(second_M, sums_2D, [size - second_size, second_size]))
    return found


def _along_main_direction(centred_CMD: Tensor, valid_CM: Tensor, direction_CD: Tensor, on_all_ranks: bool) -> Tensor:
    """Project images onto the first principal component of their cluster, after two power iterations: (C, M)."""
    work_CMD, whole_CMD = torch.empty_like(centred_CMD), torch.empty_like(centred_CMD, dtype=torch.int64)
    for _ in range(2):
        along_CM = torch.mul(centred_CMD, direction_CD.unsqueeze(1), out=work_CMD).sum(2) * valid_CM
        # A factor of 2**32, for units, changes no bit of the products.
        torch.mul(centred_CMD, (along_CM * (1 / UNIT)).unsqueeze(2), out=work_CMD)
        spread_CD = whole_CMD.copy_(work_CMD.round_()).sum(1)
        if on_all_ranks:
            dist.all_sum_(spread_CD)
        direction_CD = F.normalize(spread_CD.float(), dim=1)
    return torch.mul(centred_CMD, direction_CD.unsqueeze(1), out=work_CMD).sum(2)


def _lloyd(
    features_CMD: Tensor,
    valid_CM: Tensor,
    units_CMD: Tensor,
    total_C1: Tensor,
    score_CM: Tensor,
    iterations: int,
    on_all_ranks: bool,
) -> tuple[Tensor, Tensor]:
    """Lloyd's iterations from the sides that the scores give.

    Args:
        features_CMD: zeros where they are not valid.
        valid_CM: which rows are images.
        units_CMD: the features in units.
        total_C1: `_sums` of all rows.
        score_CM: above zero on the second side; set to that of the last iteration.
        iterations: at most.
        on_all_ranks: each rank has some of the images.

    Returns:
        (C, M) bool, which images are on the second side; and `_sums` of these.
    """
    second_CM = (score_CM > 0) & valid_CM
    second_C1 = _sums(units_CMD * second_CM.unsqueeze(2), second_CM, on_all_ranks)
    c_A = torch.arange(len(total_C1), device=total_C1.device)  # the clusters that still change: most only once or twice
    for _ in range(iterations):
        number_A = second_C1[c_A, -1]
        c_A = c_A[(number_A > 0) & (number_A < total_C1[c_A, -1])]
        if not len(c_A):
            break
        first_mean_AD, second_mean_AD = _means(total_C1[c_A] - second_C1[c_A]), _means(second_C1[c_A])
        features_AMD = features_CMD.index_select(0, c_A).sub_(((first_mean_AD + second_mean_AD) / 2).unsqueeze(1))
        score_CM[c_A] = features_AMD.mul_((second_mean_AD - first_mean_AD).unsqueeze(1)).sum(2)
        before_CM, second_CM = second_CM, (score_CM > 0) & valid_CM
        change_C1 = _change_of_sums(units_CMD, before_CM, second_CM, on_all_ranks)
        second_C1 += change_C1
        c_A = c_A[(change_C1[c_A] != 0).any(1)]  # the same sums give the same cut
    return second_CM, second_C1


def _means(sums_C1: Tensor) -> Tensor:
    """(C, D + 1) int64, sums of rows in units and then their number, to (C, D) means."""
    factors = [UNIT / max(1, number) for number in sums_C1[:, -1].tolist()]
    return sums_C1[:, :-1].float() * torch.tensor(factors, device=sums_C1.device).unsqueeze(1)


def _sums(units_CMD: Tensor, chosen_CM: Tensor, on_all_ranks: bool) -> Tensor:
    """(C, D + 1): exact sums of the chosen rows of each cluster, and their number. The other rows must be zero."""
    sums_C1 = torch.cat([units_CMD.sum(1), chosen_CM.sum(1, keepdim=True)], 1)
    if on_all_ranks:
        dist.all_sum_(sums_C1)
    return sums_C1


def _change_of_sums(units_CMD: Tensor, before_CM: Tensor, after_CM: Tensor, on_all_ranks: bool) -> Tensor:
    """By how much `_sums` change if other rows are chosen: most stay, so this is faster than new sums."""
    C, _, D = units_CMD.shape
    c_R, m_R = (before_CM != after_CM).nonzero().unbind(1)
    sign_R = after_CM[c_R, m_R].long().mul_(2).sub_(1)
    change_C1 = torch.zeros(C, D + 1, dtype=torch.int64, device=units_CMD.device)
    change_C1[:, :-1].index_add_(0, c_R, units_CMD[c_R, m_R].mul_(sign_R.unsqueeze(1)))
    change_C1[:, -1].index_add_(0, c_R, sign_R)
    if on_all_ranks:
        dist.all_sum_(change_C1)
    return change_C1


def _highest(score_M: Tensor, image_M: Tensor, count: int, on_all_ranks: bool) -> Tensor:
    """(M,) bool: the images with the highest scores, so many; of equal scores, those with the highest numbers."""
    # Every rank gets the scores and image numbers of all, not the features, and sorts them in the same way.
    scores, images = (dist.gather_rows(score_M), dist.gather_rows(image_M)) if on_all_ranks else (score_M, image_M)
    by_image = torch.argsort(images)
    order = by_image[torch.argsort(scores[by_image], stable=True)]
    return torch.isin(image_M, images[order[len(order) - count :]])
