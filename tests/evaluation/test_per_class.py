"""The figures of each class, on request."""

import numpy as np
import pytest
from evaluation_helpers import strict_json

from odcft.evaluation.per_class import add_per_class, per_class_lines
from odcft.evaluation.results_table import json_values

TEST_N = np.array([0, 0, 0, 1])
TEST_NC, TRAIN_NC = np.eye(3, dtype=np.int64)[TEST_N], np.eye(3, dtype=np.int64)[[0, 1, 2]]


def results(predicted=(0, 0, 1, 1)):
    return {
        "svm": {"mAP": 50.0, "per_class": [40.0, 60.0, None]},
        "knn": {"top1": 75.0, "predicted": np.array(predicted)},
        "semi": {"per_fraction": {"1%": {"predicted": TEST_N}, "10%": {"predicted": np.array([0, 2, 2, 2])}}},
    }


def test_accuracy_and_precision_of_each_class():
    found = add_per_class(results(), ["ant", "predicted", "cow"], TRAIN_NC, TEST_NC)["per_class"]
    assert found["ant"] == {
        **{"train_images": 1, "test_images": 3, "svm": 40.0},
        **{"knn": pytest.approx(200 / 3), "semi": pytest.approx(100 / 3)},
    }
    assert found["predicted"] == {"train_images": 1, "test_images": 1, "svm": 60.0, "knn": 100.0, "semi": 0.0}
    assert found["cow"] == {"train_images": 1, "test_images": 0, "svm": None, "knn": None, "semi": None}
    assert set(json_values({"per_class": found})["per_class"]) == {"ant", "predicted", "cow"}


def test_of_a_run_both_figures_are_shown_and_of_columns_each_has_its_own():
    run = {**results(), "before": results((1, 1, 1, 1))}
    lines = per_class_lines(add_per_class(run, ["ant", "bee", "cow"], TRAIN_NC, TEST_NC))
    assert lines[0].split() == ["train", "test", "SVM", "AP", "kNN", "semi", "10", "%"]
    assert " ".join(lines[1].split()) == "ant 1 3 40.0 -> 40.0 0.0 -> 66.7 33.3 -> 33.3"
    assert " ".join(lines[3].split()) == "cow 1 0 none -> none none -> none none -> none"
    columns = add_per_class(
        {**results(), "columns": [results(), results((1, 1, 1, 1))]}, ["ant", "bee", "cow"], TRAIN_NC, TEST_NC
    )["columns"]
    assert [one["per_class"]["ant"]["knn"] for one in columns] == [pytest.approx(200 / 3), 0.0]


def test_it_is_printed_only_on_request(tmp_path, odcft_command):
    draw = np.random.default_rng(0)
    targets = np.repeat([0, 1], 20)
    features = draw.normal(size=(40, 4)) + targets[:, None]
    arrays = {"train_features": features, "train_targets": targets, "test_features": features, "test_targets": targets}
    np.savez(tmp_path / "f.npz", **arrays)
    command = ("evaluate", "--features", tmp_path / "f.npz", "--protocol", "knn", "--json")
    code, out, err = odcft_command(*command)
    assert code == 0
    assert "per_class" not in strict_json(out)
    assert "By class:" not in err
    code, out, err = odcft_command(*command, "--per-class")
    assert code == 0
    assert strict_json(out)["per_class"]["0"]["test_images"] == 20
    assert "By class:" in err.splitlines()
