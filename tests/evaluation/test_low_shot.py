"""Low-shot SVMs: the draws, the reference in float64, and which cost is chosen."""

import numpy as np
import pytest
from sklearn.svm import LinearSVC

from odcft.errors import OdcftError
from odcft.evaluation import low_shot as module
from odcft.evaluation.low_shot import draw_rows, low_shot
from odcft.evaluation.svm import average_precision

COSTS = (1.0, 0.01, 100.0)


def noisy(classes_N, C=3, noise=0.7, seed=0):
    draw = np.random.default_rng(seed)
    return np.eye(C, 6)[classes_N] + noise * draw.normal(size=(len(classes_N), 6))


def one_hot(classes_N, C=3):
    return np.eye(C, dtype=np.int64)[classes_N]


def test_a_draw_has_k_images_with_the_class_and_k_of_every_other_class_without_it():
    targets = np.array([1] * 10 + [0] * 40 + [-1] * 10)
    rows = draw_rows(targets, 4, 6, 0, 0, 0)
    assert (targets[rows] == 1).sum() == 4
    assert (targets[rows] == 0).sum() == 20
    assert len(set(rows.tolist())) == 24  # so none is difficult
    assert rows.tolist() == draw_rows(targets, 4, 6, 0, 0, 0).tolist()
    for other in [(1, 0, 0), (0, 1, 0), (0, 0, 1)]:  # of another seed, draw, class
        assert rows.tolist() != draw_rows(targets, 4, 6, *other).tolist()
    assert (targets[draw_rows(targets, 10, 6, 0, 0, 0)] == 0).sum() == 40  # there are no 50


def reference(train, train_NC, test, test_NC, k, cost, draw, seed=0):
    """Average precisions of the classes on the test images and on the training images left over, by LinearSVC alone."""
    train, test = (part / (np.linalg.norm(part, axis=1, keepdims=True) + 1e-5) for part in (train, test))
    precisions = []
    for c in range(train_NC.shape[1]):
        rows = draw_rows(train_NC[:, c], k, train_NC.shape[1], seed, draw, c)
        svm = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, tol=1e-4, dual=True, max_iter=2000, random_state=0)
        svm.fit(train[rows], np.where(train_NC[rows, c] == 1, 1, -1))
        rest = np.array([row for row in range(len(train)) if row not in rows and train_NC[row, c] != -1])
        certain = test_NC[:, c] != -1
        tested = average_precision(test_NC[certain, c] == 1, svm.decision_function(test[certain]))
        precisions.append((tested, average_precision(train_NC[rest, c] == 1, svm.decision_function(train[rest]))))
    return 100 * np.mean(precisions, 0)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_it_equals_a_reference_that_fits_every_svm_by_itself():
    train_N, test_N = np.arange(60) % 3, np.arange(30) % 3
    train, test = noisy(train_N), noisy(test_N, seed=1)
    train_NC, test_NC = one_hot(train_N), one_hot(test_N)
    train_NC[1, 0] = test_NC[1, 0] = -1
    results = low_shot(train, train_NC, test, test_NC, shots=(1, 4), costs=COSTS)
    for k in (1, 4):
        table = np.array(
            [[reference(train, train_NC, test, test_NC, k, cost, draw) for draw in range(5)] for cost in COSTS]
        ).mean(1)  # cost, (tested, validated)
        best, chosen = int(table[:, 0].argmax()), int(table[:, 1].argmax())
        assert results["per_k"][str(k)] == pytest.approx(table[chosen, 0], abs=1e-9)
        assert results["costs"][str(k)] == COSTS[chosen]
        assert results["oracle"]["per_k"][str(k)] == pytest.approx(table[best, 0], abs=1e-9)
        assert results["oracle"]["costs"][str(k)] == COSTS[best]
    assert results["mAP"] == pytest.approx(np.mean(list(results["per_k"].values())))
    assert results["oracle"]["mAP"] >= results["mAP"]
    assert results["mAP"] == pytest.approx(np.mean(results["per_class"]))
    assert (results["seed"], results["draws"], results["too_few"], results["left_out"]) == (0, 5, {}, {})
    # The scores are those of the chosen costs.
    precisions = [
        100 * average_precision(test_NC[test_NC[:, c] != -1, c] == 1, scores[test_NC[:, c] != -1, c])
        for scores in results["scores"]["4"]
        for c in range(3)
    ]
    assert np.mean(precisions) == pytest.approx(results["per_k"]["4"])


