"""K-Means over features that stay where they are: Lloyd's algorithm, on any device and any number of ranks.

Shapes: S rows of this rank, B rows at a time, K clusters, D embedding, C some centroids, or candidates of the B rows.

Two things make it fast, and neither changes the labels that plain float32 would give.

- Scores of all centroids are computed in bfloat16 (if the processor multiplies it fast), with a bound on the rounding
  error. Only centroids that could be the nearest within that bound are compared in float32: about two per row.
- Each row keeps an upper bound of the distance to its own centroid and a lower bound of the distance to all others. As
  centroids move, the bounds are widened, and a row is searched again only when they meet (Hamerly, "Making k-means even
  faster", SDM 2010). The few centroids that moved farthest, which would spoil the bound of all rows, are compared with
  every row instead.

On a CPU, threads take pieces of the rows as they finish, and each operation uses one core. If each used all cores, it
would wait for the one that another process keeps busy.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from odcft.clustering.memory import UNIT, minus_half_squares
from odcft.distributed import dist, ownership
from odcft.errors import OdcftError
from odcft.precision import exact_products, has_bfloat16

ROWS = 8192  # of which sums are computed at a time
SCORES = 1 << 21  # computed at a time: they should stay in the processor's cache
GROUP = 32  # centroids: the search skips whole groups whose best score is too low
FASTEST = 64  # centroids, those that moved farthest, that are compared with every row
PIECE = 2048  # rows that a thread takes at a time, unless all their scores are computed; an accelerator takes ROWS
WORKERS = 8  # threads, at most: more would wait for one another in Python; where there are more cores, they share them


@exact_products()
def kmeans(features_SD: Tensor, k: int, seed: int, iterations: int = 20, engine: str = "torch") -> Tensor:
    """Centroids of K-Means.

    It starts from k different rows, drawn with the seed. The centroid of a cluster that becomes empty moves to the row
    that is farthest from its own centroid; no cluster is empty at the end unless there are fewer than k distinct rows.
    Sums over the rows are exact, so any number of ranks gives the same centroids.

    Args:
        features_SD: (S, D) float, of this rank.
        k: clusters, at most as many as there are rows on all ranks.
        seed: for drawing the first centroids.
        iterations: of Lloyd's algorithm, at most.
        engine: "torch", described above; or "faiss", which gathers the features on rank 0 and needs faiss installed.

    Returns:
        (k, D) float32, the same on every rank.

    Raises:
        OdcftError: the engine is faiss, and faiss is not installed.
    """
    if engine == "faiss":
        return _faiss_kmeans(features_SD, k, seed, iterations)
    with _workers(features_SD.device) as run:
        return _lloyd(features_SD, k, seed, iterations, run)


def _lloyd(features_SD: Tensor, k: int, seed: int, iterations: int, run: Callable) -> Tensor:
    """As `kmeans`, by the engine "torch". run: like `map`, for pieces of the rows."""
    centroids_KD = _first_centroids(features_SD, k, seed)
    nearest = _Nearest(features_SD, centroids_KD, run)
    sums = _ClusterSums(features_SD, nearest.label_S, k)
    for iteration in range(iterations + 10):
        empty = bool((sums.counts_K == 0).any())
        if iteration >= iterations and not empty:  # after the last iteration, go on only to fill empty clusters
            break
        centroids_KD = sums.means()
        if empty:
            nearest.measure(torch.arange(len(features_SD), device=features_SD.device))
            _fill_empty(centroids_KD, sums.counts_K, features_SD, nearest.distance_S)
        nearest.follow(centroids_KD)
        if not sums.follow(nearest.label_S) and not empty:
            break  # no label changes any more
    return centroids_KD


@exact_products()
def assign(features_SD: Tensor, centroids_KD: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centroid of each row, and its squared distance.

    Args:
        features_SD: (S, D) float.
        centroids_KD: (K, D) float32.

    Returns:
        (S,) int64 labels and (S,) float32 squared distances.
    """
    minus_half_squares_K = minus_half_squares(centroids_KD)
    label_S = torch.empty(len(features_SD), dtype=torch.int64, device=features_SD.device)
    square_S = torch.empty(len(features_SD), device=features_SD.device)
    for start in range(0, len(features_SD), ROWS):
        rows = slice(start, start + ROWS)
        rows_BD = features_SD[rows].float()
        score_B, label_S[rows] = torch.addmm(minus_half_squares_K, rows_BD, centroids_KD.T).max(1)
        square_S[rows] = (rows_BD.square().sum(1) - 2 * score_B).clamp_(min=0)
    return label_S, square_S


