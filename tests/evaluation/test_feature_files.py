"""Features computed elsewhere: every form of targets, and every mistake in the arrays."""

import json

import numpy as np
import pytest
from evaluation_helpers import strict_json

from odcft.errors import OdcftError
from odcft.evaluation.feature_files import evaluate_file
from odcft.evaluation.results_table import json_values


def arrays(**changed):
    """Features of three classes that are easy to tell apart, with some arrays replaced."""
    labels = np.arange(60) % 3
    features = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32) + 5 * np.eye(3, 5)[labels]
    made = {"train_features": features[:30], "train_targets": labels[:30]}
    return {**made, "test_features": features[30:], "test_targets": labels[30:], **changed}


@pytest.mark.parametrize("form", ["numbers", "names", "floats", "rows", "difficult"])
def test_features_computed_elsewhere(tmp_path, form):
    given = arrays()
    for name in ("train_targets", "test_targets"):
        labels = given[name]
        rows = np.eye(3, dtype=np.int64)[labels]
        if form == "difficult":
            rows[:6][rows[:6] == 0] = -1
        given[name] = {
            **{"numbers": labels, "names": np.array(["x", "y", "z"])[labels], "floats": labels.astype(float)},
            **{"rows": rows.astype(np.int8), "difficult": rows},
        }[form]
    path = tmp_path / "f.npz"
    np.savez(path, **given)
    results = evaluate_file(path, ["svm", "knn"])
    assert results["svm"]["mAP"] > 95
    assert results["knn"]["top1"] > 95
    assert (results["train_images"], results["test_images"]) == (30, 30)
    assert len(results["classes"]) == 3
    assert strict_json(json.dumps(json_values(results)))["classes"] == results["classes"]


def test_a_perfect_classifier_of_two_of_three_classes_is_perfect(tmp_path, odcft_command):
    given = arrays()
    kept = given["test_targets"] < 2
    path = tmp_path / "f.npz"
    np.savez(path, **{**given, **{name: given[name][kept] for name in ("test_features", "test_targets")}})
    code, out, err = odcft_command("evaluate", "--features", path, "--json", "--protocol", "svm")
    assert code == 0
    assert strict_json(out)["svm"]["mAP"] > 99
    assert strict_json(out)["svm"]["left_out"] == {"2": "no test image"}
    assert "    2: no test image" in err.splitlines()


@pytest.mark.parametrize("dtype", [">f4", "f2", "u2", "i8", "g"])
def test_features_of_any_type_of_number(tmp_path, dtype):
    path = tmp_path / "f.npz"
    given = arrays()
    features = {name: (given[name] + 20).astype(dtype) for name in ("train_features", "test_features")}
    np.savez(path, **{**given, **features})
    results = evaluate_file(path, ["knn", "linear", "clusters"])
    assert results["knn"]["top1"] > 85
    assert results["linear"]["top1"] > 85
    assert results["clusters"]["accuracy"] > 55


