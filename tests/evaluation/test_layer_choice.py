"""The layer is chosen on the training images; what the test images would choose is shown beside."""

import numpy as np
import pytest

from odcft.errors import OdcftError
from odcft.evaluation.layer_choice import check_layers, evaluate_layers
from odcft.evaluation.protocols import Split

DRAW = np.random.default_rng(0)


def split(signal_train, signal_test, classes=3, count=60):
    """Features of noise and, for training and test images, the class with a given strength."""
    class_N = np.arange(count) % classes
    targets = np.eye(classes, dtype=np.int64)[class_N]
    train, test = (
        (DRAW.normal(size=(count, 8)) + strength * np.eye(8)[class_N]).astype(np.float32)
        for strength in (signal_train, signal_test)
    )
    return Split(train, targets, test, targets)


@pytest.mark.parametrize("protocol", ["svm", "knn"])
def test_best_is_chosen_on_training_images(protocol):
    splits = {"stem": split(0.1, 20), "stage": split(20, 5), "last": split(1, 1)}
    metric = {"svm": "mAP", "knn": "top1"}[protocol]
    result = evaluate_layers(splits, [protocol], "best")[protocol]
    assert result["layer"] == "stage"
    assert result[metric] == result["per_layer"]["stage"][metric]
    assert list(result["per_layer"]) == ["stem", "stage", "last"]
    assert all(0 <= figures["cv"] <= 100 for figures in result["per_layer"].values())
    highest = max(figures[metric] for figures in result["per_layer"].values())
    assert result["best_on_test"][metric] == highest


def test_all_keeps_the_result_of_the_last_layer():
    splits = {"stage": split(20, 20), "last": split(1, 1)}
    alone = evaluate_layers(splits, ["knn"], "last")["knn"]
    result = evaluate_layers(splits, ["knn"], "all")["knn"]
    assert "per_layer" not in alone
    assert result["top1"] == alone["top1"]
    assert result["layer"] == "last"
    assert result["best_on_test"]["layer"] == "stage"


def test_unknown_choice_is_refused():
    with pytest.raises(OdcftError, match=r"--layers top: choose last, all or best\."):
        check_layers("top")
