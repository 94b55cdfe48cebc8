"""`odcft evaluate`: what is counted and said, a RUN beside its checkpoint, features made elsewhere."""

import json
import shutil

import numpy as np
import pytest
import torch

from odcft.errors import OdcftError
from odcft.evaluation.comparison import evaluate
from odcft.evaluation.confidence_intervals import changes
from odcft.evaluation.feature_files import evaluate_file
from odcft.evaluation.labels import labelled
from odcft.evaluation.protocols import check_protocols
from odcft.evaluation.table import lines, public
from odcft.progress import Progress


class Said(Progress):
    """Keeps what is said."""

    def __init__(self):
        super().__init__(every=0)
        self.lines = []

    def say(self, line):
        self.lines.append(line)


def strict(text):
    """JSON without NaN."""

    def refuse(name):
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


def test_evaluation_of_images(tmp_path, make_images, make_checkpoint):
    images, test = make_images(tmp_path / "images", 24), make_images(tmp_path / "test", 16, side=40)
    results = evaluate(str(make_checkpoint(tmp_path / "c.pth")), str(images), str(test), ["svm", "knn"])
    assert 50 < results["svm"]["mAP"] <= 100
    assert len(results["svm"]["per_class"]) == len(results["svm"]["costs"]) == 2
    assert results["knn"]["k"] == 20
    assert results["classes"] == ["a", "b"]


def test_what_is_left_out_is_counted_and_said(tmp_path, make_images, make_checkpoint, odcft_command):
    images = make_images(tmp_path / "images", 24)
    for name in ("a/x.png", "b/y.png", "b/z.png"):
        (images / name).write_bytes(b"no image")
    (images / "a" / "000.png").rename(images / "top.png")
    shutil.copy(images / "b" / "001.png", images / "b" / "again.png")
    code, out, err = odcft_command("evaluate", make_checkpoint(tmp_path / "c.pth"), images, "--json")
    assert code == 0
    values = strict(out)
    counts = {name: value for name, value in values.items() if isinstance(value, int)}
    assert counts == {
        **{"images": 28, "train_images": 12, "test_images": 11},
        **{"unreadable": 3, "unlabelled": 1, "copies": 1, "overlap": 0, "contradictory": 0},
    }
    assert values["classes"] == ["a", "b"]
    assert set(values["svm"]) == {"mAP", "per_class", "costs", "left_out"}
    assert set(values["knn"]) == {"top1", "k"}
    said = err.splitlines()
    assert sum("Left out    3 of 28 images cannot be read: a/x.png (" in line for line in said) == 1
    assert "            1 of 28 images has no label: top.png" in said
    assert "            1 of 28 images is the same file as another: b/again.png" in said
    assert "Figures     2 classes, 12 images to learn from, 11 to test on" in said
    assert any(line.startswith("SVM: 2/2 classes") for line in said)


def test_copies_lift_nothing(tmp_path, make_images, make_checkpoint):
    """The same images three times give the figures of the images once."""
    images, checkpoint = make_images(tmp_path / "images", 24), str(make_checkpoint(tmp_path / "c.pth"))
    once = evaluate(checkpoint, str(images), progress=Said())
    for path in list(images.rglob("*.png")):
        for again in "xy":
            shutil.copy(path, path.with_name(f"{path.stem}{again}.png"))
    thrice = evaluate(checkpoint, str(images), progress=Said())
    assert thrice["copies"] == 48
    assert public({p: thrice[p] for p in ("svm", "knn")}) == public({p: once[p] for p in ("svm", "knn")})


def test_no_readable_image_is_refused_in_a_sentence(tmp_path, make_images, make_checkpoint, odcft_command):
    images = make_images(tmp_path / "images", 12)
    for path in images.rglob("*.png"):
        path.write_bytes(b"no image")
    code, out, err = odcft_command("evaluate", make_checkpoint(tmp_path / "c.pth"), images, "--json")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"odcft: None of the 12 images in {images} can be read; a/000.png: ")


