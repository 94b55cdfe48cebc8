"""DeepCluster (Caron et al., ECCV 2018; here as Zhan et al., sec. 3.1, compare with it): labels from K-Means over the
whole set, again at the start of every epoch, a classifier that starts anew each time, labels that stand still between.

Shapes: N images, S of them on this rank, B batch, K clusters, F backbone, D what is left of it for K-Means.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odcft import seeds
from odcft.clustering import memory, odc
from odcft.clustering.kmeans import assign, kmeans
from odcft.clustering.memory import VARIANTS, Memory
from odcft.clustering.pca_whitening import whiten
from odcft.clustering.small_clusters import handle_small_clusters
from odcft.distributed import dist
from odcft.precision import exact_products
from odcft.recipe import Recipe


@dataclass
class State:
    """What DC carries from step to step: features, labels and centroids of the last K-Means."""

    memory: Memory
    recipe: Recipe


def neck(width: int, recipe: Recipe) -> tuple[nn.Module, int]:
    """None: the classifier stands on the backbone's features. Returns the module and the length of what it gives."""
    return nn.Identity(), width


def compact(features_SF: Tensor, recipe: Recipe) -> Tensor:
    """What K-Means sees: PCA, whitening, unit length.

    Args:
        features_SF: (S, F) float, this rank's.
        recipe: `dc.pca` components are kept, fewer where there are not as many.

    Returns:
        (S, D) float32.
    """
    return F.normalize(whiten(features_SF, recipe.dc.pca), dim=1, eps=1e-10)


@exact_products()
def start(features_SD: Tensor, labels_S: Tensor, recipe: Recipe, epoch: int = 0) -> State:
    """The state after a K-Means. A cluster that is empty takes half of the largest.

    Args:
        features_SD: (S, D) float, compact; the state takes them over.
        labels_S: (S,) integers in 0..K-1.
        recipe: resolved.
        epoch: before which the K-Means was.
    """
    dtype = {"float16": torch.float16, "float32": torch.float32}[recipe.memory.dtype]
    K = recipe.memory.clusters
    assert isinstance(K, int)
    state = State(memory.new_memory(features_SD, labels_S, K, dtype), recipe)
    state.memory.sizes_K = dist.all_sum(state.memory.counts_K)
    memory.set_centroids(state.memory, dist.all_sum(state.memory.sums_KD))
    generator = seeds.generator(recipe.seed, "empty clusters", epoch)
    handle_small_clusters(state.memory, 0, VARIANTS["paper"], generator)
    return state


def stored(state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a snapshot keeps: rows of this rank's images, and what is the same on every rank."""
    kept = state.memory
    return {"features": kept.features_SD, "labels": kept.labels_S}, {"centroids": kept.centroids_KD}


def restore(state: State, rows: dict[str, Tensor], same: dict[str, Tensor]) -> None:
    """Put back what was `stored`, in place."""
    state.memory = odc.restored(state.memory, rows, same)


def begin_epoch(state: State, epoch: int, embed: Callable[[], Tensor]) -> bool:
    """Cluster anew, every `dc.interval` epochs; the first time was before training.

    Args:
        state: changed in place.
        epoch: counted from 0.
        embed: gives the backbone features (S, F) of this rank's images, without augmentation, in evaluation mode.

    Returns:
        Whether labels are new, and mean nothing to the old classifier.
    """
    recipe = state.recipe
    if epoch == 0 or epoch % recipe.dc.interval:
        return False
    features_SD = compact(embed(), recipe)
    K = recipe.memory.clusters
    assert isinstance(K, int)
    seed = seeds.seed(recipe.seed, "kmeans", epoch)
    centroids_KD = kmeans(features_SD, K, seed, recipe.kmeans.iterations, recipe.kmeans.engine)
    state.memory = start(features_SD, assign(features_SD, centroids_KD)[0], recipe, epoch).memory
    return True


def draw(state: State, generator: torch.Generator) -> Tensor:
    """The order of an epoch: uniform over clusters, or each image once where the loss is re-weighted instead.

    Clusters come equally often, to within one image on a rank; in a large one not every image has its turn, in a small
    one some have several.

    Args:
        state: only read.
        generator: on the CPU.

    Returns:
        (S,) int64 rows of this rank.
    """
    S = len(state.memory.labels_S)
    shuffled_S = torch.randperm(S, generator=generator)
    if state.recipe.dc.balance == "reweighting":
        return shuffled_S
    labels_S = state.memory.labels_S.cpu().long()
    by_cluster_S = shuffled_S[labels_S[shuffled_S].argsort(stable=True)]
    share_S = state.memory.sizes_K.cpu().double().reciprocal()[labels_S[by_cluster_S]]
    # S points at equal distances along the clusters laid end to end, each as long as its share of this rank.
    points_S = (torch.arange(S, dtype=torch.float64) + torch.rand((), generator=generator)) / S * share_S.sum()
    drawn_S = by_cluster_S[torch.searchsorted(share_S.cumsum(0), points_S).clamp(max=S - 1)]
    return drawn_S[torch.randperm(S, generator=generator)]


def targets(state: State, row_B: Tensor) -> tuple[Tensor, Tensor]:
    """The batch's labels, and the weights of all clusters.

    Args:
        state: only read.
        row_B: (B,) int64, rows of this rank.

    Returns:
        (B,) int64 labels and (K,) float32 weights: 1 / sqrt(N_c) (sec. 3.2), or all the same where clusters are drawn
        uniformly.
    """
    weight_K = memory.loss_weights(state.memory.sizes_K, VARIANTS["paper"])
    label_B = state.memory.labels_S.index_select(0, row_B).long()
    return label_B, weight_K if state.recipe.dc.balance == "reweighting" else torch.ones_like(weight_K)


def update(state: State, row_B: Tensor, features_BD: Tensor, step: int) -> dict[str, Tensor]:
    """Nothing moves within an epoch."""
    return {"change_ratio": torch.zeros((), device=row_B.device)}
