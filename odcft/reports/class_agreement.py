"""Clusters against labels that the user gives to the report: training has never seen them.

Shapes: N images, K clusters.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from odcft.data.images import Images
from odcft.errors import OdcftError
from odcft.text import printable

SHOWN = 4  # classes of a cluster
MAX_CLASSES = 10_000
MIXED = 0.5  # a cluster cuts across classes if no class has more than this share of it


@dataclass
class ClassRow:
    """A class: its name, images, in how many clusters they are, and the share of them in the one that has most."""

    name: str
    images: int
    clusters: int
    largest_share: float


@dataclass
class ClassAgreement:
    """How clusters and classes match.

    Attributes:
        labels_N: the labels of each image, joined by ";"; "" for images without.
        labelled: how many images have one.
        purity: of all labelled images, the share that is of the most frequent class of their cluster.
        mixed: how many clusters cut across classes.
        purity_K: of each cluster; None for one without labelled images.
        top_K: of each cluster, its most frequent classes with their shares.
        classes: the classes, those spread over most clusters first.
    """

    labels_N: list[str]
    labelled: int
    purity: float
    mixed: int
    purity_K: list[float | None] = field(default_factory=list)
    top_K: list[list[tuple[str, float]]] = field(default_factory=list)
    classes: list[ClassRow] = field(default_factory=list)


def labels_of(paths: Sequence[str], labelled: Images) -> list[str]:
    """The labels of images, by their paths, among labelled images; "" for those that are not among them.

    Args:
        paths: of the images of a run (N), as `Images.path` gives them.
        labelled: images with labels, or in one folder per class.

    Raises:
        OdcftError: not one of the paths has a label.
    """
    found = labelled.class_labels()
    known = {os.path.abspath(labelled.path(row)): label for row, label in enumerate(found) if label}
    labels = [printable(known.get(os.path.abspath(path), "")) if path else "" for path in paths]
    if not any(labels):
        raise OdcftError(
            f"--labels {labelled.source}: none of the run's images has a label there. Give the images that the run was "
            "trained on, one folder per class, or a list of them with labels."
        )
    if len(set(labels)) > MAX_CLASSES:
        raise OdcftError(f"--labels {labelled.source}: {len(set(labels)):,} different labels are too many to show.")
    return labels


def compare_with_classes(row_N: np.ndarray, labels_N: list[str]) -> ClassAgreement:
    """Compare clusters (0..K-1, of each image) with labels; an image of several labels counts for each of them."""
    K = int(row_N.max()) + 1
    in_cluster: list[Counter[str]] = [Counter() for _ in range(K)]
    labelled_K = np.zeros(K, np.int64)
    spread: dict[str, Counter[int]] = defaultdict(Counter)
    for cluster, labels in zip(row_N.tolist(), labels_N, strict=True):
        if labels:
            labelled_K[cluster] += 1
            for label in dict.fromkeys(filter(None, (part.strip() for part in labels.split(";")))):
                in_cluster[cluster][label] += 1
                spread[label][cluster] += 1
    best_K = [counts.most_common(1)[0][1] if counts else 0 for counts in in_cluster]
    purity_K = [best / n if n else None for best, n in zip(best_K, labelled_K.tolist(), strict=True)]
    top_K = [
        [(label, round(count / n, 3)) for label, count in counts.most_common(SHOWN)]
        for counts, n in zip(in_cluster, labelled_K.tolist(), strict=True)
    ]
    classes = [
        ClassRow(name, counts.total(), len(counts), counts.most_common(1)[0][1] / counts.total())
        for name, counts in spread.items()
    ]
    labelled = int(labelled_K.sum())
    return ClassAgreement(
        labels_N,
        labelled,
        sum(best_K) / labelled,
        sum(1 for purity in purity_K if purity is not None and purity <= MIXED),
        purity_K,
        top_K,
        sorted(classes, key=lambda row: (row.largest_share, row.name)),
    )
