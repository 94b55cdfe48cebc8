"""What a method keeps from step to step: the memory, and the watch for small clusters."""

from dataclasses import dataclass, field

from torch import Tensor

from odcft.clustering import memory
from odcft.clustering.memory import VARIANTS, Memory, Rules
from odcft.clustering.small_clusters import SmallClusterWatch
from odcft.distributed import dist
from odcft.plan import Plan


@dataclass
class Clusters:
    """The clusters of the images, as ODC and DC use them."""

    memory: Memory
    plan: Plan
    watch: SmallClusterWatch = field(default_factory=SmallClusterWatch)
    start_steps: int = 0  # steps from the start in which the images keep their first labels

    @property
    def rules(self) -> Rules:
        """The rules of the variant that the plan selects."""
        return VARIANTS[self.plan.memory.variant]


def stored(clusters: Clusters) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a snapshot keeps.

    Args:
        clusters: only read.

    Returns:
        Tensors by name: the rows of this rank's images, (S, ...) each; and what is the same on every rank.
    """
    kept, pending = clusters.memory, clusters.watch.reader.pending()
    same = {"centroids": kept.centroids_KD} | ({} if pending is None else {"small_pending": pending})
    return {"features": kept.features_SD, "labels": kept.labels_S}, same


def restore(clusters: Clusters, rows: dict[str, Tensor], same: dict[str, Tensor]) -> None:
    """Put back what was `stored`; sums and counts are recomputed from it, exactly.

    Args:
        clusters: changed in place; its features already have the right dtype and device.
        rows: this rank's.
        same: the same on every rank.
    """
    old = clusters.memory.features_SD
    features_SD, labels_S = rows["features"].to(old.device), rows["labels"].to(old.device)
    centroids_KD = same["centroids"].to(old.device)
    new = memory.new_memory(features_SD, labels_S, len(centroids_KD), old.dtype, normalise=False)
    new.sizes_K = dist.all_sum(new.counts_K)
    memory.put_centroids(new, centroids_KD)
    clusters.memory = new
    if "small_pending" in same and clusters.watch.reader.delay(old.device):
        clusters.watch.reader.restore_pending(same["small_pending"])
