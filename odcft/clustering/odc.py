"""Online Deep Clustering (Zhan et al., CVPR 2020, sec. 3): labels and network evolve together.

Shapes as in memory.py: N images, S of them on this rank, B batch, K clusters, D embedding.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odcft import seeds
from odcft.clustering import memory
from odcft.clustering.memory import VARIANTS, Memory, Rules
from odcft.clustering.small_clusters import SmallClusterWatch, handle_small_clusters
from odcft.distributed import dist
from odcft.model import make_neck
from odcft.precision import exact_products
from odcft.recipe import Recipe


@dataclass
class State:
    """What ODC carries from step to step."""

    memory: Memory
    rules: Rules
    momentum: float  # m of eq. 2
    centroid_interval: int  # k of sec. 3.1: steps between two refreshes of the centroids
    min_cluster: int  # sec. 3.2, in images
    reweight: bool
    seed: int
    watch: SmallClusterWatch = field(default_factory=SmallClusterWatch)


def neck(width: int, recipe: Recipe) -> tuple[nn.Module, int]:
    """{fc-bn-relu-dropout-fc-relu}, and the length D of what it gives."""
    return make_neck(width, recipe.neck), recipe.neck.dim


def compact(features_SD: Tensor, recipe: Recipe) -> Tensor:
    """What K-Means sees: features of unit length, (S, D); in place, for there may be no room for two."""
    return F.normalize(features_SD, dim=1, eps=1e-10, out=features_SD)


def start(features_SD: Tensor, labels_S: Tensor, recipe: Recipe) -> State:
    """Both memories, from the features of this rank's images and their K-Means labels.

    Args:
        features_SD: (S, D) float; the memory takes it over.
        labels_S: (S,) integers in 0..K-1.
        recipe: resolved; the seed is that of the random halves.

    Returns:
        The state; its centroids are the means of the normalised features.
    """
    ours = recipe.memory
    assert isinstance(ours.clusters, int)
    dtype = {"float16": torch.float16, "float32": torch.float32}[ours.dtype]
    state = State(
        memory.new_memory(features_SD, labels_S, ours.clusters, dtype),
        VARIANTS[ours.variant],
        ours.momentum,
        ours.centroid_interval,
        ours.min_cluster,
        ours.reweight,
        recipe.seed,
    )
    state.memory.sizes_K = dist.all_sum(state.memory.counts_K)
    refresh_centroids(state)
    return state


def stored(state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a snapshot keeps.

    Args:
        state: only read.

    Returns:
        By name: rows of this rank's images, (S, ...) each; and what is the same on every rank.
    """
    kept = state.memory
    pending = state.watch.late.pending()
    same = {"centroids": kept.centroids_KD} | ({} if pending is None else {"small_pending": pending})
    return {"features": kept.features_SD, "labels": kept.labels_S}, same


def restore(state: State, rows: dict[str, Tensor], same: dict[str, Tensor]) -> None:
    """Put back what was `stored`; sums and counts follow from it, exactly.

    Args:
        state: as `start` makes it; changed in place.
        rows: this rank's.
        same: the same on every rank.
    """
    state.memory = restored(state.memory, rows, same)
    if "small_pending" in same and state.memory.labels_S.device.type != "cpu":
        state.watch.late.put_back(same["small_pending"])


def restored(old: Memory, rows: dict[str, Tensor], same: dict[str, Tensor]) -> Memory:
    """The memory that was `stored`, with dtype and device of `old`."""
    device, dtype = old.features_SD.device, old.features_SD.dtype
    features_SD, labels_S = rows["features"].to(device), rows["labels"].to(device)
    centroids_KD = same["centroids"].to(device)
    new = memory.new_memory(features_SD, labels_S, len(centroids_KD), dtype, normalise=False)
    new.sizes_K = dist.all_sum(new.counts_K)
    new.centroids_KD = centroids_KD
    new.half_squares_K = memory.half_squares(centroids_KD)
    return new


def begin_epoch(state: State, epoch: int, embed: Callable[[], Tensor]) -> bool:
    """Labels evolve steadily: no epoch begins anew."""
    return False


def draw(state: State, generator: torch.Generator) -> Tensor:
    """The order of an epoch: (S,) int64 rows of this rank, each image once."""
    return torch.randperm(len(state.memory.labels_S), generator=generator)


def targets(state: State, row_B: Tensor) -> tuple[Tensor, Tensor]:
    """Step 2 of an iteration: read the batch's labels, and the weights of all clusters.

    Args:
        state: only read.
        row_B: (B,) int64, rows of this rank.

    Returns:
        (B,) int64 labels and (K,) float32 weights, for a weighted mean of the cross-entropy.
    """
    weight_K = memory.loss_weights(state.memory.sizes_K, state.rules)
    label_B = state.memory.labels_S.index_select(0, row_B).long()
    return label_B, weight_K if state.reweight else torch.ones_like(weight_K)


@exact_products()
def update(state: State, row_B: Tensor, features_BD: Tensor, step: int) -> dict[str, Tensor]:
    """Steps 3 and 4 of an iteration: the samples memory, then the centroids memory, then the small clusters.

    Args:
        state: changed in place.
        row_B: (B,) int64, rows of this rank.
        features_BD: (B, D) from the step's own forward pass, as they leave the neck.
        step: counted from 0.

    Returns:
        `change_ratio`: the share of this rank's batch that changed its label (fig. 5), a tensor on the device.
    """
    moved_B = memory.update_samples(state.memory, row_B, features_BD, state.momentum, state.rules)
    state.memory.sizes_K = dist.all_sum(state.memory.counts_K)
    if (step + 1) % state.centroid_interval == 0:
        refresh_centroids(state)
    if state.watch.any_small(state.memory.sizes_K, state.min_cluster, state.rules):
        generator = seeds.generator(state.seed, "small clusters", step)
        handle_small_clusters(state.memory, state.min_cluster, state.rules, generator)
    return {"change_ratio": moved_B.float().mean()}


def refresh_centroids(state: State) -> None:
    """Every centroid becomes the mean of its members over all ranks (the K x D sums travel)."""
    memory.set_centroids(state.memory, dist.all_sum(state.memory.sums_KD))
