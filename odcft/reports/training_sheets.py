"""A contact sheet of some clusters now and then while a run trains, for the trackers.

Shapes: S images of this rank, D features, K clusters.
"""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch

from odcft.clustering.clusters import Clusters
from odcft.clustering.memory import Memory
from odcft.data.images import Images
from odcft.data.view import View
from odcft.distributed import ownership
from odcft.reports.contact_sheets import Cell, Row, draw_sheet, thumbnails

CLUSTERS, EACH, SIDE = 6, 8, 64  # clusters on a sheet, images of each, pixels of a thumbnail
LOOKED_AT = 4096  # images of a cluster, among which the nearest are chosen
SECONDS = 3.0  # after which no further image is read: training waits for the sheet


@dataclass
class TrainingSheets:
    """Draws a sheet when one is due. No random number is drawn, and the network is not used.

    Attributes:
        images: of the run.
        view: how training sees images without augmentation.
        minutes: between two sheets; 0 for none.
    """

    images: Images
    view: View
    minutes: float
    drawn_at: float = -math.inf

    def draw(self, clusters: Clusters, last: bool = False) -> np.ndarray | None:
        """A sheet of clusters, spread from the largest to the smallest: the nearest of this rank's images of each.

        Args:
            clusters: their memory is this rank's part.
            last: draw in any case, because the run ends.

        Returns:
            uint8 (H, W, 3), or None if none is due.
        """
        if not self.minutes or not (last or time.monotonic() - self.drawn_at >= 60 * self.minutes):
            return None
        memory = clusters.memory  # DeepCluster makes a new one for each clustering
        sizes = memory.sizes_K.cpu()
        by_size_K = torch.argsort(sizes, descending=True, stable=True)[: int((sizes > 0).sum())]
        places = torch.linspace(0, len(by_size_K) - 1, min(CLUSTERS, len(by_size_K))).round().long()
        chosen = by_size_K[places].tolist()
        nearest = {cluster: self._nearest(memory, cluster) for cluster in chosen}
        wanted = [index for found in nearest.values() for index in found]
        pictures = thumbnails(self.images, wanted, self.view, SIDE, seconds=SECONDS)
        rows = [
            Row(f"cluster {cluster} · {int(sizes[cluster]):,} images", [Cell(pictures.get(index)) for index in found])
            for cluster, found in nearest.items()
        ]
        self.drawn_at = time.monotonic()
        return np.array(draw_sheet("Nearest images of some clusters, the largest first", rows, EACH, SIDE))

    def _nearest(self, memory: Memory, cluster: int) -> list[int]:
        """The indices of those of this rank's images of a cluster that are nearest to its centroid."""
        rows = torch.nonzero(memory.labels_S == cluster)[:LOOKED_AT, 0]
        distance = (memory.features_SD[rows].float() - memory.centroids_KD[cluster]).norm(dim=1)
        nearest = rows[torch.argsort(distance)[:EACH]].cpu()
        return ownership.image_of(nearest).tolist()