def test_a_class_too_small_is_left_out_of_the_svm_by_name(tmp_path, make_images, make_checkpoint, odcft_command):
    images = make_images(tmp_path / "images", 24)
    for i in (0, 2, 4):
        (images / "c").mkdir(exist_ok=True)
        (images / "a" / f"{i:03d}.png").rename(images / "c" / f"{i}.png")
    code, out, err = odcft_command("evaluate", make_checkpoint(tmp_path / "c.pth"), images, "--json")
    assert code == 0
    svm = strict(out)["svm"]
    assert svm["per_class"][2] is None
    assert svm["costs"][2] is None
    assert svm["mAP"] == pytest.approx(np.mean(svm["per_class"][:2]))
    assert svm["left_out"] == {"c": "3 images, too few to hold a half out"}
    assert "  SVM mAP is the mean over 2 of 3 classes. Left out:" in err.splitlines()
    assert "    c: 3 images, too few to hold a half out" in err.splitlines()


def test_a_backbone_of_nan_is_refused(tmp_path, make_images, make_checkpoint, monkeypatch):
    images, checkpoint = make_images(tmp_path / "images", 12), str(make_checkpoint(tmp_path / "c.pth"))

    def broken(*args):
        return torch.full((12, 4), torch.nan), {}

    monkeypatch.setattr("odcft.data.feature_extraction.extract", broken)
    with pytest.raises(OdcftError, match=r"c\.pth gives features that are NaN or infinite for 12 of 12 images"):
        evaluate(checkpoint, str(images), progress=Said())


@pytest.fixture
def run(tmp_path, make_images, make_checkpoint, monkeypatch):
    """A RUN of a checkpoint that was named relative to the folder it was started in, and its images."""
    from odcft.recipe import load_recipe
    from odcft.train import fine_tune

    monkeypatch.chdir(tmp_path)
    images = str(make_images(tmp_path / "images", 24))
    make_checkpoint(tmp_path / "c.pth")
    overrides = ["optim.epochs=1", "optim.batch_size=8", "log.tensorboard=false"]
    fine_tune("c.pth", images, tmp_path / "runs" / "run", load_recipe("small", overrides), progress=Said())
    return tmp_path / "runs" / "run", images


def test_run_is_set_beside_its_checkpoint(run, tmp_path):
    results = evaluate(str(run[0]), run[1], None, ["knn"], progress=Said())
    alone = evaluate("c.pth", run[1], None, ["knn"], progress=Said())
    assert results["before"]["knn"]["top1"] == alone["knn"]["top1"]
    change = results["change"]["knn"]
    assert change["change"] == pytest.approx(results["knn"]["top1"] - alone["knn"]["top1"])
    assert change["low"] <= change["change"] <= change["high"]
    assert lines(results)[0].split() == ["before", "after", "change", "(95", "%", "interval)"]
    strict(json.dumps(public(results)))


def edit(path, **fields):
    about = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in {**about, **fields}.items() if value is not None}))


def test_its_checkpoint_is_found_from_another_folder_and_after_a_move(run, tmp_path, monkeypatch):
    folder, images = run
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "before" in evaluate(str(folder), images, None, ["knn"], progress=Said())
    edit(folder / "run.json", checkpoint_path=None)  # as runs of before this was written have it
    assert "before" in evaluate(str(folder), images, None, ["knn"], progress=Said())
    moved = tmp_path / "moved"
    shutil.move(folder, moved / "deep" / "run")
    shutil.move(tmp_path / "c.pth", moved / "c.pth")
    assert "before" in evaluate(str(moved / "deep" / "run"), images, None, ["knn"], progress=Said())
    monkeypatch.chdir(moved)
    shutil.move(moved / "deep" / "run", tmp_path / "run")
    assert "before" in evaluate(str(tmp_path / "run"), images, None, ["knn"], progress=Said())


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("gone", "c.pth, which the run was started from, is not here with the same contents"),
        ("changed", "c.pth, which the run was started from, is not here with the same contents"),
        ("no run.json", "run.json, which says where the run was started from, is missing or damaged"),
        ("numbers", "run.json, which says where the run was started from, is missing or damaged"),
        ("two", "run.json tells of 2 checkpoints, and the run has 1 networks"),
        ("name for a checksum", "/dev/zero, which the run was started from, is not here with the same contents"),
        ("unreadable", "is not here with the same contents"),
    ],
)
def test_a_run_without_its_checkpoint_says_so(run, tmp_path, what, reason):
    folder, images = run
    if what == "gone":
        (tmp_path / "c.pth").unlink()
    elif what == "changed":
        (tmp_path / "c.pth").write_bytes(b"another")
    elif what == "no run.json":
        (folder / "run.json").unlink()
    elif what == "numbers":
        edit(folder / "run.json", checkpoint=3)
    elif what == "two":
        edit(folder / "run.json", checkpoint=["c.pth"] * 2, checkpoint_path=["c.pth"] * 2, sha256=["0" * 64] * 2)
    elif what == "name for a checksum":
        edit(folder / "run.json", checkpoint="/dev/zero", checkpoint_path="/dev/zero", sha256="/dev/zero")
    else:
        edit(folder / "run.json", checkpoint="c\0.pth", checkpoint_path="c\0.pth")
    said = Said()
    results = evaluate(str(folder), images, None, ["knn"], progress=said)
    assert "before" not in results
    (line,) = (line for line in said.lines if line.startswith("Before"))
    assert reason in line


