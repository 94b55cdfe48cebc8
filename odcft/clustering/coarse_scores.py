"""The nearest centroids of features by scores in bfloat16, which some processors multiply more than twice as fast.

A bound on the rounding errors tells which centroids could be the nearest in float32: for most features one to three.
Only these are compared in float32, so the labels are those that float32 gives, and do not depend on the batch.

Shapes: B features, K centroids, D embedding; P pieces of C centroids, in G groups of J; M near groups; Q candidates.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from odcft.precision import has_bfloat16

FROM_CENTROIDS, FROM_DIM = 2048, 64  # with fewer or shorter centroids, float32 is as fast
PIECE = 2048  # centroids at a time: their scores stay in the processor's cache
GROUPS = 32  # of a piece: the search skips whole groups whose best score is too low
MOST = 64  # groups, or candidates, of a feature: where there are more, a product in float32 is faster


@dataclass(frozen=True)
class CoarseCentroids:
    """Centroids in bfloat16, and how far they are from those in float32."""

    centroids_KD: Tensor  # as given
    minus_half_squares_K: Tensor | None  # as given
    centre_D: Tensor  # the mean of the centroids: rounding errors are smallest with the centroids around zero
    coarse_PCD: Tensor  # bfloat16, centroids minus the centre; the last piece is filled up
    bias_PC: Tensor  # float32, added to their products; -inf for what fills the last piece
    length_K: Tensor  # distances of the centroids from the centre; only of those that are kept, as the next
    rounding_K: Tensor  # and from what they were rounded to
    kept_C: Tensor | None = None  # int64, the labels that features can get; None: all


def coarse_is_faster(centroids_KD: Tensor) -> bool:
    """Whether coarse scores are faster than float32 here. Never on accelerators, where the host would have to wait."""
    K, D = centroids_KD.shape
    device = centroids_KD.device
    return device.type == "cpu" and K >= FROM_CENTROIDS and D >= FROM_DIM and has_bfloat16(device)


def coarse_centroids(centroids_KD: Tensor, minus_half_squares_K: Tensor | None) -> CoarseCentroids:
    """Round centroids to bfloat16; they take K x D x 2 bytes.

    Args:
        centroids_KD: (K, D) float32. Kept without a copy: they must not change afterwards.
        minus_half_squares_K: (K,) float32, -|c|^2 / 2 of each centroid c, to find the nearest centroid; None for the
            one with the largest product.
    """
    K, D = centroids_KD.shape
    centre_D = centroids_KD.mean(0)
    pieces = -(-K // PIECE)
    C = -(-K // (pieces * GROUPS)) * GROUPS
    coarse_CD = torch.zeros(pieces * C, D, dtype=torch.bfloat16)
    bias_C = torch.full((pieces * C,), -torch.inf)
    length_K, rounding_K = torch.empty(2, K)
    for first in range(0, K, C):
        some = slice(first, min(first + C, K))
        centred_CD = centroids_KD[some] - centre_D
        coarse_CD[some] = centred_CD
        # With centre m, f.c is (f - m).(c - m) + m.(c - m), plus f.m, which is the same for all centroids.
        dot = minus_half_squares_K is None
        bias_C[some] = torch.mv(centred_CD, centre_D) if dot else centred_CD.square().sum(1).mul_(-0.5)
        length_K[some] = centred_CD.norm(dim=1)
        rounding_K[some] = centred_CD.sub_(coarse_CD[some]).norm(dim=1)
    coarse_PCD, bias_PC = coarse_CD.view(pieces, C, D), bias_C.view(pieces, C)
    return CoarseCentroids(centroids_KD, minus_half_squares_K, centre_D, coarse_PCD, bias_PC, length_K, rounding_K)


def keep_only(coarse: CoarseCentroids, kept_C: Tensor) -> CoarseCentroids:
    """The same centroids, of which only some can be the nearest: kept_C, (C,) int64."""
    bias_PC = torch.full_like(coarse.bias_PC, -torch.inf)
    bias_PC.view(-1)[kept_C] = coarse.bias_PC.view(-1)[kept_C]
    # A centroid of few images is long, and would make the bound wide.
    length_C, rounding_C = coarse.length_K[kept_C], coarse.rounding_K[kept_C]
    return replace(coarse, bias_PC=bias_PC, length_K=length_C, rounding_K=rounding_C, kept_C=kept_C)


def nearest_by_coarse(features_BD: Tensor, coarse: CoarseCentroids) -> Tensor:
    """The label of each feature: of the highest scores in float32, summed row by row, the first.

    Args:
        features_BD: (B, D) float32.
        coarse: the centroids.

    Returns:
        (B,) int64. It is K, which is no label, where more than `MOST` centroids could be the nearest, or a number is
        not finite: these features must be compared with all centroids.
    """
    B, (P, C, _) = len(features_BD), coarse.coarse_PCD.shape
    G, J = GROUPS, C // GROUPS
    centred_BD = features_BD - coarse.centre_D
    coarse_BD = centred_BD.to(torch.bfloat16)
    products_PBC = torch.empty(P, B, C, dtype=torch.bfloat16)
    best_PBG, scores_BC = torch.empty(P, B, G), torch.empty(B, C)
    for products_BC, best_BG, coarse_CD, bias_C in zip(
        products_PBC, best_PBG, coarse.coarse_PCD, coarse.bias_PC, strict=True
    ):
        torch.mm(coarse_BD, coarse_CD.T, out=products_BC)
        scores_BC.copy_(products_BC).add_(bias_C)
        torch.amax(scores_BC.view(B, J, G), 1, out=best_BG)  # a group is every G-th centroid of a piece
    least_B = best_PBG.amax((0, 2)) - 2 * error_of(centred_BD, coarse_BD, coarse)

    # Candidates: first the groups that have one, then the positions within these groups.
    near_PBG = best_PBG >= least_B.unsqueeze(1)
    near_PBG &= ((near_PBG.sum((0, 2)) <= MOST) & least_B.isfinite()).unsqueeze(1)
    p_M, b_M, g_M = near_PBG.nonzero().unbind(1)
    scores_MJ = products_PBC.view(P, B, J, G)[p_M, b_M, :, g_M].float()
    scores_MJ += coarse.bias_PC.view(P, J, G)[p_M, :, g_M]
    m_Q, j_Q = (scores_MJ >= least_B[b_M].unsqueeze(1)).nonzero().unbind(1)
    b_Q, k_Q = b_M[m_Q], p_M[m_Q] * C + j_Q * G + g_M[m_Q]
    few_Q = (torch.bincount(b_Q, minlength=B) <= MOST)[b_Q]
    return _first_of_the_best(features_BD, b_Q[few_Q], k_Q[few_Q], coarse)


def _first_of_the_best(features_BD: Tensor, b_Q: Tensor, k_Q: Tensor, coarse: CoarseCentroids) -> Tensor:
    """(B,) int64: the lowest of the candidates k of each feature b with the highest score; K without candidates."""
    B, K = len(features_BD), len(coarse.centroids_KD)
    score_Q = features_BD.index_select(0, b_Q).mul_(coarse.centroids_KD.index_select(0, k_Q)).sum(1)
    if coarse.minus_half_squares_K is not None:
        score_Q += coarse.minus_half_squares_K.index_select(0, k_Q)
    best_B = score_Q.new_full((B,), -torch.inf).scatter_reduce_(0, b_Q, score_Q, "amax")
    k_Q = k_Q.masked_fill(score_Q < best_B[b_Q], K)
    return k_Q.new_full((B,), K).scatter_reduce_(0, b_Q, k_Q, "amin")


def error_of(centred_BD: Tensor, coarse_BD: Tensor, coarse: CoarseCentroids) -> Tensor:
    """How far a score of each feature can be off (Cauchy-Schwarz): the coarse one, and that in float32; together."""
    bfloat16, float32 = torch.finfo(torch.bfloat16), torch.finfo(torch.float32)
    rounding_B = (centred_BD - coarse_BD).norm(dim=1)
    length_B = centred_BD.norm(dim=1) + rounding_B
    rounding, off_centre = coarse.rounding_K.amax(), coarse.centre_D.norm()
    longest = coarse.length_K.amax() + rounding
    # Both factors were rounded, then their product.
    error_B = rounding_B * longest + length_B * (rounding + bfloat16.eps / 2 * longest)
    # All sums were rounded in float32: of a centred or the whole feature, with a centroid, or of its squares.
    terms = centred_BD.shape[1] + 8
    whole = longest + off_centre
    error_B += terms * float32.eps * (length_B + off_centre + whole) * whole
    return error_B + terms * float32.tiny * (1 + length_B + whole)  # some processors take the smallest numbers as zero
