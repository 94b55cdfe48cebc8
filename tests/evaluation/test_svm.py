"""VOC07 SVM on small features: the protocol, and which classes count."""

import joblib
import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.svm import LinearSVC

from odcft.errors import OdcftError
from odcft.evaluation import svm
from odcft.evaluation.svm import average_precision, average_precision_of_ranking, unmeasurable_classes, voc07_svm


def features(targets_NC, noise=0.0, seed=0):
    """Noisy features with one column per class and a constant one, not of unit length."""
    draw = np.random.default_rng(seed)
    clean = np.c_[(targets_NC == 1).astype(np.float32), np.ones(len(targets_NC))]
    return (clean + noise * draw.normal(size=clean.shape)) * draw.uniform(0.5, 4, (len(clean), 1))


def one_hot(labels, C=3):
    return np.eye(C, dtype=np.int64)[np.array(labels)]


def reference(train, sign, test, dual, costs=svm.COSTS):
    """Cost and scores computed as in the reference scripts, with cross_val_score."""

    def make_svm(cost):
        return LinearSVC(
            **{"C": cost, "class_weight": {1: 2, -1: 1}, "intercept_scaling": 1.0, "tol": 1e-4, "dual": dual},
            **{"penalty": "l2", "loss": "squared_hinge", "max_iter": 2000, "random_state": 0},
        )

    train, test = (part / (np.linalg.norm(part, axis=1, keepdims=True) + 1e-5) for part in (train, test))
    folds = StratifiedKFold(3)
    means = [
        cross_val_score(make_svm(cost), train, sign, cv=folds, scoring="average_precision").mean() for cost in costs
    ]
    cost = costs[int(np.argmax(means))]
    return cost, make_svm(cost).fit(train, sign).decision_function(test)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("dual", [True, False])
def test_costs_and_scores_are_those_of_the_reference_scripts(dual, monkeypatch):
    labels = np.arange(90) % 3
    train, test = features(one_hot(labels), 0.9), features(one_hot(labels), 0.9, seed=1)
    monkeypatch.setattr(svm, "DUAL_ROWS", 90 if dual else 89)
    results = voc07_svm(train, one_hot(labels), test, one_hot(labels))
    for c in range(3):
        cost, scores = reference(train, np.where(labels == c, 1, -1), test, dual)
        assert results["costs"][c] == cost
        assert results["scores"][:, c].tolist() == scores.tolist()
        assert results["per_class"][c] == 100 * average_precision(labels == c, scores)
    assert results["mAP"] == pytest.approx(np.mean(results["per_class"]))
    assert 50 < results["mAP"] < 99
    assert results["left_out"] == {}


@pytest.mark.filterwarnings("error")
def test_at_high_costs_it_stops_after_2000_iterations_without_a_warning():
    labels = np.arange(90) % 3
    train = features(one_hot(labels), 0.9)
    results = voc07_svm(train, one_hot(labels), train, one_hot(labels), (1e4,))
    with pytest.warns(ConvergenceWarning):
        _, scores = reference(train, np.where(labels == 0, 1, -1), train, True, (1e4,))
    assert results["scores"][:, 0].tolist() == scores.tolist()


def test_average_precision_is_the_area_under_the_envelope():
    present = np.array([True, False, True, False])
    assert average_precision(present, np.array([4.0, 3.0, 2.0, 1.0])) == pytest.approx((1 + 2 / 3) / 2)
    # the envelope lifts the second hit's precision of 1/2 to the 2/3 that follows it
    present = np.array([True, False, False, True, True])
    assert average_precision(present, -np.arange(5.0)) == pytest.approx((1 + 0.6 + 0.6) / 3)
    assert average_precision_of_ranking(np.array([False, True])) == 0.5
    assert average_precision_of_ranking(np.array([False, False])) == 0
    assert average_precision(np.array([False, True]), np.zeros(2)) == 0.5  # equal scores stay in order


def test_a_class_without_a_test_image_is_left_out_of_the_mean():
    train, test = one_hot([0, 1, 2] * 4), one_hot([0, 1] * 4)
    results = voc07_svm(features(train), train, features(test), test)
    assert results["mAP"] == 100
    assert results["per_class"] == [100, 100, None]
    assert results["costs"][:2] == [1.0, 1.0]
    assert results["costs"][2] is None
    assert results["left_out"] == {2: "no test image"}
    assert not results["scores"][:, 2].any()


def test_a_class_with_one_training_image_is_left_out_but_not_one_with_two():
    train, test = one_hot([0] * 5 + [1] * 5 + [2]), one_hot([0, 1, 2] * 3)
    results = voc07_svm(features(train), train, features(test), test)
    assert results["left_out"] == {2: "1 training image, but 2 are needed"}
    assert results["mAP"] == 100
    train = one_hot([0] * 5 + [1] * 5 + [2] * 2)
    results = voc07_svm(features(train), train, features(test), test)
    assert results["left_out"] == {}
    assert results["per_class"] == [100, 100, 100]