def nan(features):
    return np.where(np.arange(features.size).reshape(features.shape) == 7, np.nan, features)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"train_features": nan(arrays()["train_features"])}, "1 of 30 rows of train_features hold NaN or infinite"),
        ({"test_features": arrays()["test_features"] + np.inf}, "30 of 30 rows of test_features hold NaN or infinite"),
        (
            {"test_features": np.full((30, 5), -1e151)},
            r"test_features holds numbers above 1e\+150, whose squares overflow",
        ),
        ({"train_features": np.zeros((30, 2, 2))}, "train_features must be numbers with one row per image"),
        ({"train_features": np.zeros((30, 5), complex)}, "must be numbers with one row per image, not complex128"),
        ({"test_features": np.array([["1"] * 5] * 30)}, "test_features must be numbers"),
        ({"test_features": np.zeros((30, 4))}, "train_features has 5 columns and test_features 4: make them equal"),
        ({"train_features": np.zeros((0, 5)), "train_targets": np.zeros(0, int)}, "train_features is empty"),
        ({"test_features": np.zeros((0, 5)), "test_targets": np.zeros(0, int)}, "test_features is empty"),
        ({"train_targets": np.zeros(29, int)}, r"train_targets has shape \(29,\), but train_features has 30 rows"),
        ({"test_targets": np.zeros((30, 3), int)}, r"shape \(30,\) does not match test_targets of shape \(30, 3\)"),
        ({"train_targets": np.array(3), "test_targets": np.array(3)}, r"train_targets has shape \(\)"),
        ({"train_targets": np.full(30, 0.5)}, "train_targets must be whole class numbers or names, not float64"),
        ({"train_targets": np.full(30, np.nan)}, "train_targets must be whole class numbers"),
        ({"train_targets": np.array(["x", "y"] * 15)}, "must both be numbers, or both names"),
        ({"train_targets": np.zeros(30, int)}, r"train_targets has only one class \(0\)"),
        ({"test_targets": np.full(30, 7)}, "test_targets has a class that train_targets does not have: 7"),
        ({"test_targets": np.array([None] * 30)}, r"is not an \.npz file with"),
        (
            {"train_targets": np.full((30, 2), 2), "test_targets": np.zeros((30, 2), int)},
            "train_targets may hold only 1 .present., 0 .absent. and -1",
        ),
        (
            {"train_targets": np.zeros((30, 2), int), "test_targets": np.full((30, 2), np.nan)},
            "test_targets may hold only 1",
        ),
        ({"train_targets": np.zeros((30, 2), int), "test_targets": np.zeros((30, 2), int)}, "exactly one label"),
    ],
)
def test_arrays_that_do_not_match_are_refused(tmp_path, odcft_command, changed, words):
    path = tmp_path / "f.npz"
    np.savez(path, **arrays(**changed))
    with pytest.raises(OdcftError, match=words):
        evaluate_file(path, ["svm", "knn"])
    code, out, err = odcft_command("evaluate", "--features", path, "--json")
    assert (code, out) == (2, "")
    assert "Traceback" not in err


@pytest.mark.parametrize("what", ["no array", "empty", "cut", "text", "npy", "folder", "missing"])
def test_files_that_hold_no_features_are_refused(tmp_path, what):
    path = tmp_path / "f.npz"
    np.savez_compressed(path, **arrays())
    if what == "no array":
        np.savez(path, rows=np.zeros(3))
    elif what == "cut":
        path.write_bytes(path.read_bytes()[:900])
    elif what in ("empty", "text"):
        path.write_bytes(b"" if what == "empty" else b"features\n1,2,3\n")
    elif what == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    else:
        path.unlink()
        if what == "folder":
            path.mkdir()
    with pytest.raises(OdcftError, match=r"is not an \.npz file with") as refused:
        evaluate_file(path, ["knn"])
    assert "unsafe" not in str(refused.value)


def test_an_archive_that_expands_beyond_reason_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("odcft.evaluation.feature_files.MAX_EXPANDED", 1000)
    path = tmp_path / "f.npz"
    np.savez_compressed(path, **arrays(), more=np.zeros(1_000_000))
    with pytest.raises(OdcftError, match="bytes expand to 8,0"):
        evaluate_file(path, ["knn"])


def test_labels_that_are_no_texts_or_too_many_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "f.npz"
    np.savez(path, features=np.ones((4, 2), np.float32), labels=np.array("a"))
    with pytest.raises(OdcftError, match=r"their shape is \(\)"):
        evaluate_file(path, ["knn"])
    np.savez(path, features=np.ones((4, 2), np.float32), labels=np.array(list("abcd")))
    monkeypatch.setattr("odcft.evaluation.feature_files.MAX_TARGETS", 10)
    with pytest.raises(OdcftError, match="4 classes of 4 images are too many"):
        evaluate_file(path, ["knn"])