def test_what_is_no_run_needs_no_before(tmp_path, make_images, make_checkpoint):
    said = Said()
    images = str(make_images(tmp_path / "images", 12))
    results = evaluate(str(make_checkpoint(tmp_path / "c.pth")), images, None, ["knn"], progress=said)
    assert "before" not in results
    assert not any(line.startswith("Before") for line in said.lines)


def test_a_run_from_random_weights_has_its_before(tmp_path, make_images):
    from odcft.recipe import load_recipe
    from odcft.train import fine_tune

    images = str(make_images(tmp_path / "images", 24))
    overrides = ["optim.epochs=1", "optim.batch_size=8", "log.tensorboard=false", "seed=3"]
    fine_tune("scratch:test_resnet", images, tmp_path / "run", load_recipe("small", overrides), progress=Said())
    results = evaluate(str(tmp_path / "run"), images, None, ["knn"], progress=Said())
    assert set(results["before"]) == {"knn"}


def test_a_class_that_a_draw_lost_counts_in_neither_mean():
    """One image has the third class: about a third of the draws are without it, and it changes nothing there."""
    targets = np.eye(3, dtype=np.int64)[[0, 0, 0, 1, 1, 1, 2]]
    perfect = targets.astype(float)

    def result(scores):
        return {"svm": {"mAP": 100.0, "per_class": [100.0] * 3, "scores": scores}}

    same = changes(result(perfect), result(perfect), targets)["svm"]
    assert (same["change"], same["low"], same["high"]) == (0, 0, 0)
    # Before, the third class came last of seven: a draw with it gains at most (100 - 100/7) / 3, one without, nothing.
    late = perfect.copy()
    late[:, 2] = -late[:, 2]
    gained = changes(result(late), result(perfect), targets)["svm"]
    assert gained["low"] == 0
    assert 20 < gained["high"] < 50
    # A class that does not count in the figures does not count in the interval.
    alike = {"svm": {**result(late)["svm"], "per_class": [100.0, 100.0, None]}}
    assert changes(alike, alike | {"svm": {**alike["svm"], "scores": perfect}}, targets)["svm"]["high"] == 0


def test_intervals_are_those_of_drawing_images_again():
    from odcft.evaluation.svm import average_precision

    draw = np.random.default_rng(1)
    class_N = draw.integers(0, 2, 40)
    targets = np.stack([class_N, 1 - class_N], 1)
    targets[:5, 0] = -1
    one, two = (targets * s + draw.normal(size=(40, 2)) for s in (0.5, 2.0))
    figures = [{"mAP": 0.0, "per_class": [1.0, 1.0], "scores": scores} for scores in (one, two)]
    interval = changes({"svm": figures[0]}, {"svm": figures[1]}, targets)["svm"]
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


def arrays(**changed):
    """Features of three classes, that the classes can be told from; with other arrays in their place."""
    labels = np.arange(60) % 3
    features = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32) + 5 * np.eye(3, 5)[labels]
    made = {"train_features": features[:30], "train_targets": labels[:30]}
    return {**made, "test_features": features[30:], "test_targets": labels[30:], **changed}


@pytest.mark.parametrize("form", ["numbers", "names", "floats", "rows", "difficult"])
def test_features_made_elsewhere(tmp_path, form):
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
    assert strict(json.dumps(public(results)))["classes"] == results["classes"]


