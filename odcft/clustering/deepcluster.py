"""DeepCluster (Caron et al., ECCV 2018), as Zhan et al. compare with it (sec. 3.1): at the start of every epoch K-Means
over the whole set gives new labels and the classifier is reinitialised; within an epoch labels do not change.

Shapes: N images, S of them on this rank, B batch, K clusters, F backbone, D after PCA.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from odcft import seeds
from odcft.clustering import loss_weights, memory
from odcft.clustering.clusters import Clusters
from odcft.clustering.kmeans import assign, kmeans
from odcft.clustering.memory import VARIANTS
from odcft.clustering.pca_whitening import whiten
from odcft.clustering.small_clusters import handle_small_clusters
from odcft.distributed import dist
from odcft.plan import Plan
from odcft.precision import exact_products

HAS_NECK = False  # the classifier uses the backbone's features


def features_for_kmeans(features_SF: Tensor, plan: Plan) -> Tensor:
    """Reduce the features by PCA, whiten them and normalise them to unit length for K-Means.

    Args:
        features_SF: (S, F) float, this rank's.
        plan: `dc.pca` components are kept, or all if there are fewer.

    Returns:
        (S, D) float32.
    """
    return F.normalize(whiten(features_SF, plan.dc.pca), dim=1, eps=1e-10)


@exact_products()
def start(features_SD: Tensor, labels_S: Tensor, plan: Plan, epoch: int = 0) -> Clusters:
    """Fill the memories with the clusters that K-Means found. An empty cluster gets half of the largest.

    Args:
        features_SD: (S, D) float, as K-Means saw them; the memory takes ownership and may change them.
        labels_S: (S,) integers in 0..K-1.
        plan: of the run.
        epoch: the epoch that K-Means ran for.
    """
    dtype = getattr(torch, plan.memory.dtype)
    clusters = Clusters(memory.new_memory(features_SD, labels_S, plan.memory.clusters, dtype), plan)
    clusters.memory.sizes_K = dist.all_sum(clusters.memory.counts_K)
    memory.set_centroids(clusters.memory, dist.all_sum(clusters.memory.sums_KD))
    generator = seeds.generator(plan.seed, "empty clusters", epoch)
    handle_small_clusters(clusters.memory, 0, VARIANTS["paper"], generator)
    return clusters


def clusters_again(plan: Plan, epoch: int) -> bool:
    """Whether `begin_epoch` clusters again in this epoch, counted from 0."""
    return epoch > 0 and epoch >= plan.memory.start_epochs and epoch % plan.dc.interval == 0


def begin_epoch(clusters: Clusters, epoch: int, embed: Callable[[], Tensor]) -> bool:
    """Cluster again, every `dc.interval` epochs; not in epoch 0, as `start` has just done it, nor in the start epochs.

    Args:
        clusters: changed in place.
        epoch: counted from 0.
        embed: returns the backbone features (S, F) of this rank's images, without augmentation, in evaluation mode.

    Returns:
        Whether the labels are new, so that the classifier must be reinitialised.
    """
    plan = clusters.plan
    if not clusters_again(plan, epoch):
        return False
    features_SD = features_for_kmeans(embed(), plan)
    seed = seeds.seed(plan.seed, "kmeans", epoch)
    centroids_KD = kmeans(features_SD, plan.memory.clusters, seed, plan.kmeans.iterations, plan.kmeans.engine)
    clusters.memory = start(features_SD, assign(features_SD, centroids_KD)[0], plan, epoch).memory
    return True


def draw(clusters: Clusters, generator: torch.Generator) -> Tensor:
    """The order of images in an epoch: uniform over clusters, or each image once if the loss is re-weighted instead.

    All clusters are drawn equally often, to within one image per rank: some images of a large cluster are not drawn,
    some of a small one several times.

    Args:
        clusters: only read.
        generator: on the CPU.

    Returns:
        (S,) int64 rows of this rank.
    """
    S = len(clusters.memory.labels_S)
    shuffled_S = torch.randperm(S, generator=generator)
    if clusters.plan.dc.balance == "reweighting":
        return shuffled_S
    labels_S = clusters.memory.labels_S.cpu().long()
    by_cluster_S = shuffled_S[labels_S[shuffled_S].argsort(stable=True)]
    share_S = clusters.memory.sizes_K.cpu().double().reciprocal()[labels_S[by_cluster_S]]
    # S equally spaced points along the clusters laid end to end, each as long as this rank's share of its images.
    points_S = (torch.arange(S, dtype=torch.float64) + torch.rand((), generator=generator)) / S * share_S.sum()
    drawn_S = by_cluster_S[torch.searchsorted(share_S.cumsum(0), points_S).clamp(max=S - 1)]
    return drawn_S[torch.randperm(S, generator=generator)]


def targets(clusters: Clusters, row_B: Tensor) -> tuple[Tensor, Tensor]:
    """Read the labels of the batch and the loss weights of all clusters.

    Args:
        clusters: only read.
        row_B: (B,) int64, rows of this rank.

    Returns:
        (B,) int64 labels and (K,) float32 weights: 1 / sqrt(N_c) (sec. 3.2), or all 1 if clusters are drawn
        uniformly.
    """
    weight_K = loss_weights.loss_weights(clusters.memory.sizes_K, VARIANTS["paper"])
    label_B = clusters.memory.labels_S.index_select(0, row_B).long()
    return label_B, weight_K if clusters.plan.dc.balance == "reweighting" else torch.ones_like(weight_K)


def entries_to_find(clusters: Clusters, row_B: Tensor, step: int) -> None:
    """None: the network learns from labels alone."""
    return None


def update(clusters: Clusters, row_B: Tensor, features_BD: Tensor, step: int) -> Tensor:
    """Nothing to do: labels do not change within an epoch. Returns the share that changed, 0."""
    return torch.zeros((), device=row_B.device)
