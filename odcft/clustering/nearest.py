"""The nearest centroid of each row, and the sums of the clusters, as centroids move: by bounds, or by all scores.

Shapes: S rows of this rank, B rows at a time, M of them that need something, K clusters, D embedding, C some centroids,
or candidates of the B rows; G groups of P centroids each.

Both classes give the labels that plain float32 would give.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from odcft.clustering.memory import UNIT, minus_half_squares
from odcft.precision import has_bfloat16

PIECE = 4096  # rows that a thread takes at a time, at most
SCORES = 1 << 21  # computed at a time on a CPU: they should stay in the processor's cache
PART = 1024  # rows whose features are compared with centroids at a time, to stay in the cache of one core
GROUPS = 32  # of centroids, or a multiple: the search skips whole groups whose best score is too low
SHAPES = 128  # the rows of a product are a multiple of it: oneDNN compiles a product for each shape
COMPARED = (0, *(few << i for i in range(16) for few in (16, 24)))  # centroids that every row may be compared with
FIXED = 32  # a comparison takes as long as that with so many centroids more
SAMPLE = 8192  # rows, from which it is estimated how many are searched


class ClusterSums:
    """Sums and counts of the clusters' rows, none at first; updated as labels change.

    The sums are whole numbers of units in float64, which are exact below 2**53 (two million rows of unit length): the
    order in which rows are added and subtracted, and the rank that does it, make no difference.
    """

    def __init__(self, centroids_KD: Tensor) -> None:
        self.sums_KD = torch.zeros_like(centroids_KD, dtype=torch.float64)
        self.counts_K = torch.zeros(len(centroids_KD), dtype=torch.int64, device=centroids_KD.device)

    def add(self, rows_BD: Tensor, label_B: Tensor, before_B: Tensor | None = None) -> None:
        """Add rows to their clusters, and subtract them from those they were in before, if they were in any."""
        units_BD = rows_BD.double().mul_(1 / UNIT).round_()
        one_B = torch.ones_like(label_B, dtype=torch.int64)
        self.sums_KD.index_add_(0, label_B, units_BD)
        self.counts_K.index_add_(0, label_B, one_B)
        if before_B is not None:
            self.sums_KD.index_add_(0, before_B, units_BD.neg_())
            self.counts_K.index_add_(0, before_B, one_B.neg_())


class NearestByScores:
    """On an accelerator: all scores of all rows, in float32, each time.

    No shape depends on values, and no value is read, so that the host waits for nothing. The two nearest by their
    scores are compared exactly: how a product rounds, which depends on the number of rows, does not decide.
    """

    def __init__(self, features_SD: Tensor, centroids_KD: Tensor, rows: int) -> None:
        """Find the nearest centroids. rows: scored at a time."""
        self.pieces = features_SD.split(rows)
        self.label_S = torch.zeros(len(features_SD), dtype=torch.int32, device=features_SD.device)
        self.follow(centroids_KD)

    def follow(self, centroids_KD: Tensor) -> Tensor:
        """Move the centroids; return how many labels changed, on the device."""
        self.sums = ClusterSums(centroids_KD)
        labels, squares, before_S = [], [], self.label_S
        for piece_BD in self.pieces:
            rows_BD = piece_BD.float()
            label_B, square_B = self._nearest(rows_BD, centroids_KD)
            self.sums.add(rows_BD, label_B)
            labels.append(label_B.int())
            squares.append(square_B)
        self.label_S, self.square_S = torch.cat(labels), torch.cat(squares)
        return (self.label_S != before_S).sum()

    def distances(self) -> Tensor:
        """(S,) float32 to the row's own centroid."""
        return self.square_S.sqrt()

    def _nearest(self, rows_BD: Tensor, centroids_KD: Tensor) -> tuple[Tensor, Tensor]:
        scores_BK = torch.addmm(minus_half_squares(centroids_KD), rows_BD, centroids_KD.T)
        best_B1 = scores_BK.argmax(1, keepdim=True)
        second_B1 = scores_BK.scatter_(1, best_B1, -torch.inf).argmax(1, keepdim=True)
        lower_B, higher_B = torch.cat([best_B1, second_B1], 1).sort(1).values.unbind(1)
        one_B, other_B = ((centroids_KD.index_select(0, k_B) - rows_BD).square_().sum(1) for k_B in (lower_B, higher_B))
        # Where both are as near, the lower number.
        return torch.where(other_B < one_B, higher_B, lower_B), torch.minimum(one_B, other_B)


