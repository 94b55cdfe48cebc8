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


def test_intervals_of_accuracies():
    targets = np.eye(2, dtype=np.int64)[np.arange(50) % 2]
    right, wrong = np.arange(50) % 2, 1 - np.arange(50) % 2
    half = np.where(np.arange(50) < 25, right, wrong)
    for protocol in ("knn", "linear"):
        before = {protocol: {"top1": 50.0, "predicted": half}}
        gained = changes_with_intervals(before, {protocol: {"top1": 100.0, "predicted": right}}, targets)[protocol]
        assert gained["change"] == 50
        assert 30 < gained["low"] < 45 < 55 < gained["high"] < 70
        same = changes_with_intervals(before, before, targets)[protocol]
        assert (same["low"], same["high"]) == (0, 0)
    # Clusters are of training and test images: more than there are test images.
    before = {"clusters": {"accuracy": 50.0, "correct": np.arange(200) % 2 == 0}}
    after = {"clusters": {"accuracy": 100.0, "correct": np.ones(200, bool)}}
    gained = changes_with_intervals(before, after, targets)["clusters"]
    assert 40 < gained["low"] < 47 < 53 < gained["high"] < 60


def test_the_interval_of_low_shot_is_that_of_the_svm_for_one_draw_and_smaller_for_several():
    draw = np.random.default_rng(1)
    targets = np.eye(2, dtype=np.int64)[draw.integers(0, 2, 60)]
    one, two = (targets * s + draw.normal(size=(8, 60, 2)) for s in (0.5, 1.0))
    svm = [{"svm": {"mAP": 0.0, "per_class": [1.0, 1.0], "scores": part[0]}} for part in (one, two)]
    interval = changes_with_intervals(*svm, targets)["svm"]

    def low_shot(scores):
        return {"low_shot": {"mAP": 0.0, "per_class": [1.0, 1.0], "scores": {"1": scores[:4], "2": scores[4:]}}}

    same_draw = [low_shot(np.repeat(part[:1], 8, axis=0)) for part in (one, two)]
    repeated = changes_with_intervals(*same_draw, targets)["low_shot"]
    assert [repeated["low"], repeated["high"]] == pytest.approx([interval["low"], interval["high"]])
    several = changes_with_intervals(low_shot(one), low_shot(two), targets)["low_shot"]
    assert several["high"] - several["low"] < interval["high"] - interval["low"]
