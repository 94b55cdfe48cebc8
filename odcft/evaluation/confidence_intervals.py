"""The 95 % interval of a change, from a paired bootstrap over the test images.

Shapes: N test images, C classes.
"""

from typing import Any

import numpy as np

from odcft.evaluation.protocols import class_numbers
from odcft.evaluation.results_table import METRICS


def changes_with_intervals(
    before: dict[str, Any], after: dict[str, Any], targets_NC: np.ndarray, draws: int = 200
) -> dict[str, Any]:
    """How much each metric changed, with the 95 % interval of a paired bootstrap over the test images.

    If a resample has lost a class, or every image in it has the class, the class is left out of both means.
    """
    generator = np.random.default_rng(0)
    samples = [generator.integers(0, len(targets_NC), len(targets_NC)) for _ in range(draws)]
    changed: dict[str, Any] = {}
    for protocol, (_, name) in METRICS.items():
        if protocol in before and protocol in after:
            resampled = _RESAMPLED_CHANGES[protocol](before[protocol], after[protocol], targets_NC, samples)
            changed[protocol] = _with_interval(after[protocol][name] - before[protocol][name], resampled)
    if "semi" in changed:
        old, new = before["semi"]["per_fraction"], after["semi"]["per_fraction"]
        changed["semi"]["per_fraction"] = {
            part: _with_interval(
                new[part]["top1"] - old[part]["top1"], _accuracy_changes(old[part], new[part], targets_NC, samples)
            )
            for part in new
        }
    return changed


def _with_interval(change: float, resampled: list[float]) -> dict[str, Any]:
    low, high = np.percentile(resampled or [change], [2.5, 97.5])
    return {"change": change, "low": float(low), "high": float(high)}


def _accuracy_changes(before: dict, after: dict, targets_NC: np.ndarray, samples: list[np.ndarray]) -> list[float]:
    """The change of accuracy in each resample."""
    class_N = class_numbers(targets_NC)
    return _share_changes(before["predicted"] == class_N, after["predicted"] == class_N, samples)


def _semi_changes(before: dict, after: dict, targets_NC: np.ndarray, samples: list[np.ndarray]) -> list[float]:
    """The change of accuracy with the largest share of the labels in each resample."""
    old, new = (list(one["per_fraction"].values())[-1] for one in (before, after))
    return _accuracy_changes(old, new, targets_NC, samples)


def _cluster_changes(before: dict, after: dict, targets_NC: np.ndarray, samples: list[np.ndarray]) -> list[float]:
    """The change of clustering accuracy in each resample; of all images, as training images are clustered too."""
    generator, count = np.random.default_rng(0), len(before["correct"])
    resampled = [generator.integers(0, count, count) for _ in samples]
    return _share_changes(before["correct"], after["correct"], resampled)


def _share_changes(before_N: np.ndarray, after_N: np.ndarray, samples: list[np.ndarray]) -> list[float]:
    gain_N = 100.0 * after_N - 100.0 * before_N
    return [float(gain_N[rows].mean()) for rows in samples]


def _svm_changes(before: dict, after: dict, targets_NC: np.ndarray, samples: list[np.ndarray]) -> list[float]:
    """The change of SVM mAP in each resample in which a class can be measured."""
    from odcft.evaluation.svm import average_precision_of_ranking

    times_drawn = [np.bincount(rows, minlength=len(targets_NC)) for rows in samples]
    gains: list[list[float]] = [[] for _ in samples]
    for c, precision in enumerate(after["per_class"]):
        if precision is None:
            continue
        certain = np.flatnonzero(targets_NC[:, c] != -1)
        old, new = (certain[np.argsort(-one["scores"][certain, c], kind="stable")] for one in (before, after))
        for gain, times_N in zip(gains, times_drawn, strict=True):
            old_N, new_N = (np.repeat(targets_NC[order, c] == 1, times_N[order]) for order in (old, new))
            if old_N.any() and not old_N.all():
                gain.append(100 * (average_precision_of_ranking(new_N) - average_precision_of_ranking(old_N)))
    return [float(np.mean(gain)) for gain in gains if gain]


def _low_shot_changes(before: dict, after: dict, targets_NC: np.ndarray, samples: list[np.ndarray]) -> list[float]:
    """The change of low-shot mAP in each resample: the mean over k and draws of the SVM's."""
    changes = [
        _svm_changes({"scores": old}, {"scores": new, "per_class": after["per_class"]}, targets_NC, samples)
        for k in after["scores"]
        for old, new in zip(before["scores"][k], after["scores"][k], strict=True)
    ]
    return np.mean(changes, 0).tolist()


_RESAMPLED_CHANGES = {
    "svm": _svm_changes,
    "low_shot": _low_shot_changes,
    "linear": _accuracy_changes,
    "knn": _accuracy_changes,
    "semi": _semi_changes,
    "clusters": _cluster_changes,
}