@pytest.mark.filterwarnings("error")  # scikit-learn warns if a fold lacks a class
@pytest.mark.parametrize("rare", [0, 1])
def test_two_images_with_or_without_a_class_are_cross_validated_in_two_folds(rare):
    train, test = np.array([[rare]] * 2 + [[1 - rare]] * 6), np.array([[0], [1]] * 3)
    results = voc07_svm(features(train), train, features(test), test)
    assert results["per_class"] == [100]


def test_why_a_class_cannot_be_measured_is_reported():
    train = np.array([[1, 1, 0, 1, 1], [1, 1, 0, 1, 1], [1, 0, 0, 0, 1], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]])
    test = np.array([[1, 1, 1, 1, 1], [0, 0, 0, 1, -1], [0, 0, 0, -1, 0]])
    assert unmeasurable_classes(train, test) == {
        0: "no training image without it, but 2 are needed",
        1: "1 training image without it, but 2 are needed",
        2: "no training image, but 2 are needed",
        3: "no test image without it",  # except one marked difficult
    }
    with pytest.raises(OdcftError, match=r"no class can be measured; the first has no test image"):
        voc07_svm(features(train[:, 4:]), train[:, 4:], np.ones((2, 2)), np.array([[0], [-1]]))


def test_classes_are_left_out_for_the_reasons_given():
    targets = one_hot([0, 1, 2] * 4)
    results = voc07_svm(features(targets), targets, features(targets), targets, left_out={1: "too few"})
    assert results["left_out"] == {1: "too few"}
    assert results["per_class"] == [100, None, 100]


def test_difficult_images_are_negatives_in_training_and_left_out_of_the_test():
    train, test = one_hot([0, 1, 2] * 6), one_hot([0, 1, 2] * 6)
    X, Y = features(train, 0.3), features(test, 0.8, seed=1)
    difficult = np.where((train == 0) & (np.arange(18) % 4 == 0)[:, None], -1, train)
    plain, marked = voc07_svm(X, train, Y, test), voc07_svm(X, difficult, Y, difficult)
    assert marked["scores"].tolist() == plain["scores"].tolist()
    for c in range(3):
        certain = difficult[:, c] != -1
        assert marked["per_class"][c] == 100 * average_precision(test[certain, c] == 1, plain["scores"][certain, c])
    assert marked["per_class"] != plain["per_class"]


def test_every_class_is_a_step_of_progress():
    targets, steps = one_hot([0, 1, 2] * 4), []
    voc07_svm(features(targets), targets, features(targets), targets, advance=steps.append)
    assert steps == [0, 1, 1, 1]
    steps.clear()
    voc07_svm(features(targets), targets, features(targets), targets, left_out={0: ""}, advance=steps.append)
    assert steps == [1, 1, 1]


def test_small_sets_are_fitted_in_this_process_and_large_ones_in_several(monkeypatch):
    targets = one_hot([0, 1, 2] * 4)
    X, asked, workers = features(targets), [], []

    def parallel(n_jobs, return_as, real=joblib.Parallel):
        asked.append(n_jobs)
        return real(n_jobs=1, return_as=return_as)

    monkeypatch.setattr("joblib.Parallel", parallel)
    monkeypatch.setattr("joblib.cpu_count", lambda: 2)
    monkeypatch.setattr("odcft.distributed.stop_signals.ignore_signals_in_worker", lambda: workers.append(1))
    for worth in (svm.PARALLEL_ABOVE, X.size * 3, X.size * 3 - 1):
        monkeypatch.setattr(svm, "PARALLEL_ABOVE", worth)
        voc07_svm(X, targets, X, targets, (1.0,))
    assert asked == [1, 1, 2]
    assert len(workers) == 3
    voc07_svm(X, targets, X, targets, (1.0,), left_out={0: "", 1: ""})
    assert asked[-1] == 1


@pytest.mark.slow
def test_several_processes_give_the_same_bits(monkeypatch):
    targets = one_hot([0, 1, 2] * 20)
    X, Y = features(targets, 0.9), features(targets, 0.9, seed=1)
    alone = voc07_svm(X, targets, Y, targets)
    monkeypatch.setattr(svm, "PARALLEL_ABOVE", 0)
    monkeypatch.setattr("joblib.cpu_count", lambda: 2)
    together = voc07_svm(X, targets, Y, targets)
    assert together["scores"].tolist() == alone["scores"].tolist()
    assert together["costs"] == alone["costs"]


def test_more_features_than_images_are_rotated_into_fewer_without_changing_the_result(monkeypatch):
    labels, draw = np.arange(60) % 3, np.random.default_rng(0)
    train, test = (
        np.c_[features(one_hot(labels), 0.9, seed), 0.2 * draw.normal(size=(60, 90))].astype(np.float32)
        for seed in (0, 1)
    )
    rotated = voc07_svm(train, one_hot(labels), test, one_hot(labels))
    assert svm.in_span_of_first(train, test)[1].shape == (60, 60)
    monkeypatch.setattr(svm, "in_span_of_first", lambda *parts: parts)
    whole = voc07_svm(train, one_hot(labels), test, one_hot(labels))
    assert rotated["costs"] == whole["costs"]
    assert rotated["scores"] == pytest.approx(whole["scores"], abs=1e-9)
