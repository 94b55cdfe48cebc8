"""Online Deep Clustering (Zhan et al., CVPR 2020, sec. 3): labels and network evolve together.

Shapes as in memory.py: N images, S of them on this rank, B batch, K clusters, D embedding.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from odcft import seeds
from odcft.clustering import loss_weights, memory
from odcft.clustering.clusters import Clusters
from odcft.clustering.pca_whitening import whiten
from odcft.clustering.small_clusters import handle_small_clusters
from odcft.distributed import dist
from odcft.plan import Plan
from odcft.precision import exact_products

START_COMPONENTS = 128  # of the features that only give the first labels: 64 to 256 give equally good clusters
IMAGES_A_COMPONENT = 8  # at least, of the components of a layer
HAS_NECK = True  # {fc-bn-relu-dropout-fc-relu} between backbone and head


class EntriesToFind(NamedTuple):
    """What the samples memory holds of the images of a batch, for the instance loss."""

    entry_BD: Tensor  # float32
    share: float  # of the loss, more than 0


def features_for_kmeans(features_SD: Tensor, plan: Plan) -> Tensor:
    """Normalise the features (S, D) to unit length for K-Means; in place, as memory may not hold two copies."""
    return F.normalize(features_SD, dim=1, eps=1e-10, out=features_SD)


def features_of_start_layer(layer_SL: Tensor, plan: Plan) -> Tensor:
    """Reduce the features of `memory.start_layer` by PCA, whiten them and normalise them to unit length for K-Means.

    Clusters of components that are not whitened tell more about what the images show, and yet teach the network less
    (docs/small_data.md).

    Args:
        layer_SL: (S, L) float, this rank's.
        plan: of the run.

    Returns:
        (S, D) float32, with at most one component for IMAGES_A_COMPONENT images. For a memory that starts with them, D
        is that of the neck, and the last are zero if there are fewer; else D is at most START_COMPONENTS.
    """
    images = int(dist.all_sum(torch.tensor(len(layer_SL), device=layer_SL.device)))
    # With nearly as many whitened components as images, all images would be equally far from each other.
    most = max(2, images // IMAGES_A_COMPONENT)
    features_SD = whiten(layer_SL, min(plan.neck.dim if plan.starts_with_layer else START_COMPONENTS, most))
    if plan.starts_with_layer:
        features_SD = F.pad(features_SD, (0, plan.neck.dim - features_SD.shape[1]))
    return F.normalize(features_SD, dim=1, eps=1e-10)


def start(features_SD: Tensor, labels_S: Tensor, plan: Plan) -> Clusters:
    """Fill both memories from the features of this rank's images and their K-Means labels.

    Args:
        features_SD: (S, D) float; the memory takes ownership and may change it.
        labels_S: (S,) integers in 0..K-1.
        plan: of the run.

    Returns:
        The clusters; their centroids are the means of the normalised features.
    """
    dtype = getattr(torch, plan.memory.dtype)
    clusters = Clusters(memory.new_memory(features_SD, labels_S, plan.memory.clusters, dtype), plan)
    clusters.memory.sizes_K = dist.all_sum(clusters.memory.counts_K)
    refresh_centroids(clusters)
    return clusters


def begin_epoch(clusters: Clusters, epoch: int, embed: Callable[[], Tensor]) -> bool:
    """Nothing to do: labels evolve in every step, not at the start of an epoch. Returns False."""
    return False


def draw(clusters: Clusters, generator: torch.Generator) -> Tensor:
    """The order of images in an epoch: (S,) int64 rows of this rank, each once; incomplete batches are left out."""
    return torch.randperm(len(clusters.memory.labels_S), generator=generator)


def targets(clusters: Clusters, row_B: Tensor) -> tuple[Tensor, Tensor]:
    """Step 2 of an iteration: read the labels of the batch and the loss weights of all clusters.

    Args:
        clusters: only read.
        row_B: (B,) int64, rows of this rank.

    Returns:
        (B,) int64 labels and (K,) float32 weights, for a weighted mean of the cross-entropy.
    """
    weight_K = loss_weights.loss_weights(clusters.memory.sizes_K, clusters.rules)
    label_B = clusters.memory.labels_S.index_select(0, row_B).long()
    return label_B, weight_K if clusters.plan.memory.reweight else torch.ones_like(weight_K)


def entries_to_find(clusters: Clusters, row_B: Tensor, step: int) -> EntriesToFind | None:
    """Step 2 with an instance loss: read the entries of the batch that the network learns to find.

    Args:
        clusters: only read.
        row_B: (B,) int64, rows of this rank.
        step: counted from 0.

    Returns:
        The entries, and their share of the loss: all of it while the memory keeps the features of a layer. None if the
        network learns from labels alone, as in the paper.
    """
    starting = step < clusters.start_steps and clusters.plan.starts_with_layer
    share = 1.0 if starting else clusters.plan.memory.instance_share
    if not share or clusters.plan.method != "odc":
        return None
    return EntriesToFind(clusters.memory.features_SD.index_select(0, row_B).float(), share)


@exact_products()
def update(clusters: Clusters, row_B: Tensor, features_BD: Tensor, step: int) -> Tensor:
    """Steps 3 and 4 of an iteration: update the samples memory, then the centroids memory, then handle small clusters.

    Small clusters are handled in this step on a CPU, one step later on an accelerator (small_clusters.py).

    Args:
        clusters: changed in place.
        row_B: (B,) int64, rows of this rank.
        features_BD: (B, D) output of the neck in this step's forward pass.
        step: counted from 0.

    Returns:
        The share of this rank's batch whose label changed (fig. 5), a tensor on the device.
    """
    settings, rules = clusters.plan.memory, clusters.rules
    keep = step < clusters.start_steps
    if keep and clusters.plan.starts_with_layer:
        return torch.zeros((), device=row_B.device)  # the memory stays as it is
    moved_B = memory.update_samples(clusters.memory, row_B, features_BD, settings.momentum, rules, keep_labels=keep)
    clusters.memory.sizes_K = dist.all_sum(clusters.memory.counts_K)
    if (step + 1) % settings.centroid_interval == 0:
        refresh_centroids(clusters)
    if keep:
        return moved_B.float().mean()
    if clusters.watch.repair_is_due(clusters.memory.sizes_K, settings.min_cluster, rules):
        generator = seeds.generator(clusters.plan.seed, "small clusters", step)
        handle_small_clusters(clusters.memory, settings.min_cluster, rules, generator)
    return moved_B.float().mean()


def refresh_centroids(clusters: Clusters) -> None:
    """Set every centroid to the mean of its images over all ranks (which exchange the K x D sums)."""
    memory.set_centroids(clusters.memory, dist.all_sum(clusters.memory.sums_KD))
