"""K-Means over features that stay where they are: Lloyd's algorithm, exact, on any device and any number of ranks.

Shapes: S rows of this rank, K clusters, D embedding.
"""

import torch
from torch import Tensor

from odcft import dist
from odcft.errors import OdcftError
from odcft.memory import UNIT, to_units

ROWS = 16384  # at a time, so that only ROWS x K scores are ever in memory


def kmeans(features_SD: Tensor, k: int, seed: int, iterations: int = 20, engine: str = "torch") -> Tensor:
    """Centroids of K-Means.

    It starts from k different images drawn by the seed. A cluster that becomes empty takes the place of the image that
    lies farthest from its centroid. Sums over members are exact (see memory.py), so any number of ranks comes to the
    same centroids.

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
    for _ in range(iterations):
        label_S, distance_S = assign(features_SD, centroids_KD)
        sums_KD = torch.zeros(k, features_SD.shape[1], dtype=torch.int64, device=features_SD.device)
        for start in range(0, len(features_SD), ROWS):
            rows = slice(start, start + ROWS)
            sums_KD.index_add_(0, label_S[rows], to_units(features_SD[rows]))
        counts_K = torch.bincount(label_S, minlength=k)
        dist.all_sum_(sums_KD, counts_K)
        centroids_KD = sums_KD.float().mul_(UNIT).div_(counts_K.clamp(min=1).unsqueeze(1))
        _fill_empty(centroids_KD, counts_K, features_SD, distance_S)
    return centroids_KD


def assign(features_SD: Tensor, centroids_KD: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centroid of each row, and how far it is.

    Args:
        features_SD: (S, D) float.
        centroids_KD: (K, D) float32.

    Returns:
        (S,) int64 labels and (S,) float32 squared distances.
    """
    half_squares_K = centroids_KD.square().sum(1).mul_(-0.5)
    labels, distances = [], []
    for rows_BD in features_SD.split(ROWS):
        rows_BD = rows_BD.float()
        score_B, label_B = torch.addmm(half_squares_K, rows_BD, centroids_KD.T).max(1)
        labels.append(label_B)
        distances.append((rows_BD.square().sum(1) - 2 * score_B).clamp_(min=0))
    if not labels:
        empty = features_SD.new_empty(0)
        return empty.long(), empty.float()
    return torch.cat(labels), torch.cat(distances)


def _start(features_SD: Tensor, k: int, seed: int) -> Tensor:
    """k different images, chosen by number, so that it does not matter which rank holds them."""
    count = torch.tensor([len(features_SD)], device=features_SD.device)
    dist.all_sum_(count)
    chosen_K = torch.randperm(int(count), generator=torch.Generator().manual_seed(seed))[:k].to(features_SD.device)
    centroids_KD = torch.zeros(k, features_SD.shape[1], device=features_SD.device)
    mine_K = chosen_K % dist.world_size() == dist.rank()
    centroids_KD[mine_K] = features_SD[chosen_K[mine_K] // dist.world_size()].float()
    dist.all_sum_(centroids_KD)
    return centroids_KD


def _fill_empty(centroids_KD: Tensor, counts_K: Tensor, features_SD: Tensor, distance_S: Tensor) -> None:
    empty = (counts_K == 0).nonzero()[:, 0]
    if len(empty) == 0:
        return
    far_E, row_E = distance_S.topk(min(len(empty), len(distance_S)))
    far, rows = dist.gather_rows(far_E), dist.gather_rows(features_SD[row_E].float())
    best = far.argsort(descending=True, stable=True)[: len(empty)]
    centroids_KD[empty[: len(best)]] = rows[best]


def _faiss_kmeans(features_SD: Tensor, k: int, seed: int, iterations: int) -> Tensor:
    try:
        import faiss
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