class NearestByBounds:
    """On a CPU: only rows whose label may have changed are searched, by coarse scores. `run`: like map, by threads.

    - A row keeps a lower bound of its distance to all centroids but its own. As centroids move, the bound is lowered,
      and a row is searched again only if its own centroid is not nearer than that (Hamerly, "Making k-means even
      faster", SDM 2010). The centroids that moved farthest, which would spoil the bounds of all rows, are compared with
      the rows instead; their number is chosen each time for the least work.
    - A search computes the scores x.c - |c|^2 / 2 of all centroids in bfloat16 (if the processor multiplies it fast),
      with a bound on their error. Only centroids that could be the nearest within that bound are compared in float32.
    """

    def __init__(self, features_SD: Tensor, centroids_KD: Tensor, run: Callable = map, threads: int = 1) -> None:
        """Find the nearest centroids. run: like `map`, for pieces of the rows; threads: that it uses."""
        S, D = features_SD.shape
        self.features_SD, self.dtype, self.run = features_SD, _coarse_dtype(), run
        # Shifting everything keeps the distances. Rounding errors are smallest with the centroids around zero.
        self.centre_D = centroids_KD.mean(0)
        # A copy only if it is smaller than the features.
        self.coarse_SD = torch.empty(S, D, dtype=self.dtype) if self.dtype != torch.float32 else None
        self.length_S, self.rounding_S = torch.empty(2, S)
        shares = 2 * threads if threads > 1 else 1  # so many pieces, or a multiple: threads end together
        self.pieces = _pieces(S, math.ceil(S / (shares * math.ceil(S / (shares * PIECE)))) if S else 1)
        self._each(self._round_rows)
        # Margin for comparing bounds with distances, far larger than the rounding of float32 scores.
        self.margin = 1e-3 * float(self.length_S.square().mean().sqrt())  # NaN, but unused, if a rank has no rows
        self.label_S = torch.zeros(S, dtype=torch.int32)
        self.others_S = torch.empty(S)  # a lower bound of the distance to all centroids but the row's own
        self.sums = ClusterSums(centroids_KD)
        self._set_centroids(centroids_KD)
        for rows in run(self._search_piece, self.pieces):
            self.sums.add(features_SD[rows], self.label_S[rows])

    def follow(self, centroids_KD: Tensor) -> Tensor:
        """Move the centroids, and search again for rows whose nearest may have changed; return how many changed."""
        moved_K, by_move_K = (centroids_KD - self.centroids_KD).norm(dim=1).sort(descending=True)
        self._set_centroids(centroids_KD)
        own_S = self.distances().add_(self.margin)
        fast = self._how_many_to_compare(moved_K, own_S)
        self.others_S -= moved_K[fast]
        changed = 0
        for row_M, before_M in self.run(partial(self._follow_piece, own_S, by_move_K[:fast]), self.pieces):
            changed += len(row_M)
            self.sums.add(self.features_SD.index_select(0, row_M), self.label_S[row_M], before_M)
        return torch.tensor(changed)

    def distances(self) -> Tensor:
        """(S,) float32 to the row's own centroid."""
        distance_S = torch.empty(len(self.features_SD))
        self._each(partial(self._measure, distance_S))
        return distance_S

    def _measure(self, distance_S: Tensor, rows: slice) -> None:
        own_BD = self.centroids_KD.index_select(0, self.label_S[rows])
        torch.norm(own_BD.sub_(self.features_SD[rows]), dim=1, out=distance_S[rows])

    def _each(self, work: Callable) -> None:
        for _ in self.run(work, self.pieces):
            pass

    def _set_centroids(self, centroids_KD: Tensor) -> None:
        self.centroids_KD = centroids_KD
        self.groups = GROUPS * math.ceil(math.sqrt(len(centroids_KD)) / GROUPS)
        padding = -len(centroids_KD) % self.groups  # fills the last row of groups, with scores of -inf
        coarse_KD, length_K, rounding_K = self._round(centroids_KD)
        self.coarse_CD = F.pad(coarse_KD, (0, 0, 0, padding))
        self.coarse_minus_half_squares_C = F.pad(
            minus_half_squares(centroids_KD - self.centre_D), (0, padding), value=-torch.inf
        )
        # How far a row's coarse scores can be from the true ones (Cauchy-Schwarz): rounding of both factors, of the
        # products, and of their sum. By the row's rounding, and by its length.
        relative = torch.finfo(self.dtype).eps / 2 + len(self.centre_D) * torch.finfo(torch.float32).eps
        longest = length_K.max()
        self.error_by_rounding, self.error_by_length = longest, rounding_K.max() + relative * longest

    def _round_rows(self, rows: slice) -> None:
        coarse_BD, self.length_S[rows], self.rounding_S[rows] = self._round(self.features_SD[rows].float())
        if self.coarse_SD is not None:
            self.coarse_SD[rows] = coarse_BD

    def _round(self, rows_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        centred_BD = rows_BD - self.centre_D
        coarse_BD = centred_BD.to(self.dtype)
        length_B = centred_BD.norm(dim=1)
        rounding_B = (centred_BD - coarse_BD).norm(dim=1)
        return coarse_BD, length_B + rounding_B, rounding_B  # the length is an upper bound: the rounding error is added

    def _how_many_to_compare(self, moved_K: Tensor, own_S: Tensor) -> int:
        """How many of the centroids that moved farthest are compared with every row, for the least work.

        The first of the others lowers the bounds of all rows by as much as it moved; then some rows are searched.
        """
        K, every = len(moved_K), max(1, len(own_S) // SAMPLE)
        slack_B = self.others_S[::every] - own_S[::every]
        best, least = 0, math.inf
        for count in COMPARED:
            if count == 0 or 2 * count < K:
                searched = float((slack_B < moved_K[count]).float().mean())
                work = searched + (1 - searched) * (count + FIXED * (count > 0)) / K
                if work < least:
                    best, least = count, work
        return best

    def _follow_piece(self, own_S: Tensor, fast_C: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        own_B, others_B = own_S[rows], self.others_S[rows]
        if len(fast_C):
            row_M = (others_B >= own_B).nonzero()[:, 0].add_(rows.start)
            self._in_cache(partial(self._compare_with, fast_C), row_M, len(fast_C))
        row_M = (others_B < own_B).nonzero()[:, 0].add_(rows.start)
        before_M = self.label_S[row_M]
        self._search(row_M)
        changed_C = (self.label_S[row_M] != before_M).nonzero()[:, 0]
        return row_M[changed_C], before_M[changed_C]

    def _compare_with(self, some_C: Tensor, row_B: Tensor) -> None:
        """Lower the bounds `others_S` of rows to the distances of some centroids."""
        scores_BC = self._coarse_products(row_B, self.coarse_CD[some_C]).add_(self.coarse_minus_half_squares_C[some_C])
        scores_BC.masked_fill_(self.label_S[row_B].unsqueeze(1) == some_C, -torch.inf)
        nearest_B = self._coarse_distance(row_B, scores_BC.amax(1), self._error(row_B))
        self.others_S[row_B] = torch.minimum(self.others_S[row_B], nearest_B)

    def _search_piece(self, rows: slice) -> slice:
        self._search(torch.arange(rows.start, rows.stop))
        return rows

    def _in_cache(self, work: Callable, row_M: Tensor, scores: int) -> None:
        """Take so many rows at a time that their scores, so many for each, stay in the cache."""
        for row_B in row_M.split(max(1, SCORES // scores)):
            if len(row_B):
                work(row_B)

    def _search(self, row_M: Tensor) -> None:
        """Compare rows with all centroids."""
        self._in_cache(self._search_rows, row_M, len(self.coarse_CD))

    def _search_rows(self, row_B: Tensor) -> None:
        B, G, error_B = len(row_B), self.groups, self._error(row_B)
        scores_BC = self._coarse_products(row_B, self.coarse_CD).add_(self.coarse_minus_half_squares_C)
        scores_BPG = scores_BC.view(B, -1, G)
        best_BG = scores_BPG.amax(1)
        least_B = best_BG.amax(1) - 2 * error_B
        # Candidates: first the groups that have one, then the positions within these groups.
        b_M, group_M = (best_BG >= least_B.unsqueeze(1)).nonzero().unbind(1)
        near_MP = scores_BPG[b_M, :, group_M]
        m_C, position_C = (near_MP >= least_B[b_M].unsqueeze(1)).nonzero().unbind(1)
        b_C, k_C = b_M[m_C], position_C * G + group_M[m_C]
        square_C = self._squares(b_C, row_B, k_C)
        square_B = square_C.new_full((B,), torch.inf).scatter_reduce_(0, b_C, square_C, "amin")
        nearest_C = k_C.masked_fill(square_C > square_B[b_C], len(self.coarse_CD))
        label_B = k_C.new_full((B,), len(self.coarse_CD)).scatter_reduce_(0, b_C, nearest_C, "amin")
        self.label_S[row_B] = label_B.int()
        # The best score of all other centroids; those of candidates are known exactly.
        score_C = (self._centred_square(row_B) / 2 - error_B)[b_C] - square_C / 2
        near_MP[m_C, position_C] = score_C.masked_fill_(k_C == label_B[b_C], -torch.inf)
        best_BG[b_M, group_M] = near_MP.amax(1)
        self.others_S[row_B] = self._coarse_distance(row_B, best_BG.amax(1), error_B)

    def _squares(self, b_C: Tensor, row_B: Tensor, k_C: Tensor) -> Tensor:
        """Squared distances of candidates; zero for the only candidate of a row, which is the nearest anyway."""
        square_C = torch.zeros(len(b_C))
        for part in (torch.bincount(b_C) > 1)[b_C].nonzero()[:, 0].split(PART):
            rows_BD = self.features_SD.index_select(0, row_B[b_C[part]])
            square_C[part] = self.centroids_KD.index_select(0, k_C[part]).sub_(rows_BD).square_().sum(1)
        return square_C

    def _coarse_products(self, row_B: Tensor, coarse_CD: Tensor) -> Tensor:
        """(B, C) float32."""
        padded_B = F.pad(row_B, (0, -len(row_B) % SHAPES))
        if self.coarse_SD is None:
            coarse_BD = self.features_SD.index_select(0, padded_B).float().sub_(self.centre_D)
        else:
            coarse_BD = self.coarse_SD.index_select(0, padded_B)
        return torch.mm(coarse_BD, coarse_CD.T)[: len(row_B)].float()

    def _error(self, row_B: Tensor) -> Tensor:
        """(B,) bound on the error of coarse scores."""
        return self.rounding_S[row_B] * self.error_by_rounding + self.length_S[row_B] * self.error_by_length

    def _centred_square(self, row_B: Tensor) -> Tensor:
        return (self.length_S[row_B] - self.rounding_S[row_B]).square_()

    def _coarse_distance(self, row_B: Tensor, score_B: Tensor, error_B: Tensor) -> Tensor:
        """A lower bound of the distance, from a coarse score."""
        return (self._centred_square(row_B) - 2 * (score_B + error_B)).clamp_(min=0).sqrt_()


def _pieces(S: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, S)) for start in range(0, S, rows)]


def _coarse_dtype() -> torch.dtype:
    """bfloat16 if the processor multiplies it faster than float32, else float32."""
    return torch.bfloat16 if has_bfloat16(torch.device("cpu")) else torch.float32
