"""K-Means over features that stay where they are: Lloyd's algorithm, exact, on any device and any number of ranks.

Shapes: S rows of this rank, B rows at a time, K clusters in G groups, D embedding.

Most of what Lloyd's iterations compute is known beforehand: a centroid that has hardly moved is still farther away than
the one a row belongs to. So the centroids are put into groups of neighbours, and for each row and group a lower bound
of the distance is kept, which shrinks by as much as the group's fastest centroid moves (Ding et al., "Yinyang
K-Means", ICML 2015). Only where the bound falls below the row's own distance are distances computed. No row gets
another label than it would without.
"""

import math

import torch
from torch import Tensor

from odcft import dist
from odcft.errors import OdcftError
from odcft.memory import UNIT, half_squares, to_units

ROWS = 8192  # at a time, so that only ROWS x K scores are ever in memory
BLOCK = 16384  # rows whose open groups are searched together
MOST_GROUPS = 64


def kmeans(features_SD: Tensor, k: int, seed: int, iterations: int = 20, engine: str = "torch") -> Tensor:
    """Centroids of K-Means.

    It starts from k different rows drawn by the seed. A cluster that becomes empty takes the place of the row that lies
    farthest from its centroid; none that is returned is empty, unless there are fewer than k different rows. Sums over
    members are exact (see memory.py), so any number of ranks comes to the same centroids.

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
            nearest.measure()
            _fill_empty(centroids_KD, members.counts_K, features_SD, nearest.distance_S)
        nearest.follow(centroids_KD)
        if not members.follow(nearest.label_S) and not empty:
            break  # nothing moves any more
    return centroids_KD


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
    """Sums and counts of the clusters over all ranks, following the labels."""

    def __init__(self, features_SD: Tensor, label_S: Tensor, k: int) -> None:
        self.features_SD, self.label_S = features_SD, label_S.clone()
        self.sums_KD = torch.zeros(k, features_SD.shape[1], dtype=torch.int64, device=features_SD.device)
        for start in range(0, len(features_SD), ROWS):
            rows = slice(start, start + ROWS)
            self.sums_KD.index_add_(0, label_S[rows], to_units(features_SD[rows]))
        self.counts_K = dist.all_sum(torch.bincount(label_S, minlength=k))  # of all ranks

    def follow(self, label_S: Tensor) -> int:
        """Move the rows whose label has changed; return how many on all ranks.

        Sums of whole numbers do not care how they came about.
        """
        changed_M = (label_S != self.label_S).nonzero()[:, 0]
        for row_B in changed_M.split(ROWS):
            units_BD = to_units(self.features_SD.index_select(0, row_B))
            self.sums_KD.index_add_(0, self.label_S[row_B], -units_BD).index_add_(0, label_S[row_B], units_BD)
        self.counts_K = dist.all_sum(torch.bincount(label_S, minlength=len(self.sums_KD)))
        self.label_S.copy_(label_S)
        changed = torch.tensor(len(changed_M), device=label_S.device)
        dist.all_sum_(changed)
        return int(changed)

    def means(self) -> Tensor:
        """(K, D) float32, zeros for empty clusters."""
        return dist.all_sum(self.sums_KD).float().mul_(UNIT).div_(self.counts_K.clamp(min=1).unsqueeze(1))


class _Nearest:
    """The nearest centroid of each row, following the centroids. Of scores x.c - |c|^2 / 2 the nearest's is largest."""

    def __init__(self, features_SD: Tensor, centroids_KD: Tensor) -> None:
        S, K = len(features_SD), len(centroids_KD)
        device = features_SD.device
        self.features_SD = features_SD
        self.square_S = torch.cat([rows.float().square().sum(1) for rows in features_SD.split(ROWS)])
        # Bounds and distances are compared with a margin far above the rounding of float32 scores.
        self.margin = 1e-3 * float(self.square_S.mean().sqrt()) if S else 0.0
        # G groups of P places; spare places hold no centroid (number K).
        self.G = min(MOST_GROUPS, 1 << max(0, round(math.log2(K / 32))))
        self.P = -(-K // self.G)
        self.centroid_GP = _neighbours(centroids_KD, self.G, self.P)
        self.group_K = torch.empty(K + 1, dtype=torch.int64, device=device)
        self.group_K[self.centroid_GP] = torch.arange(self.G, device=device).unsqueeze(1).expand(self.G, self.P)
        self._set(centroids_KD)

        self.label_S = torch.zeros(S, dtype=torch.int64, device=device)
        self.distance_S = torch.full((S,), torch.inf, device=device)  # to the row's own centroid; an upper bound
        self.bound_SG = torch.zeros(S, self.G, device=device)  # to all centroids of the group but the row's own
        for row_B in torch.arange(S, device=device).split(ROWS):
            self._search(row_B)

    def follow(self, centroids_KD: Tensor) -> None:
        """Search again where the centroids' movement leaves it open which is nearest."""
        moved_K = (centroids_KD - self.centroids_KD).norm(dim=1)
        self._set(centroids_KD)
        self.bound_SG -= torch.cat([moved_K, moved_K.new_zeros(1)])[self.centroid_GP].amax(1)
        self.distance_S += moved_K.index_select(0, self.label_S)
        row_M = (self.bound_SG.amin(1) < self.distance_S + self.margin).nonzero()[:, 0]
        # Rows of the same and of neighbouring clusters have the same groups open: they are searched together.
        row_M = row_M[self.group_K[self.label_S[row_M]].argsort()]
        for row_B in row_M.split(BLOCK):
            rows_BD = self.features_SD.index_select(0, row_B).float()
            own_score_B = self._own_score(row_B, rows_BD)
            distance_B = self._distance(row_B, own_score_B)
            self.distance_S[row_B] = distance_B
            open_BG = self.bound_SG.index_select(0, row_B) < (distance_B + self.margin).unsqueeze(1)
            wide_B = open_BG.float().mean(1) > 0.3  # one product with all centroids is cheaper than many small ones
            for row_W in row_B[wide_B].split(ROWS):
                self._search(row_W)
            open_BG &= ~wide_B.unsqueeze(1)
            self._search_groups(row_B, rows_BD, own_score_B, open_BG)

    def measure(self) -> None:
        """Make the distances, which may be upper bounds, exact."""
        for row_B in torch.arange(len(self.label_S), device=self.label_S.device).split(ROWS):
            own_score_B = self._own_score(row_B, self.features_SD.index_select(0, row_B).float())
            self.distance_S[row_B] = self._distance(row_B, own_score_B)

    def _set(self, centroids_KD: Tensor) -> None:
        self.centroids_KD, self.half_squares_K = centroids_KD, half_squares(centroids_KD)
        spare_1D, spare_1 = torch.zeros_like(centroids_KD[:1]), self.half_squares_K.new_full((1,), -torch.inf)
        self.by_group_GPD = torch.cat([centroids_KD, spare_1D])[self.centroid_GP]
        self.half_squares_GP = torch.cat([self.half_squares_K, spare_1])[self.centroid_GP]
        self.by_place_CD = self.by_group_GPD.transpose(0, 1).reshape(self.P * self.G, -1)

    def _distance(self, row_B: Tensor, score_B: Tensor) -> Tensor:
        return (self.square_S[row_B] - 2 * score_B).clamp_(min=0).sqrt_()

    def _own_score(self, row_B: Tensor, rows_BD: Tensor) -> Tensor:
        own_B = self.label_S.index_select(0, row_B)
        products_BD = self.centroids_KD.index_select(0, own_B).mul_(rows_BD)
        return products_BD.sum(1).add_(self.half_squares_K[own_B])

    def _search(self, row_B: Tensor) -> None:
        """Compare rows with all centroids."""
        rows_BD = self.features_SD.index_select(0, row_B).float()
        scores_BC = torch.addmm(self.half_squares_GP.T.reshape(-1), rows_BD, self.by_place_CD.T)
        score_B, column_B = scores_BC.max(1)
        self.label_S[row_B] = self.centroid_GP.T.reshape(-1)[column_B]
        self.distance_S[row_B] = self._distance(row_B, score_B)
        scores_BC.scatter_(1, column_B.unsqueeze(1), -torch.inf)  # the bounds are of the others
        others_BG = scores_BC.view(len(row_B), self.P, self.G).amax(1)
        self.bound_SG[row_B] = (self.square_S[row_B].unsqueeze(1) - 2 * others_BG).clamp_(min=0).sqrt_()

    def _search_groups(self, row_B: Tensor, rows_BD: Tensor, own_score_B: Tensor, open_BG: Tensor) -> None:
        """Compare rows with the centroids of the groups that are open for them."""
        own_B = self.label_S[row_B]
        best_score_B, best_B = own_score_B.clone(), own_B.clone()
        for g in open_BG.any(0).nonzero()[:, 0].tolist():
            some_M = open_BG[:, g].nonzero()[:, 0]
            scores_MP = torch.addmm(self.half_squares_GP[g], rows_BD.index_select(0, some_M), self.by_group_GPD[g].T)
            scores_MP.masked_fill_(self.centroid_GP[g] == own_B[some_M].unsqueeze(1), -torch.inf)
            score_M, place_M = scores_MP.max(1)
            row_M, best_score_M = row_B[some_M], best_score_B[some_M]
            self.bound_SG[:, g].index_copy_(0, row_M, self._distance(row_M, score_M))
            better_M = score_M > best_score_M
            best_score_B[some_M] = torch.where(better_M, score_M, best_score_M)
            best_B[some_M] = torch.where(better_M, self.centroid_GP[g][place_M], best_B[some_M])
        changed = (best_B != own_B).nonzero()[:, 0]
        row_M, group_M = row_B[changed], self.group_K[own_B[changed]]
        # The centroid that a row leaves is one of the others now. The one it joins stays in its group's bound, which is
        # therefore lower than need be until the group is searched again.
        self.bound_SG[row_M, group_M] = torch.minimum(self.bound_SG[row_M, group_M], self.distance_S[row_M])
        self.label_S[row_M] = best_B[changed]
        self.distance_S[row_M] = self._distance(row_M, best_score_B[changed])


def _neighbours(centroids_KD: Tensor, groups: int, places: int) -> Tensor:
    """Groups of neighbouring centroids, of the same size: cut in halves along the main direction, again and again.

    Returns:
        (groups, places) int64 numbers of centroids; K in places to spare.
    """
    K = len(centroids_KD)
    parts = [torch.arange(K, device=centroids_KD.device)]
    while len(parts) < groups:
        halves = []
        for part in parts:
            centred_MD = centroids_KD[part] - centroids_KD[part].mean(0)
            direction_D = centred_MD[centred_MD.square().sum(1).argmax()]
            for _ in range(3):
                direction_D = torch.nn.functional.normalize(centred_MD.T @ (centred_MD @ direction_D), dim=0)
            order = (centred_MD @ direction_D).argsort()
            halves += [part[order[: len(part) // 2]], part[order[len(part) // 2 :]]]
        parts = halves
    grouped = torch.full((groups, places), K, device=centroids_KD.device)
    for g, part in enumerate(parts):
        grouped[g, : len(part)] = part
    return grouped


def _start(features_SD: Tensor, k: int, seed: int) -> Tensor:
    """k different rows, chosen by their images' numbers, so that it does not matter which rank holds them."""
    count = torch.tensor([len(features_SD)], device=features_SD.device)
    dist.all_sum_(count)
    chosen_K = torch.randperm(int(count), generator=torch.Generator().manual_seed(seed))[:k].to(features_SD.device)
    centroids_KD = torch.zeros(k, features_SD.shape[1], device=features_SD.device)
    mine_K = chosen_K % dist.world_size() == dist.rank()
    centroids_KD[mine_K] = features_SD[chosen_K[mine_K] // dist.world_size()].float()
    dist.all_sum_(centroids_KD)
    return centroids_KD


def _fill_empty(centroids_KD: Tensor, counts_K: Tensor, features_SD: Tensor, distance_S: Tensor) -> None:
    """Put the centroids of empty clusters onto the rows that lie farthest from their own."""
    empty = (counts_K == 0).nonzero()[:, 0]
    far_E, row_E = distance_S.topk(min(len(empty), len(distance_S)))
    far, rows = dist.gather_rows(far_E), dist.gather_rows(features_SD[row_E].float())
    best = far.argsort(descending=True, stable=True)[: len(empty)]
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