class _ClusterSums:
    """Sums and counts of the clusters, updated as labels change.

    The sums are whole numbers of units in float64, which are exact below 2**53 (two million rows of unit length): the
    order in which rows are added and subtracted, and the rank that does it, make no difference.
    """

    def __init__(self, features_SD: Tensor, label_S: Tensor, k: int) -> None:
        self.features_SD, self.label_S = features_SD, label_S.clone()
        self.sums_KD = torch.zeros(k, features_SD.shape[1], dtype=torch.float64, device=features_SD.device)
        for start in range(0, len(features_SD), ROWS):
            rows = slice(start, start + ROWS)
            self.sums_KD.index_add_(0, label_S[rows], _whole_units(features_SD[rows]))
        self.counts_K = dist.all_sum(torch.bincount(label_S, minlength=k))  # of all ranks

    def follow(self, label_S: Tensor) -> int:
        """Move the rows whose label has changed; return their number on all ranks."""
        changed_M = (label_S != self.label_S).nonzero()[:, 0]
        for row_B in changed_M.split(ROWS):
            units_BD = _whole_units(self.features_SD.index_select(0, row_B))
            self.sums_KD.index_add_(0, label_S[row_B], units_BD)
            self.sums_KD.index_add_(0, self.label_S[row_B], units_BD.neg_())
        self.counts_K = dist.all_sum(torch.bincount(label_S, minlength=len(self.sums_KD)))
        self.label_S.copy_(label_S)
        changed = torch.tensor(len(changed_M), device=label_S.device)
        dist.all_sum_(changed)
        return int(changed)

    def means(self) -> Tensor:
        """(K, D) float32, zeros for empty clusters."""
        return dist.all_sum(self.sums_KD).mul_(UNIT).div_(self.counts_K.clamp(min=1).unsqueeze(1)).float()


def _whole_units(features: Tensor) -> Tensor:
    return features.double().mul_(1 / UNIT).round_()


