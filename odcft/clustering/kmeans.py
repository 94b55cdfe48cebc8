"""K-Means over features that stay where they are: Lloyd's algorithm, on any device and any number of ranks.

Shapes: S rows of this rank, B rows at a time, K clusters, D embedding, C candidates.

Two things make it fast, and neither gives a row another label than plain float32 would.

- Scores of all centroids are computed in bfloat16 (where the processor multiplies it), with a bound of what rounding
  can have changed. Only centroids that could be the nearest within that bound are compared in float32: about two a row.
- For each row an upper bound of the distance to its centroid and a lower bound of the distance to all others are
  kept; as centroids move, so do the bounds, and only where they meet is a row searched again (Hamerly, "Making k-means
  even faster", SDM 2010). The few fastest centroids, which would spoil the bound for all rows, are compared anew with
  every row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from odcft.clustering.memory import UNIT, half_squares
from odcft.distributed import dist, ownership
from odcft.errors import OdcftError
from odcft.precision import exact_products, has_bfloat16

ROWS = 8192  # at a time, in passes over all rows
SCORES = 1 << 21  # at a time: they should stay in the processor's cache
PLACES = 32  # centroids whose scores are looked through together
FASTEST = 64


@exact_products()
def kmeans(features_SD: Tensor, k: int, seed: int, iterations: int = 20, engine: str = "torch") -> Tensor:
    """Centroids of K-Means.

    It starts from k different rows drawn by the seed. A cluster that becomes empty takes the place of the row that lies
    farthest from its centroid; none that is returned is empty, unless there are fewer than k different rows. Sums over
    members are exact, so any number of ranks comes to the same centroids.

    Args:
        features_SD: (S, D) float, this rank's rows.
        k: clusters; all ranks together have as many rows or more.
        seed: of the start.
        iterations: of Lloyd.
        engine: "torch", described above; or "faiss", which gathers the features on rank 0 and needs faiss installed.

    Returns:
        (k, D) float32, the same on every rank.

    Raises:
        OdcftError: faiss is asked for and not installed.
    """
    if engine == "faiss":
        return _faiss_kmeans(features_SD, k, seed, iterations)
    centroids_KD = _start(features_SD, k, seed)
    nearest = _Nearest(features_SD, centroids_KD)
    members = _Members(features_SD, nearest.label_S, k)
    for iteration in range(iterations + 10):
        empty = bool((members.counts_K == 0).any())
        if iteration >= iterations and not empty:  # past the last iteration, only to fill what is still empty
            break
        centroids_KD = members.means()
        if empty:
            nearest.measure(torch.arange(len(features_SD), device=features_SD.device))
            _fill_empty(centroids_KD, members.counts_K, features_SD, nearest.distance_S)
        nearest.follow(centroids_KD)
        if not members.follow(nearest.label_S) and not empty:
            break  # nothing moves any more
    return centroids_KD


@exact_products()
def assign(features_SD: Tensor, centroids_KD: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centroid of each row, and how far it is.

    Args:
        features_SD: (S, D) float.
        centroids_KD: (K, D) float32.

    Returns:
        (S,) int64 labels and (S,) float32 squared distances.
    """
    half_squares_K = half_squares(centroids_KD)
    label_S = torch.empty(len(features_SD), dtype=torch.int64, device=features_SD.device)
    square_S = torch.empty(len(features_SD), device=features_SD.device)
    for start in range(0, len(features_SD), ROWS):
        rows = slice(start, start + ROWS)
        rows_BD = features_SD[rows].float()
        score_B, label_S[rows] = torch.addmm(half_squares_K, rows_BD, centroids_KD.T).max(1)
        square_S[rows] = (rows_BD.square().sum(1) - 2 * score_B).clamp_(min=0)
    return label_S, square_S


