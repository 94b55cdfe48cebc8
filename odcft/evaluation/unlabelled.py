"""Measures of features that need no labels. None of them says by itself whether one backbone is better than another.

RankMe's authors mean it for runs of one method only; all of them can rise while a linear classifier gets worse. What
they say together was calibrated on runs with known results: unlabelled_verdict.py, docs/unlabelled.md.

Shapes: N images, F features, V views of each image, K clusters. All features are float and finite, N at least 2.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from odcft.clustering.neighbour_agreement import neighbour_agreement

EPSILON = 1e-7  # added to each share of the spectrum before its logarithm (RankMe and LiDAR)
LIDAR_DELTA = 1e-4  # added to the variance within images (LiDAR; implementations have 1e-6 to 1e-4)
NO_VARIANCE = 1e-3  # of the mean standard deviation of all features: below it, a feature counts as dead
NEIGHBOURS, CLUSTERS = 10, 20  # that `measure` compares


def measure(clean_NF: np.ndarray, views_NVF: np.ndarray) -> dict[str, float]:
    """All measures of one backbone.

    Args:
        clean_NF: features of the images as they are.
        views_NVF: of at least two random views of each.

    Returns:
        Each measure by the name of its function. Neighbours are those of features minus their mean: what all images
        have in common would hide how they differ.
    """
    centred_NVF = torch.from_numpy(views_NVF - views_NVF.mean((0, 1), dtype=np.float64))
    return {
        "neighbour_agreement": neighbour_agreement(centred_NVF[:, 0], centred_NVF[:, 1], NEIGHBOURS),
        "cluster_stability": cluster_stability(clean_NF, CLUSTERS),
        "effective_rank": effective_rank(clean_NF),
        "lidar": lidar(views_NVF),
        "spectrum_decay": spectrum_decay(clean_NF),
        "spread": spread(clean_NF),
        "dead_share": dead_share(clean_NF),
    }


def effective_rank(features_NF: np.ndarray) -> float:
    """RankMe (Garrido et al. 2023, arXiv 2210.02885): exponential of the entropy of the singular values, 1 to F."""
    return _exp_entropy(np.linalg.svd(features_NF.astype(np.float64), compute_uv=False))


def lidar(features_NVF: np.ndarray, delta: float = LIDAR_DELTA) -> float:
    """LiDAR (Thilak et al. 2023, arXiv 2312.04000): effective rank of LDA, where each image is a class of its views.

    Variance between images counts only as far as it exceeds that between views of one image.

    Args:
        features_NVF: of at least two augmented views of at least two images.
        delta: added to the variance within images, so that it can be inverted.
    """
    features_NVF = features_NVF.astype(np.float64)
    N, V, width = features_NVF.shape
    mean_NF = features_NVF.mean(1)
    between_NF = mean_NF - mean_NF.mean(0)
    within_MF = (features_NVF - mean_NF[:, None]).reshape(N * V, width)
    value_F, vector_FF = np.linalg.eigh(within_MF.T @ within_MF / (N * (V - 1)))
    whitened_NF = between_NF @ (vector_FF / np.sqrt(value_F.clip(0) + delta))
    # The eigenvalues of the product of both matrices are the squared singular values of the whitened means.
    return _exp_entropy(np.linalg.svd(whitened_NF, compute_uv=False) ** 2 / (N - 1))


def spectrum_decay(features_NF: np.ndarray, first: int = 1, last: int | None = None) -> float:
    """alpha-ReQ (Agrawal et al. 2022): the exponent a with which the eigenvalues of the covariance fall, as j ** -a.

    Args:
        features_NF: features.
        first, last: the eigenvalues, counted from 1, that the line through their logarithms is fitted to; by default
            all that are not zero up to rounding.

    Returns:
        The exponent: near 1 was best in that paper; a larger one means that few directions hold all variance. NaN if
        there are fewer than two eigenvalues to fit.
    """
    centred_NF = features_NF.astype(np.float64)
    centred_NF = centred_NF - centred_NF.mean(0)
    value_J = np.linalg.svd(centred_NF, compute_uv=False) ** 2
    value_J = value_J[value_J > value_J[0] * max(features_NF.shape) * np.finfo(np.float64).eps]
    number_J = np.arange(1, len(value_J) + 1)[first - 1 : last]
    if len(number_J) < 2:
        return float("nan")
    return float(-np.polyfit(np.log(number_J), np.log(value_J[first - 1 : last]), 1)[0])


def cluster_stability(features_NF: np.ndarray, k: int, resamples: int = 5, share: float = 0.5, seed: int = 0) -> float:
    """How similar the clusters are that K-Means finds in random subsets of the images.

    Args:
        features_NF: features, scaled to unit length here.
        k: clusters, at most as many as there are images in a subset.
        resamples: subsets, at least 2.
        share: of the images in each.
        seed: of the subsets and of K-Means.

    Returns:
        The mean adjusted Rand index between all pairs of clusterings of all images, each by its own centroids: 1 if
        they are the same, about 0 if they have nothing in common.
    """
    import warnings
    from itertools import combinations

    from sklearn.cluster import KMeans  # odcft's own needs all ranks; this is computed on one
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import adjusted_rand_score

    rows_NF = _unit_length(features_NF).float().numpy()
    random = np.random.default_rng(seed)
    labels = []
    for resample in range(resamples):
        chosen = random.choice(len(rows_NF), max(k, round(share * len(rows_NF))), replace=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different images than clusters
            found = KMeans(k, n_init=1, random_state=seed + resample).fit(rows_NF[np.sort(chosen)])
        labels.append(found.predict(rows_NF))
    return float(np.mean([adjusted_rand_score(one, other) for one, other in combinations(labels, 2)]))


def spread(features_NF: np.ndarray) -> float:
    """How far features of unit length are apart: 1 minus the mean cosine of two different images.

    0 if all point in the same direction (complete collapse), 1 if they point in all directions alike.
    """
    unit_NF = _unit_length(features_NF)
    N = len(unit_NF)
    pairs = (unit_NF.sum(0).square().sum() - unit_NF.square().sum()) / (N * (N - 1))
    return float(1 - pairs)


def dead_share(features_NF: np.ndarray) -> float:
    """The share of features, 0..1, that are the same for all images or nearly so (dimensional collapse)."""
    deviation_F = features_NF.astype(np.float64).std(0)
    return float((deviation_F <= NO_VARIANCE * deviation_F.mean()).mean())


def _exp_entropy(values: Sequence[float] | np.ndarray) -> float:
    """Exponential of the entropy of values divided by their sum, as RankMe defines it; 0 if all are zero."""
    total = np.sum(values)
    if total == 0:
        return 0.0
    share = np.asarray(values) / total + EPSILON
    return float(np.exp(-(share * np.log(share)).sum()))


def _unit_length(features_NF: np.ndarray) -> torch.Tensor:
    return F.normalize(torch.from_numpy(features_NF.astype(np.float64)), dim=1)