class _Nearest:
    """The nearest centroid of each row, updated as centroids move. It has the largest score x.c - |c|^2 / 2."""

    def __init__(self, features_SD: Tensor, centroids_KD: Tensor, run: Callable = map) -> None:
        S, device = len(features_SD), features_SD.device
        self.features_SD, self.dtype, self.run = features_SD, _coarse_dtype(device), run
        # Shifting everything keeps the distances. Rounding errors are smallest with the centroids around zero.
        self.centre_D = centroids_KD.mean(0)
        self.coarse_SD = torch.empty(S, features_SD.shape[1], dtype=self.dtype, device=device)
        self.square_S, self.length_S, self.rounding_S = torch.empty(3, S, device=device)
        self.piece = PIECE if device.type == "cpu" else ROWS
        self.pieces = [slice(start, start + self.piece) for start in range(0, S, self.piece)]
        self._each(self._round_rows, self.pieces)
        # Margin for comparing bounds with distances, far larger than the rounding of float32 scores.
        self.margin = 1e-3 * float(self.square_S.mean().sqrt())  # NaN, but unused, if a rank has no rows
        self.label_S = torch.zeros(S, dtype=torch.int64, device=device)
        self.distance_S = torch.empty(S, device=device)  # to the row's own centroid; an upper bound
        self.others_S = torch.empty(S, device=device)  # to all other centroids; a lower bound
        self._set_centroids(centroids_KD)
        self._search(torch.arange(S, device=device))

    def follow(self, centroids_KD: Tensor) -> None:
        """Move the centroids, and search again for the rows whose nearest centroid may have changed."""
        moved_K = (centroids_KD - self.centroids_KD).norm(dim=1)
        self._set_centroids(centroids_KD)
        self.distance_S += moved_K.index_select(0, self.label_S)
        fastest = moved_K.topk(min(FASTEST + 1, len(moved_K)))
        self.others_S -= fastest.values[-1]
        if len(moved_K) > 1:
            self._each(partial(self._compare_with, fastest.indices[:-1]), self.pieces)
        row_M = (self.others_S < self.distance_S + self.margin).nonzero()[:, 0]
        self.measure(row_M)
        self._search(row_M[self.others_S[row_M] < self.distance_S[row_M] + self.margin])

    def measure(self, row_M: Tensor) -> None:
        """Compute the exact distances of these rows, for which only upper bounds may be known."""
        self._each(self._measure, row_M.split(self.piece))

    def _measure(self, row_B: Tensor) -> None:
        self.distance_S[row_B] = self._distance(row_B, self._score(row_B, self.label_S[row_B]))

    def _each(self, work: Callable, pieces: Iterable) -> None:
        for _ in self.run(work, pieces):
            pass

    def _set_centroids(self, centroids_KD: Tensor) -> None:
        self.centroids_KD, self.minus_half_squares_K = centroids_KD, minus_half_squares(centroids_KD)
        padding = -len(centroids_KD) % GROUP  # fills the last group, with scores of -inf
        coarse_KD, length_K, rounding_K = self._round(centroids_KD)
        self.coarse_CD = F.pad(coarse_KD, (0, 0, 0, padding))
        self.coarse_minus_half_squares_C = F.pad(
            minus_half_squares(centroids_KD - self.centre_D), (0, padding), value=-torch.inf
        )
        # How far a row's coarse scores can be from the true ones (Cauchy-Schwarz): rounding of both factors, of the
        # products, and of their sum.
        relative = torch.finfo(self.dtype).eps / 2 + len(self.centre_D) * torch.finfo(torch.float32).eps
        longest = length_K.max()
        self.error_S = self.rounding_S * longest + self.length_S * (rounding_K.max() + relative * longest)

    def _round_rows(self, rows: slice) -> None:
        rows_BD = self.features_SD[rows].float()
        self.square_S[rows] = rows_BD.square().sum(1)
        self.coarse_SD[rows], self.length_S[rows], self.rounding_S[rows] = self._round(rows_BD)

    def _round(self, rows_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        centred_BD = rows_BD - self.centre_D
        coarse_BD = centred_BD.to(self.dtype)
        # The length is an upper bound: the rounding error is added.
        rounding_B = (centred_BD - coarse_BD.float()).norm(dim=1)
        return coarse_BD, centred_BD.norm(dim=1) + rounding_B, rounding_B

    def _score(self, row_B: Tensor, k_B: Tensor) -> Tensor:
        products_BD = self.centroids_KD.index_select(0, k_B).mul_(self.features_SD.index_select(0, row_B))
        return products_BD.sum(1).add_(self.minus_half_squares_K[k_B])

    def _distance(self, row_B: Tensor, score_B: Tensor) -> Tensor:
        return (self.square_S[row_B] - 2 * score_B).clamp_(min=0).sqrt_()

    def _compare_with(self, some_K: Tensor, rows: slice) -> None:
        """Lower the bounds `others_S` of rows to the distances of some centroids."""
        coarse_CD, minus_half_squares_C = self.coarse_CD[some_K], self.coarse_minus_half_squares_C[some_K]
        scores_BC = torch.mm(self.coarse_SD[rows], coarse_CD.T).float().add_(minus_half_squares_C)
        scores_BC.masked_fill_(self.label_S[rows].unsqueeze(1) == some_K, -torch.inf)
        nearest_B = self._coarse_distance(rows, scores_BC.amax(1))
        self.others_S[rows] = torch.minimum(self.others_S[rows], nearest_B)

    def _search(self, row_S: Tensor) -> None:
        """Compare rows with all centroids."""
        self._each(self._search_rows, row_S.split(max(1, SCORES // len(self.coarse_CD))))

    def _search_rows(self, row_B: Tensor) -> None:
        B, padded_K = len(row_B), len(self.coarse_CD)
        error_B = self.error_S[row_B]
        scores_BC = torch.mm(self.coarse_SD.index_select(0, row_B), self.coarse_CD.T).float()
        scores_BGP = scores_BC.add_(self.coarse_minus_half_squares_C).view(B, padded_K // GROUP, GROUP)
        best_BG = scores_BGP.amax(2)
        least_B = best_BG.amax(1) - 2 * error_B
        # Candidates: first the groups that have one, then the positions within these groups.
        b_M, group_M = (best_BG >= least_B.unsqueeze(1)).nonzero().unbind(1)
        near_MP = scores_BGP.view(-1, GROUP).index_select(0, b_M * best_BG.shape[1] + group_M)
        m_C, position_C = (near_MP >= least_B[b_M].unsqueeze(1)).nonzero().unbind(1)
        b_C, k_C = b_M[m_C], group_M[m_C] * GROUP + position_C
        score_C = self._score(row_B[b_C], k_C)
        score_B = score_C.new_full((B,), -torch.inf).scatter_reduce_(0, b_C, score_C, "amax")
        k_C.masked_fill_(score_C < score_B[b_C], padded_K)
        label_B = k_C.new_full((B,), padded_K).scatter_reduce_(0, b_C, k_C, "amin")
        self.label_S[row_B] = label_B
        self.distance_S[row_B] = self._distance(row_B, score_B)
        # The best score of all other centroids.
        scores_BC.scatter_(1, label_B.unsqueeze(1), -torch.inf)
        own_B = label_B // GROUP
        first_B = torch.arange(B, device=own_B.device) * best_BG.shape[1]
        own_BP = scores_BGP.view(-1, GROUP).index_select(0, first_B + own_B)
        best_BG.scatter_(1, own_B.unsqueeze(1), own_BP.amax(1, keepdim=True))
        self.others_S[row_B] = self._coarse_distance(row_B, best_BG.amax(1))

    def _coarse_distance(self, row_B: Tensor | slice, score_B: Tensor) -> Tensor:
        """A lower bound of the distance, from a coarse score."""
        centred_square_B = (self.length_S[row_B] - self.rounding_S[row_B]).square()
        return (centred_square_B - 2 * (score_B + self.error_S[row_B])).clamp_(min=0).sqrt_()


@contextmanager
def _workers(device: torch.device) -> Iterator[Callable]:
    """Within this context operations use few threads; it gives a `map` that calls from several."""
    threads = torch.get_num_threads()
    workers = min(WORKERS, threads) if device.type == "cpu" else 1
    if workers == 1:
        yield map
        return
    torch.set_num_threads(threads // workers)
    try:
        with ThreadPoolExecutor(workers) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)


def _coarse_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 if the device multiplies it faster than float32, else float32."""
    return torch.bfloat16 if has_bfloat16(device) else torch.float32


def _first_centroids(features_SD: Tensor, k: int, seed: int) -> Tensor:
    """k different rows, drawn by image number, so that the choice does not depend on which rank holds them."""
    count = torch.tensor([len(features_SD)], device=features_SD.device)
    dist.all_sum_(count)
    chosen_K = torch.randperm(int(count), generator=torch.Generator().manual_seed(seed))[:k].to(features_SD.device)
    centroids_KD = torch.zeros(k, features_SD.shape[1], device=features_SD.device)
    mine_K = ownership.is_mine(chosen_K)
    centroids_KD[mine_K] = features_SD[ownership.row_of(chosen_K[mine_K])].float()
    dist.all_sum_(centroids_KD)
    return centroids_KD


def _fill_empty(centroids_KD: Tensor, counts_K: Tensor, features_SD: Tensor, distance_S: Tensor) -> None:
    """Move the centroids of empty clusters to the rows farthest from their own centroids (ties: the lower image)."""
    empty = (counts_K == 0).nonzero()[:, 0]
    row_E = distance_S.argsort(descending=True, stable=True)[: len(empty)]
    image_E = ownership.image_of(row_E)
    far, images = dist.gather_rows(distance_S[row_E]), dist.gather_rows(image_E)
    rows = dist.gather_rows(features_SD[row_E].float())
    by_image = images.argsort()
    best = by_image[far[by_image].argsort(descending=True, stable=True)][: len(empty)]
    centroids_KD[empty[: len(best)]] = rows[best]


def _faiss_kmeans(features_SD: Tensor, k: int, seed: int, iterations: int) -> Tensor:
    """K-Means by faiss: on rank 0, from the features of all ranks."""
    try:
        import faiss  # noqa: TID251 - the only import of faiss
    except ImportError:
        raise OdcftError(
            "kmeans.engine=faiss needs faiss: pip install faiss-cpu. Or leave the engine at auto."
        ) from None
    everything = dist.gather_rows(features_SD.float())
    centroids_KD = torch.zeros(k, features_SD.shape[1], device=features_SD.device)
    if dist.rank() == 0:
        clustering = faiss.Kmeans(
            features_SD.shape[1],
            k,
            niter=iterations,
            seed=seed,
            max_points_per_centroid=2**31 - 1,
            min_points_per_centroid=1,
            gpu=hasattr(faiss, "StandardGpuResources") and features_SD.device.type == "cuda",
        )
        clustering.train(everything.cpu().numpy())
        centroids_KD.copy_(torch.from_numpy(clustering.centroids))
    dist.wait_for_all()
    dist.broadcast_(centroids_KD)
    return centroids_KD
