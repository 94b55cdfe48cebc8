"""The 95 % interval of a change: a paired bootstrap over the test images."""

from typing import TYPE_CHECKING, Any

import numpy as np

from odcft.evaluation.protocols import one_class
from odcft.evaluation.table import FIGURES

if TYPE_CHECKING:
    pass


def changes(before: dict[str, Any], after: dict[str, Any], targets_NC: np.ndarray, draws: int = 200) -> dict[str, Any]:
    """By how much each figure changed, and the 95 % interval over test images drawn again (a paired bootstrap).

    A class that a draw has lost, or that every image of it has, counts in neither mean of that draw.
    """
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, len(targets_NC), len(targets_NC)) for _ in range(draws)]
    changed = {}
    for protocol, (_, name) in FIGURES.items():
        if protocol in before:
            change = after[protocol][name] - before[protocol][name]
            drawn = _DRAWN[protocol](before[protocol], after[protocol], targets_NC, rows)
            low, high = np.percentile(drawn or [change], [2.5, 97.5])
            changed[protocol] = {"change": change, "low": float(low), "high": float(high)}
    return changed


def _knn_changes(before: dict, after: dict, targets_NC: np.ndarray, rows: list[np.ndarray]) -> list[float]:
    class_N = one_class(targets_NC)
    gain_N = 100.0 * (after["predicted"] == class_N) - 100.0 * (before["predicted"] == class_N)
    return [float(gain_N[drawn].mean()) for drawn in rows]


def _svm_changes(before: dict, after: dict, targets_NC: np.ndarray, rows: list[np.ndarray]) -> list[float]:
    """Of each draw in which a class can be measured."""
    from odcft.evaluation.svm import ranked_precision

    times = [np.bincount(drawn, minlength=len(targets_NC)) for drawn in rows]  # each image is drawn
    gains: list[list[float]] = [[] for _ in rows]
    for c, precision in enumerate(after["per_class"]):
        if precision is None:
            continue
        certain = np.flatnonzero(targets_NC[:, c] != -1)
        old, new = (certain[np.argsort(-one["scores"][certain, c], kind="stable")] for one in (before, after))
        for gain, times_N in zip(gains, times, strict=True):
            old_N, new_N = (np.repeat(targets_NC[order, c] == 1, times_N[order]) for order in (old, new))
            if old_N.any() and not old_N.all():
                gain.append(100 * (ranked_precision(new_N) - ranked_precision(old_N)))
    return [float(np.mean(gain)) for gain in gains if gain]


_DRAWN = {"svm": _svm_changes, "knn": _knn_changes}
