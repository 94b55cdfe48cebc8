"""Clusters against labels: how well groups found without labels match the classes.

Shapes: N images, F features, K clusters, C classes.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from odcft.distributed import accelerator
from odcft.errors import OdcftError

RESTARTS = 10  # of K-Means, from other rows; the clustering with the smallest squared distances counts
ITERATIONS = 50


def cluster_features(
    features_NF: np.ndarray, class_N: np.ndarray, k: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Cluster features of unit length by K-Means and compare the clusters with the classes.

    Args:
        features_NF: float, finite.
        class_N: classes, integers from 0.
        k: clusters; by default as many as there are classes.
        seed: of the first of the RESTARTS.

    Returns:
        The dict of `agreement`, with `k` and `seed`.
    """
    k = min(k or len(np.unique(class_N)), len(features_NF))
    return {**agreement(_kmeans_labels(features_NF, k, seed), class_N), "k": k, "seed": seed}


def agreement(cluster_N: np.ndarray, class_N: np.ndarray) -> dict[str, Any]:
    """How well clusters match classes.

    Returns:
        `nmi`: normalised mutual information in 0..1 (divided by the geometric mean of both entropies, as DeepCluster
        and the training log do). `purity` in 0..100: images of the most frequent class of their cluster. `accuracy` in
        0..100: images of the class that is assigned to their cluster, when each class is assigned to at most one
        cluster and each cluster to at most one class, in the best way (Hungarian algorithm). `correct` (N,): those.
    """
    from scipy.optimize import linear_sum_assignment

    _, cluster_N = np.unique(cluster_N, return_inverse=True)
    _, class_N = np.unique(class_N, return_inverse=True)
    counts_KC = np.zeros((cluster_N.max() + 1, class_N.max() + 1), dtype=np.int64)
    np.add.at(counts_KC, (cluster_N, class_N), 1)
    class_of_cluster = np.full(len(counts_KC), -1)
    clusters, classes = linear_sum_assignment(counts_KC, maximize=True)
    class_of_cluster[clusters] = classes
    correct = class_of_cluster[cluster_N] == class_N
    return {
        "nmi": nmi(cluster_N, class_N),
        "purity": 100 * float(counts_KC.max(1).sum() / len(class_N)),
        "accuracy": 100 * float(correct.mean()),
        "correct": correct,
    }


def nmi(one_N: np.ndarray, other_N: np.ndarray) -> float:
    """Normalised mutual information of two labellings of the same images: 0 to 1."""
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(one_N, other_N, average_method="geometric"))


def compare_run(run: Path, paths: Sequence[str], class_N: np.ndarray) -> dict[str, Any]:
    """Compare the clusters that a run ended with, in its clusters.parquet, with classes.

    Args:
        run: a RUN that was trained on images that are among those of `paths`.
        paths: of labelled images (N). Those the run was not trained on are left out.
        class_N: their classes, integers from 0.

    Returns:
        The dict of `agreement` without `correct`, with `k`, the number of clusters these images are in, and `images`,
        how many the run was trained on.

    Raises:
        OdcftError: not one is, or the run's files cannot be read.
    """
    from odcft.files import read_json
    from odcft.run.clusters_parquet import read_clusters

    about = read_json(run / "run.json")
    data, absolute = Path(str(about.get("data", ""))), about.get("data_path")
    if isinstance(absolute, str) and os.path.exists(absolute):
        data = Path(absolute)  # the other is relative to the folder that the run was started in
    root = os.path.abspath(data if data.is_dir() else data.parent)
    listed = read_clusters(run / "clusters.parquet")
    clusters = {os.path.normpath(os.path.join(root, path)): cluster for path, cluster in listed.items()}
    found = [(clusters.get(os.path.abspath(path)), number) for path, number in zip(paths, class_N, strict=True)]
    both = np.array([pair for pair in found if pair[0] is not None], dtype=np.int64)
    if not len(both):
        raise OdcftError(f"{run} was not trained on any of these images (but on {data}).")
    compared = agreement(both[:, 0], both[:, 1])
    del compared["correct"]
    return {**compared, "k": len(np.unique(both[:, 0])), "images": len(both)}


def nmi_of_runs(one: Path, other: Path) -> dict[str, Any]:
    """The NMI between the clusters of two runs, over the images that both list.

    Args:
        one, other: clusters.parquet of each, or the RUN folder it is in.

    Returns:
        `nmi`, and `images`, the number of paths in both.

    Raises:
        OdcftError: a file cannot be read, or no path is in both.
    """
    from odcft.run.clusters_parquet import read_clusters

    ours, others = (read_clusters(path / "clusters.parquet" if path.is_dir() else path) for path in (one, other))
    common = [path for path in ours if path in others]
    if not common:
        raise OdcftError(f"{one} and {other} list no image in common. Compare runs on the same images.")
    labels = [np.array([clusters[path] for path in common]) for clusters in (ours, others)]
    return {"nmi": nmi(*labels), "images": len(common)}


def _kmeans_labels(features_NF: np.ndarray, k: int, seed: int) -> np.ndarray:
    """The clusters (N,) of the best of several runs of K-Means."""
    import torch
    import torch.nn.functional as F

    from odcft.clustering.kmeans import kmeans

    device = torch.device(accelerator.kind())
    rows = F.normalize(torch.from_numpy(features_NF.astype(np.float64)), dim=1).float().to(device)
    best, best_label_N = float("inf"), torch.zeros(0)
    for restart in range(RESTARTS):
        centroids_KF = kmeans(rows, k, seed + restart, ITERATIONS)
        nearest = [torch.cdist(part, centroids_KF).min(1) for part in rows.split(8192)]
        objective = float(sum(part.values.double().square().sum() for part in nearest))
        if objective < best:
            best, best_label_N = objective, torch.cat([part.indices for part in nearest])
    return best_label_N.cpu().numpy()
