"""The clusters of a run as rows of a gallery, and which of their images are shown.

Shapes: N images, K clusters that have images.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from odcft.reports.class_agreement import ClassAgreement
from odcft.reports.run_record import Assignment, RunRecord

NEAREST, RANDOM, FARTHEST = 4, 3, 2  # images shown in a row


@dataclass
class Gallery:
    """The clusters of a run, in ascending number.

    Attributes:
        ids: the numbers of the clusters that have images (K,).
        size_K: their numbers of images.
        tightness_K: mean cosine similarity of two of a cluster's images, about: 1 if all are alike; NaN if unknown.
        stability_K: of the images that are or were in it, the share that is and was; NaN if no earlier state is known.
        members: rows of the images of each cluster, nearest to the centroid first.
        near, random, far: of each cluster, the rows that its own row shows.
        row_N: which of the K clusters an image is in.
    """

    ids: np.ndarray
    size_K: np.ndarray
    tightness_K: np.ndarray
    stability_K: np.ndarray
    row_N: np.ndarray
    members: list[np.ndarray] = field(default_factory=list)
    near: list[list[int]] = field(default_factory=list)
    random: list[list[int]] = field(default_factory=list)
    far: list[list[int]] = field(default_factory=list)


def make_gallery(clusters: Assignment, earlier_N: np.ndarray | None = None) -> Gallery:
    """The gallery of a clustering; `earlier_N` are the labels of the same images in an earlier state, if known."""
    ids, row_N, size_K = np.unique(clusters.cluster_N, return_inverse=True, return_counts=True)
    distance_N = np.where(np.isfinite(clusters.distance_N), clusters.distance_N, np.inf)
    order = np.lexsort((np.arange(len(row_N)), distance_N, row_N))
    stability_K = np.full(len(ids), np.nan)
    if earlier_N is not None and len(earlier_N) == len(row_N):
        stability_K = overlaps(row_N, earlier_N)
    gallery = Gallery(ids, size_K, _tightness(clusters, row_N, len(ids)), stability_K, row_N)
    gallery.members = np.split(order, np.cumsum(size_K)[:-1])
    draw = np.random.default_rng(0)
    for rows in gallery.members:
        near = rows[:NEAREST]
        far = rows[max(NEAREST, len(rows) - FARTHEST) :][::-1]
        between = rows[NEAREST : len(rows) - len(far)]
        chosen = between[draw.permutation(len(between))[:RANDOM]]
        for shown, listed in ((gallery.near, near), (gallery.random, chosen), (gallery.far, far)):
            shown.append(listed.tolist())
    return gallery


def _tightness(clusters: Assignment, row_N: np.ndarray, K: int) -> np.ndarray:
    """1 - the mean squared distance to the centroid: of features of unit length, the mean cosine of two of them."""
    squares = np.bincount(row_N, clusters.distance_N.astype(np.float64) ** 2, K) / np.bincount(row_N, minlength=K)
    return 1 - squares


def overlaps(row_N: np.ndarray, other_N: np.ndarray) -> np.ndarray:
    """Of each cluster of one labelling (0..K-1), the Jaccard overlap with the cluster of another that shares most."""
    _, other_N = np.unique(other_N, return_inverse=True)
    size_K, size_L = np.bincount(row_N), np.bincount(other_N)
    pairs, both = np.unique(row_N.astype(np.int64) * len(size_L) + other_N, return_counts=True)
    one, other = pairs // len(size_L), pairs % len(size_L)
    best_K = np.zeros(len(size_K))
    np.maximum.at(best_K, one, both / (size_K[one] + size_L[other] - both))
    return best_K


def by_importance(gallery: Gallery) -> np.ndarray:
    """The rows of all images, those first that the page needs most: a round of all clusters, then a second, and so on.

    In a round every cluster, the largest first, adds its next image: the nearest, one at random, the farthest …
    """
    turns: list[np.ndarray] = []
    count = len(gallery.row_N)
    turn_N = np.full(count, np.iinfo(np.int64).max)
    for k, rows in enumerate(gallery.members):
        shown = _interleaved(gallery.near[k], gallery.random[k], gallery.far[k])
        turn_N[rows] = np.arange(len(rows)) + len(shown)
        turn_N[shown] = np.arange(len(shown))
        turns.append(rows)
    return np.lexsort((np.arange(count), -gallery.size_K[gallery.row_N], turn_N))


def _interleaved(*lists: list[int]) -> list[int]:
    longest = max(map(len, lists))
    return [one[i] for i in range(longest) for one in lists if i < len(one)]


def cluster_columns(gallery: Gallery, classes: ClassAgreement | None) -> dict[str, Any]:
    """The clusters as columns for the page; what is not known of any cluster is left out."""
    columns: dict[str, Any] = {"id": gallery.ids.tolist(), "size": gallery.size_K.tolist()}
    for name, values in (("tightness", gallery.tightness_K), ("stability", gallery.stability_K)):
        if np.isfinite(values).any():
            columns[name] = [round(float(v), 3) if np.isfinite(v) else None for v in values]
    if classes is not None:
        columns["purity"] = [None if p is None else round(p, 3) for p in classes.purity_K]
        columns["classes"] = classes.top_K
    return columns


def explain_columns(record: RunRecord, gallery: Gallery) -> str:
    """What the columns mean, in sentences."""
    text = "Tightness is about the mean cosine similarity of two images of the cluster (1: all alike)."
    if np.isfinite(gallery.stability_K).any():
        text += (
            " Stability compares it with the cluster it had most in common with after step "
            f"{record.earlier_step:,}: images in both, divided by images in either."
        )
    return text
