"""K-Means over features that stay where they are: Lloyd's algorithm, on any device and any number of ranks.

Shapes: S rows of this rank, B rows at a time, K clusters, D embedding.

On a CPU, most rows need not be compared with all centroids, and coarse numbers tell which could be the nearest; see
nearest.py. Neither changes the labels that plain float32 would give. Threads take pieces of the rows as they finish,
and each operation uses one core. If each used all cores, it would wait for the one that another process keeps busy.

On an accelerator, all scores are computed in float32, for as many rows at a time as its free memory allows, and the
host reads two numbers in an iteration, however many rows there are.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from odcft.clustering.memory import UNIT, minus_half_squares
from odcft.clustering.nearest import NearestByBounds, NearestByScores
from odcft.distributed import accelerator, dist, ownership
from odcft.errors import OdcftError
from odcft.precision import exact_products

ROWS = 8192  # of which all scores are computed at a time, on a CPU, or where nothing says how much memory is free
MOST_ROWS = 65536  # on an accelerator: more would not be faster
SHARE = 8  # one eighth of the accelerator's free memory is used for scores
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
    centroids_KD = _first_centroids(features_SD, k, seed)
    if features_SD.device.type != "cpu":
        rows = _rows_at_a_time(features_SD.device, *centroids_KD.shape)
        return _lloyd(features_SD, centroids_KD, iterations, NearestByScores(features_SD, centroids_KD, rows))
    with _workers() as (run, threads):
        return _lloyd(features_SD, centroids_KD, iterations, NearestByBounds(features_SD, centroids_KD, run, threads))


def _lloyd(
    features_SD: Tensor, centroids_KD: Tensor, iterations: int, nearest: NearestByBounds | NearestByScores
) -> Tensor:
    """As `kmeans`, from the first centroids and their nearest rows."""
    for iteration in range(iterations + 10):
        counts_K = dist.all_sum(nearest.sums.counts_K)
        empty = bool((counts_K == 0).any())
        if iteration >= iterations and not empty:  # after the last iteration, go on only to fill empty clusters
            break
        sums_KD = dist.all_sum(nearest.sums.sums_KD)
        centroids_KD = sums_KD.mul_(UNIT).div_(counts_K.clamp(min=1).unsqueeze(1)).float()  # zeros for empty clusters
        del sums_KD
        if empty:
            _fill_empty(centroids_KD, counts_K, features_SD, nearest.distances())
        changed = nearest.follow(centroids_KD)
        dist.all_sum_(changed)
        if not changed and not empty:
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
    step = _rows_at_a_time(features_SD.device, *centroids_KD.shape)
    for start in range(0, len(features_SD), step):
        rows = slice(start, start + step)
        rows_BD = features_SD[rows].float()
        score_B, label_S[rows] = torch.addmm(minus_half_squares_K, rows_BD, centroids_KD.T).max(1)
        square_S[rows] = (rows_BD.square().sum(1) - 2 * score_B).clamp_(min=0)
    return label_S, square_S


@contextmanager
def _workers() -> Iterator[tuple[Callable, int]]:
    """Within this context operations use few threads; it gives a `map` that calls from several, and their number."""
    threads = torch.get_num_threads()
    workers = min(WORKERS, threads)
    if workers == 1:
        yield map, 1
        return
    torch.set_num_threads(threads // workers)
    try:
        with ThreadPoolExecutor(workers) as pool:
            yield pool.map, workers
    finally:
        torch.set_num_threads(threads)


def _rows_at_a_time(device: torch.device, k: int, dim: int) -> int:
    """Of how many rows all scores are computed at a time: their scores and units fit in a share of the free memory."""
    free = accelerator.free_memory() if device.type != "cpu" else None
    if free is None:
        return ROWS
    return max(1, min(MOST_ROWS, free // SHARE // (8 * k + 32 * dim)))


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
