"""The bootstrap intervals of changes, compared with drawing images again."""

import numpy as np
import pytest

from odcft.evaluation.confidence_intervals import changes_with_intervals
from odcft.evaluation.svm import average_precision


def test_a_class_missing_from_a_resample_counts_in_neither_mean():
    """Only one image has the third class: about a third of the resamples lack it, and there it changes nothing."""
    targets = np.eye(3, dtype=np.int64)[[0, 0, 0, 1, 1, 1, 2]]
    perfect = targets.astype(float)

    def result(scores):
        return {"svm": {"mAP": 100.0, "per_class": [100.0] * 3, "scores": scores}}

    same = changes_with_intervals(result(perfect), result(perfect), targets)["svm"]
    assert (same["change"], same["low"], same["high"]) == (0, 0, 0)
    # Before, the third class ranks last of seven: a resample with it gains at most (100 - 100/7) / 3, others nothing.
    late = perfect.copy()
    late[:, 2] = -late[:, 2]
    gained = changes_with_intervals(result(late), result(perfect), targets)["svm"]
    assert gained["low"] == 0
    assert 20 < gained["high"] < 50
    # A class left out of the mean is left out of the interval.
    alike = {"svm": {**result(late)["svm"], "per_class": [100.0, 100.0, None]}}
    assert (
        changes_with_intervals(alike, alike | {"svm": {**alike["svm"], "scores": perfect}}, targets)["svm"]["high"] == 0
    )


def test_intervals_are_the_same_as_from_resampling_the_images():
    draw = np.random.default_rng(1)
    class_N = draw.integers(0, 2, 40)
    targets = np.stack([class_N, 1 - class_N], 1)
    targets[:5, 0] = -1
    one, two = (targets * s + draw.normal(size=(40, 2)) for s in (0.5, 2.0))
    figures = [{"mAP": 0.0, "per_class": [1.0, 1.0], "scores": scores} for scores in (one, two)]
    interval = changes_with_intervals({"svm": figures[0]}, {"svm": figures[1]}, targets)["svm"]
    again, gains = np.random.default_rng(0), []
    for _ in range(200):
        rows = again.integers(0, 40, 40)
        gain = []
        for c in range(2):
            kept = rows[targets[rows, c] != -1]
            present = targets[kept, c] == 1
            gain.append(100 * (average_precision(present, two[kept, c]) - average_precision(present, one[kept, c])))
        gains.append(np.mean(gain))
    assert [interval["low"], interval["high"]] == pytest.approx(np.percentile(gains, [2.5, 97.5]).tolist())
