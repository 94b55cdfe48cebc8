"""Linear classifiers: the published schedule, and logistic regression."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from odcft.evaluation import linear as module
from odcft.evaluation.linear import count_of_steps, linear


def noisy(count, noise, seed=0, C=4, width=12):
    draw = np.random.default_rng(seed)
    class_N = draw.integers(0, C, count)
    return (np.eye(C, width)[class_N] + noise * draw.normal(size=(count, width))).astype(np.float32), class_N


def test_every_layer_has_its_own_classifier_and_the_last_counts():
    (good, train_N), (good_test, test_N) = noisy(257, 0.3), noisy(100, 0.3, seed=1)  # 257: batches of 129 and 128
    bad, bad_test = np.random.default_rng(2).normal(size=(257, 5)), np.random.default_rng(3).normal(size=(100, 5))
    results = linear({"stem": bad, "top": good}, train_N, {"stem": bad_test, "top": good_test}, test_N)
    assert results["per_layer"].keys() == {"stem", "top"}
    assert results["top1"] == results["per_layer"]["top"] == 100 * (results["predicted"] == test_N).mean()
    assert results["top1"] > 90
    assert results["per_layer"]["stem"] < 50
    assert results["logistic"]["per_layer"]["stem"] < 50
    assert results["logistic"]["top1"] > 90
    # A layer's classifier does not depend on the other layers.
    alone = linear({"top": good}, train_N, {"top": good_test}, test_N)
    assert alone["predicted"].tolist() == results["predicted"].tolist()


def test_the_schedule_is_the_published_one(monkeypatch):
    train, train_N = noisy(600, 0.5)
    seen = []

    class Recorded(torch.optim.SGD):
        def step(self, *args):
            seen.append((self.param_groups[0]["lr"], len(self.param_groups[0]["params"])))
            return super().step(*args)

    monkeypatch.setattr(torch.optim, "SGD", Recorded)
    monkeypatch.setattr(module, "LOGISTIC_ROWS", 0)
    results = linear({"a": train, "b": train}, train_N, {"a": train, "b": train}, train_N)
    rates = [rate for rate, _ in seen[::3]]  # three batches of 200 an epoch
    assert len(seen) == 270
    assert rates == pytest.approx([0.01] * 30 + [0.001] * 30 + [0.0001] * 30)
    assert {count for _, count in seen} == {4}  # weights and biases of two layers, together
    assert "logistic" not in results


def test_logistic_regression_is_scikit_learns():
    (train, train_N), (test, test_N) = noisy(300, 0.8), noisy(200, 0.8, seed=1)
    results = linear({"last": train}, train_N, {"last": test}, test_N, epochs=1)["logistic"]
    scaler = StandardScaler().fit(train)
    chosen = LogisticRegression(C=results["costs"]["last"], max_iter=5000).fit(scaler.transform(train), train_N)
    assert results["top1"] == pytest.approx(100 * chosen.score(scaler.transform(test), test_N), abs=0.5)
    worst = LogisticRegression(C=1e-6).fit(scaler.transform(train), train_N)
    assert results["top1"] > 100 * worst.score(scaler.transform(test), test_N) + 5


def test_the_cost_of_logistic_regression_is_the_best_in_cross_validation(monkeypatch):
    """A cost that is far too small loses wherever it stands, and of equal ones the first is taken."""
    train, train_N = noisy(120, 0.5)
    for costs, best in (((1e-7, 0.1), 0.1), ((0.1, 1e-7), 0.1), ((0.1, 0.1000001), 0.1)):
        monkeypatch.setattr(module, "LOGISTIC_COSTS", costs)
        results = linear({"last": train}, train_N, {"last": train}, train_N, epochs=1)
        assert results["logistic"]["costs"] == {"last": best}


@pytest.mark.parametrize("scale", [1e-9, 1, 1e30, 1e150])
def test_the_scale_of_the_features_does_not_matter(scale):
    (train, train_N), (test, test_N) = noisy(200, 0.3), noisy(100, 0.3, seed=1)
    train, test = ((part + 3) * np.float64(scale) for part in (train, test))
    results = linear({"last": train}, train_N, {"last": test}, test_N)
    assert results["top1"] > 85
    assert results["logistic"]["top1"] > 85


def test_the_same_seed_gives_the_same_and_a_constant_feature_is_no_harm():
    train, train_N = noisy(100, 1.0)
    train[:, 3] = 7
    one, two = (linear({"last": train}, train_N, {"last": train}, train_N, epochs=3) for _ in range(2))
    assert one["predicted"].tolist() == two["predicted"].tolist()
    assert np.isfinite(one["top1"])


def test_two_images_are_enough():
    results = linear({"last": np.eye(2)}, np.array([0, 1]), {"last": np.eye(2)}, np.array([0, 1]), epochs=2)
    assert results["logistic"]["top1"] == 100


def test_progress_counts_epochs_and_layers():
    train, train_N = noisy(50, 0.5)
    steps = []
    linear({"last": train}, train_N, {"last": train}, train_N, epochs=4, advance=steps.append)
    assert len(steps) == count_of_steps(1, 50, epochs=4) == 5
    assert count_of_steps(2, 20_001) == 90