def test_another_seed_gives_other_draws_and_the_same_seed_the_same():
    train_N = np.arange(60) % 3
    train, targets = noisy(train_N), one_hot(train_N)
    first, again, other = (
        low_shot(train, targets, train, targets, shots=(2,), costs=COSTS, seed=seed) for seed in (0, 0, 1)
    )
    assert first["scores"]["2"].tolist() == again["scores"]["2"].tolist()
    assert first["scores"]["2"].tolist() != other["scores"]["2"].tolist()


def test_the_cost_is_not_chosen_on_the_test_images(monkeypatch):
    """Whatever the test images are, the costs stay: those of the oracle would change."""
    train_N = np.arange(60) % 3
    train, targets = noisy(train_N), one_hot(train_N)
    test = noisy(train_N, seed=2)
    right = low_shot(train, targets, test, targets, shots=(2,), costs=(1e-6, 10.0))
    wrong = low_shot(train, targets, test, targets[::-1], shots=(2,), costs=(1e-6, 10.0))
    assert right["costs"] == wrong["costs"]
    assert right["oracle"]["per_k"] != wrong["oracle"]["per_k"]


def test_numbers_that_a_class_has_not_enough_images_for_are_named_and_not_measured():
    classes_N = np.array([0] * 9 + [1] * 30 + [2] * 8)
    results = low_shot(noisy(classes_N), one_hot(classes_N), noisy(classes_N), one_hot(classes_N), costs=COSTS)
    assert list(results["per_k"]) == ["1", "2", "4", "8"]
    assert results["too_few"] == dict.fromkeys(["16", "32", "64", "96"], "a class has only 8 training images")
    # A draw of all images of a class leaves none to validate on: the other classes choose the cost.
    assert all(np.isfinite(list(results["costs"].values())))


def test_a_number_that_leaves_no_image_over_takes_the_cost_of_the_one_before():
    classes_N = np.arange(24) % 3
    results = low_shot(
        noisy(classes_N), one_hot(classes_N), noisy(classes_N), one_hot(classes_N), shots=(4, 8), costs=COSTS
    )
    assert results["costs"]["8"] == results["costs"]["4"]


def test_classes_that_cannot_be_measured_are_left_out_or_refused():
    classes_N = np.arange(30) % 3
    train, test = one_hot(classes_N), one_hot(classes_N)
    train[:, 2] = [1] * 10 + [-1] * 20
    test[:, 1] = 0
    results = low_shot(noisy(classes_N), train, noisy(classes_N), test, shots=(1,), costs=COSTS)
    assert results["left_out"] == {1: "no test image", 2: "no training image without it that is not difficult"}
    assert results["per_class"][1:] == [None, None]
    with pytest.raises(OdcftError, match="--protocol low-shot: no class can be measured; the first has no test image"):
        low_shot(noisy(classes_N), one_hot(classes_N), noisy(classes_N), 0 * test)


def test_more_than_fits_into_memory_is_refused(monkeypatch):
    classes_N = np.arange(30) % 3
    monkeypatch.setattr(module, "MAX_SCORES", 2 * 5 * 30 * 3 - 1)
    with pytest.raises(OdcftError, match="3 classes and 30 test images are too many"):
        low_shot(noisy(classes_N), one_hot(classes_N), noisy(classes_N), one_hot(classes_N), shots=(1, 2))


def test_every_class_is_a_step_of_progress(monkeypatch):
    classes_N, steps = np.arange(30) % 3, []
    arrays = (noisy(classes_N), one_hot(classes_N)) * 2
    low_shot(*arrays, shots=(1,), costs=COSTS, left_out={1: ""}, advance=steps.append)
    assert steps == [1, 1, 1]
    monkeypatch.setattr(module, "DRAWS", 1)
    assert low_shot(*arrays, shots=(1,), costs=COSTS)["scores"]["1"].shape == (1, 30, 3)