def test_a_perfect_classifier_of_two_of_three_classes_is_perfect(tmp_path, odcft_command):
    given = arrays()
    kept = given["test_targets"] < 2
    path = tmp_path / "f.npz"
    np.savez(path, **{**given, **{name: given[name][kept] for name in ("test_features", "test_targets")}})
    code, out, err = odcft_command("evaluate", "--features", path, "--json", "--protocol", "svm")
    assert code == 0
    assert strict(out)["svm"]["mAP"] > 99
    assert strict(out)["svm"]["left_out"] == {"2": "no image to test on"}
    assert "    2: no image to test on" in err.splitlines()


def nan(features):
    return np.where(np.arange(features.size).reshape(features.shape) == 7, np.nan, features)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"train_features": nan(arrays()["train_features"])}, "1 of 30 rows of train_features hold NaN or infinite"),
        ({"test_features": arrays()["test_features"] + np.inf}, "30 of 30 rows of test_features hold NaN or infinite"),
        ({"train_features": np.zeros((30, 2, 2))}, "train_features must be numbers, a row an image"),
        ({"train_features": np.zeros((30, 5), complex)}, "must be numbers, a row an image, not complex128"),
        ({"test_features": np.array([["1"] * 5] * 30)}, "test_features must be numbers"),
        ({"test_features": np.zeros((30, 4))}, "train_features are 5 numbers wide, test_features 4"),
        ({"train_features": np.zeros((0, 5)), "train_targets": np.zeros(0, int)}, "train_features is empty"),
        ({"test_features": np.zeros((0, 5)), "test_targets": np.zeros(0, int)}, "test_features is empty"),
        ({"train_targets": np.zeros(29, int)}, r"train_targets has the shape \(29,\), where .* 30 rows"),
        ({"test_targets": np.zeros((30, 3), int)}, r"shape \(30,\) do not go with test_targets of \(30, 3\)"),
        ({"train_targets": np.array(3), "test_targets": np.array(3)}, r"train_targets has the shape \(\)"),
        ({"train_targets": np.full(30, 0.5)}, "train_targets must be whole class numbers or names, not float64"),
        ({"train_targets": np.full(30, np.nan)}, "train_targets must be whole class numbers"),
        ({"train_targets": np.array(["x", "y"] * 15)}, "must both be numbers, or both names"),
        ({"train_targets": np.zeros(30, int)}, r"train_targets has only one class \(0\)"),
        ({"test_targets": np.full(30, 7)}, "test_targets has a class that train_targets has not: 7"),
        ({"test_targets": np.array([None] * 30)}, r"is not an \.npz with"),
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
def test_features_that_do_not_go_together_are_refused_in_a_sentence(tmp_path, odcft_command, changed, words):
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
        np.savez(path, features=np.zeros(3))
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
    with pytest.raises(OdcftError, match=r"is not an \.npz with"):
        evaluate_file(path, ["knn"])


def test_no_number_of_numpy_and_no_nan_is_printed():
    results = {"a": np.float32(0.5), "b": [np.int64(3), float("nan")], 3: (np.float64("inf"),), "scores": np.zeros(3)}
    assert public(results) == {"a": 0.5, "b": [3, None], "3": [None]}
    assert all(type(value) is kind for value, kind in zip(public(results)["b"], (int, type(None)), strict=True))


def test_many_classes_left_out_are_named_in_part():
    svm = {"mAP": 50.0, "per_class": [None] * 12 + [50.0], "left_out": {f"c{i}": "no image" for i in range(12)}}
    said = lines({"svm": svm})
    assert said[1] == "  SVM mAP is the mean over 1 of 13 classes. Left out:"
    assert said[2:] == [*(f"    c{i}: no image" for i in range(10)), "    and 2 more"]


def test_several_labels_an_image_are_for_svm_only(tmp_path, make_images):
    make_images(tmp_path / "images", 16)
    rows = [f"images/{'ab'[i % 2]}/{i:03d}.png,{'cat;dog' if i % 4 else 'cat'}" for i in range(16)]
    (tmp_path / "l.csv").write_text("path,label\n" + "\n".join(rows))
    split = labelled(str(tmp_path / "l.csv"), None)
    assert split.targets.sum(0).tolist() == [16, 12]
    with pytest.raises(OdcftError, match="exactly one label"):
        evaluate("scratch:test_resnet", str(tmp_path / "l.csv"), None, ["knn"])


def test_unknown_protocols_are_refused():
    with pytest.raises(OdcftError, match="choose from svm, knn"):
        check_protocols("svm,nmi")
    assert check_protocols(" knn ,svm") == ["knn", "svm"]
