"""The verdict without labels: what it says of features that got better, worse or collapsed, and when it abstains."""

import json

import numpy as np
import pytest

from odcft.evaluation.unlabelled import measure
from odcft.evaluation.unlabelled_verdict import (
    BETTER,
    CANNOT_TELL,
    TABLE,
    WORSE,
    calibration,
    change_of,
    judge,
    said_of,
    verdict,
)


def features(signal=1.0, noise=0.3, width=48, seed=0):
    """Images of 40 kinds, in two noisy views: clean (400, F) and views (400, 2, F)."""
    draw = np.random.default_rng(seed)
    kind = np.arange(400) % 40
    clean = signal * draw.normal(size=(40, width))[kind] + draw.normal(size=(400, width))
    return clean, clean[:, None] + noise * draw.normal(size=(400, 2, width))


def measured(clean, views):
    return measure(clean.astype(np.float32), views.astype(np.float32))


def test_the_same_features_and_those_of_other_views_cannot_be_told_apart():
    before = measured(*features())
    assert verdict(before, before) == CANNOT_TELL
    clean, _ = features()
    again = clean[:, None] + 0.3 * np.random.default_rng(7).normal(size=(400, 2, 48))
    assert verdict(before, measured(clean, again)) == CANNOT_TELL


def test_steadier_neighbours_at_the_same_rank_are_better():
    assert verdict(measured(*features(noise=1.0)), measured(*features(noise=0.5))) == BETTER
    assert verdict(measured(*features(noise=0.5)), measured(*features(noise=0.9))) != BETTER


@pytest.mark.parametrize("dimensions", [1, 4])
def test_collapse_is_worse_however_steady_the_neighbours(dimensions):
    clean, views = features()
    kept = np.where(np.arange(48) < dimensions, 1.0, 1e-3)
    steady = np.repeat((clean * kept)[:, None], 2, 1)
    before, after = measured(clean, views), measured(clean * kept, steady)
    assert after["neighbour_agreement"] == 1
    assert verdict(before, after) == WORSE
    assert verdict(before, measured(np.ones_like(clean), np.ones_like(views))) == WORSE


def test_changes():
    before, after = {"lidar": 100.0, "spread": 0.5}, {"lidar": 50.0, "spread": 0.25}
    assert change_of("lidar", before, after) == pytest.approx(np.log(0.5))
    assert change_of("spread", before, after) == -0.25
    assert change_of("spread", {"spread": None}, after) == 0
    assert change_of("spread", {"spread": float("nan")}, after) == 0


def test_the_sentence_counts_the_runs_that_were_held_back():
    before = measured(*features())
    collapsed = measured(*(part * 0.1 ** np.arange(48) for part in features()))
    alike = [pair["svm"]["change"] for pair in calibration() if pair["held_back"] and said_of(pair) == WORSE]
    said, reason = judge(before, collapsed)
    assert said == WORSE
    assert reason.startswith("the features lost rank. ")
    assert f"In {sum(change < 0 for change in alike)} of our {len(alike)} runs" in reason
    assert judge(before, before)[1].startswith("the measures changed too little, or disagree. In ")


def test_the_table_of_runs():
    pairs = json.loads(TABLE.read_text())["pairs"]
    assert len(pairs) >= 40
    assert len({pair["name"] for pair in pairs}) == len(pairs)
    assert {pair["data"] for pair in pairs} >= {"cifar10", "caltech", "digits"}
    for half in (True, False):
        chosen = [pair for pair in pairs if pair["held_back"] is half]
        assert len(chosen) >= len(pairs) // 2 - 4
        assert len({pair["data"] for pair in chosen}) == 3
        assert len({pair["checkpoint"] for pair in chosen}) >= 3
    for pair in pairs:
        assert pair["svm"]["low"] <= pair["svm"]["change"] <= pair["svm"]["high"]
        assert pair["svm"]["after"] - pair["svm"]["before"] == pytest.approx(pair["svm"]["change"], abs=0.02)