class _Members:
    """Sums and counts of the clusters over all ranks, following the labels.

    The sums are whole numbers of units in float64, and exact as long as they stay below 2**53 (two million members of
    unit length): it does not matter in which order, or on which rank, rows are added and taken away.
    """

    def __init__(self, features_SD: Tensor, label_S: Tensor, k: int) -> None:
        self.features_SD, self.label_S = features_SD, label_S.clone()
        self.sums_KD = torch.zeros(k, features_SD.shape[1], dtype=torch.float64, device=features_SD.device)
        for start in range(0, len(features_SD), ROWS):
            rows = slice(start, start + ROWS)
            self.sums_KD.index_add_(0, label_S[rows], _whole_units(features_SD[rows]))
        self.counts_K = dist.all_sum(torch.bincount(label_S, minlength=k))  # of all ranks

    def follow(self, label_S: Tensor) -> int:
        """Move the rows whose label has changed; return how many on all ranks."""
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
    """The nearest centroid of each row, following the centroids. Of scores x.c - |c|^2 / 2 the nearest's is largest."""

    def __init__(self, features_SD: Tensor, centroids_KD: Tensor) -> None:
        S, device = len(features_SD), features_SD.device
        self.features_SD, self.dtype = features_SD, _coarse_dtype(device)
        # Distances stay when everything is moved so that the centroids are around zero, and rounding hurts least there.
        self.centre_D = centroids_KD.mean(0)
        self.coarse_SD = torch.empty(S, features_SD.shape[1], dtype=self.dtype, device=device)
        self.square_S, self.length_S, self.rounding_S = torch.empty(3, S, device=device)
        for start in range(0, S, ROWS):
            rows = slice(start, start + ROWS)
            rows_BD = features_SD[rows].float()
            self.square_S[rows] = rows_BD.square().sum(1)
            self.coarse_SD[rows], self.length_S[rows], self.rounding_S[rows] = self._round(rows_BD)
        # Bounds and distances are compared with a margin far above the rounding of float32 scores.
        self.margin = 1e-3 * float(self.square_S.mean().sqrt())  # NaN, and needed nowhere, where a rank has no rows
        self.label_S = torch.zeros(S, dtype=torch.int64, device=device)
        self.distance_S = torch.empty(S, device=device)  # to the row's own centroid; an upper bound
        self.others_S = torch.empty(S, device=device)  # to all other centroids; a lower bound
        self._set(centroids_KD)
        self._search(torch.arange(S, device=device))

    def follow(self, centroids_KD: Tensor) -> None:
        """Search again where the centroids' movement leaves it open which is nearest."""
        moved_K = (centroids_KD - self.centroids_KD).norm(dim=1)
        self._set(centroids_KD)
        self.distance_S += moved_K.index_select(0, self.label_S)
        fastest = moved_K.topk(min(FASTEST + 1, len(moved_K)))
        self.others_S -= fastest.values[-1]
        if len(moved_K) > 1:
            self._compare_with(fastest.indices[:-1])
        row_M = (self.others_S < self.distance_S + self.margin).nonzero()[:, 0]
        self.measure(row_M)
        self._search(row_M[self.others_S[row_M] < self.distance_S[row_M] + self.margin])

    def measure(self, row_M: Tensor) -> None:
        """Make the distances of these rows, which may be upper bounds, exact."""
        for row_B in row_M.split(ROWS):
            self.distance_S[row_B] = self._distance(row_B, self._score(row_B, self.label_S[row_B]))

    def _set(self, centroids_KD: Tensor) -> None:
        self.centroids_KD, self.half_squares_K = centroids_KD, half_squares(centroids_KD)
        spare = -len(centroids_KD) % PLACES  # places without a centroid, whose scores are -inf
        coarse_KD, length_K, rounding_K = self._round(centroids_KD)
        self.coarse_CD = F.pad(coarse_KD, (0, 0, 0, spare))
        self.coarse_half_squares_C = F.pad(half_squares(centroids_KD - self.centre_D), (0, spare), value=-torch.inf)
        # How far coarse scores of a row can be from true ones (Cauchy-Schwarz): rounding of either factor, of the
        # product, and of its sum.
        last_place = torch.finfo(self.dtype).eps / 2 + len(self.centre_D) * torch.finfo(torch.float32).eps
        longest = length_K.max()
        self.error_S = self.rounding_S * longest + self.length_S * (rounding_K.max() + last_place * longest)

    def _round(self, rows_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        centred_BD = rows_BD - self.centre_D
        coarse_BD = centred_BD.to(self.dtype)
        # Lengths a little too long rather than too short: the rounding of either is in them.
        rounding_B = (centred_BD - coarse_BD.float()).norm(dim=1)
        return coarse_BD, centred_BD.norm(dim=1) + rounding_B, rounding_B

    def _score(self, row_B: Tensor, k_B: Tensor) -> Tensor:
        products_BD = self.centroids_KD.index_select(0, k_B).mul_(self.features_SD.index_select(0, row_B))
        return products_BD.sum(1).add_(self.half_squares_K[k_B])

    def _distance(self, row_B: Tensor, score_B: Tensor) -> Tensor:
        return (self.square_S[row_B] - 2 * score_B).clamp_(min=0).sqrt_()

    def _compare_with(self, some_K: Tensor) -> None:
        """Lower the bounds of all rows to what some centroids require."""
        coarse_CD, half_squares_C = self.coarse_CD[some_K], self.coarse_half_squares_C[some_K]
        for start in range(0, len(self.label_S), ROWS):
            rows = slice(start, start + ROWS)
            scores_BC = torch.mm(self.coarse_SD[rows], coarse_CD.T).float().add_(half_squares_C)
            scores_BC.masked_fill_(self.label_S[rows].unsqueeze(1) == some_K, -torch.inf)
            nearest_B = self._coarse_distance(rows, scores_BC.amax(1))
            self.others_S[rows] = torch.minimum(self.others_S[rows], nearest_B)

    def _search(self, row_S: Tensor) -> None:
        """Compare rows with all centroids."""
        places = len(self.coarse_CD)
        for row_B in row_S.split(max(1, SCORES // places)):
            B = len(row_B)
            error_B = self.error_S[row_B]
            scores_BC = torch.mm(self.coarse_SD.index_select(0, row_B), self.coarse_CD.T).float()
            scores_BGP = scores_BC.add_(self.coarse_half_squares_C).view(B, places // PLACES, PLACES)
            best_BG = scores_BGP.amax(2)
            least_B = best_BG.amax(1) - 2 * error_B
            # Candidates: first the groups of places that hold one, then the places.
            b_M, group_M = (best_BG >= least_B.unsqueeze(1)).nonzero().unbind(1)
            near_MP = scores_BGP.view(-1, PLACES).index_select(0, b_M * best_BG.shape[1] + group_M)
            m_C, place_C = (near_MP >= least_B[b_M].unsqueeze(1)).nonzero().unbind(1)
            b_C, k_C = b_M[m_C], group_M[m_C] * PLACES + place_C
            score_C = self._score(row_B[b_C], k_C)
            score_B = score_C.new_full((B,), -torch.inf).scatter_reduce_(0, b_C, score_C, "amax")
            k_C.masked_fill_(score_C < score_B[b_C], places)
            label_B = k_C.new_full((B,), places).scatter_reduce_(0, b_C, k_C, "amin")
            self.label_S[row_B] = label_B
            self.distance_S[row_B] = self._distance(row_B, score_B)
            # The best of the others.
            scores_BC.scatter_(1, label_B.unsqueeze(1), -torch.inf)
            own_B = label_B // PLACES
            first_B = torch.arange(B, device=own_B.device) * best_BG.shape[1]
            own_BP = scores_BGP.view(-1, PLACES).index_select(0, first_B + own_B)
            best_BG.scatter_(1, own_B.unsqueeze(1), own_BP.amax(1, keepdim=True))
            self.others_S[row_B] = self._coarse_distance(row_B, best_BG.amax(1))

    def _coarse_distance(self, row_B: Tensor | slice, score_B: Tensor) -> Tensor:
        """A lower bound of the distance, from a coarse score."""
        centred_square_B = (self.length_S[row_B] - self.rounding_S[row_B]).square()
        return (centred_square_B - 2 * (score_B + self.error_S[row_B])).clamp_(min=0).sqrt_()


def _coarse_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where it is faster than float32 to multiply."""
    return torch.bfloat16 if has_bfloat16(device) else torch.float32


def _start(features_SD: Tensor, k: int, seed: int) -> Tensor:
    """k different rows, chosen by their images' numbers, so that it does not matter which rank holds them."""
    count = torch.tensor([len(features_SD)], device=features_SD.device)
    dist.all_sum_(count)
    chosen_K = torch.randperm(int(count), generator=torch.Generator().manual_seed(seed))[:k].to(features_SD.device)
    centroids_KD = torch.zeros(k, features_SD.shape[1], device=features_SD.device)
    mine_K = ownership.is_mine(chosen_K)
    centroids_KD[mine_K] = features_SD[ownership.row_of(chosen_K[mine_K])].float()
    dist.all_sum_(centroids_KD)
    return centroids_KD


def _fill_empty(centroids_KD: Tensor, counts_K: Tensor, features_SD: Tensor, distance_S: Tensor) -> None:
    """Put the centroids of empty clusters onto the rows that lie farthest from their own; of equally far, the first."""
    empty = (counts_K == 0).nonzero()[:, 0]
    row_E = distance_S.argsort(descending=True, stable=True)[: len(empty)]
    image_E = ownership.image_of(row_E)
    far, images = dist.gather_rows(distance_S[row_E]), dist.gather_rows(image_E)
    rows = dist.gather_rows(features_SD[row_E].float())
    by_image = images.argsort()
    best = by_image[far[by_image].argsort(descending=True, stable=True)][: len(empty)]
    centroids_KD[empty[: len(best)]] = rows[best]


def _faiss_kmeans(features_SD: Tensor, k: int, seed: int, iterations: int) -> Tensor:
    try:
        import faiss  # noqa: TID251 - this is the one place
    except ImportError:
        raise OdcftError(
            "kmeans.engine=faiss needs faiss: pip install faiss-cpu. Or leave the engine at auto."
        ) from None
    everything = dist.gather_rows(features_SD.float())
    centroids_KD = torch.zeros(k, features_SD.shape[1], device=features_SD.device)
    if dist.rank() == 0:
        machine = faiss.Kmeans(
            features_SD.shape[1],
            k,
            niter=iterations,
            seed=seed,
            max_points_per_centroid=2**31 - 1,
            min_points_per_centroid=1,
            gpu=hasattr(faiss, "StandardGpuResources") and features_SD.device.type == "cuda",
        )
        machine.train(everything.cpu().numpy())
        centroids_KD.copy_(torch.from_numpy(machine.centroids))
    dist.broadcast_(centroids_KD)
    return centroids_KD
