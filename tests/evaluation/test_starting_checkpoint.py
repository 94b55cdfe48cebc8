"""A RUN is compared with the checkpoint it was started from, wherever that is now."""

import json
import shutil

import pytest
from evaluation_helpers import RecordedProgress, strict_json

from odcft.evaluation.comparison import evaluate
from odcft.evaluation.results_table import json_values, table_lines


@pytest.fixture
def run(tmp_path, make_images, make_checkpoint, monkeypatch):
    """A RUN whose checkpoint was given as a relative path, and its images."""
    from odcft.recipe import load_recipe
    from odcft.train import fine_tune

    monkeypatch.chdir(tmp_path)
    images = str(make_images(tmp_path / "images", 24))
    make_checkpoint(tmp_path / "c.pth")
    overrides = ["optim.epochs=1", "optim.batch_size=8", "log.tensorboard=false"]
    fine_tune("c.pth", images, tmp_path / "runs" / "run", load_recipe("small", overrides), progress=RecordedProgress())
    return tmp_path / "runs" / "run", images


def test_a_run_is_compared_with_its_checkpoint(run, tmp_path):
    results = evaluate(str(run[0]), run[1], None, ["knn"], progress=RecordedProgress())
    alone = evaluate("c.pth", run[1], None, ["knn"], progress=RecordedProgress())
    assert results["before"]["knn"]["top1"] == alone["knn"]["top1"]
    change = results["change"]["knn"]
    assert change["change"] == pytest.approx(results["knn"]["top1"] - alone["knn"]["top1"])
    assert change["low"] <= change["change"] <= change["high"]
    assert table_lines(results)[0].split() == ["before", "after", "change", "(95", "%", "interval)"]
    strict_json(json.dumps(json_values(results)))


def test_the_clusters_of_a_run_are_compared_with_the_labels_of_its_own_images(run, make_images, tmp_path):
    progress = RecordedProgress()
    results = evaluate(str(run[0]), run[1], None, ["clusters"], progress=progress)
    assert results["clusters"]["run"]["images"] == 24
    assert results["change"]["clusters"]["low"] <= results["change"]["clusters"]["high"]
    assert any(line.startswith("  Clusters of the RUN: NMI ") for line in table_lines(results))
    other = str(make_images(tmp_path / "other", 24))
    assert "run" not in evaluate(str(run[0]), other, None, ["clusters"], progress=progress)["clusters"]
    assert progress.lines[-1].startswith("Clusters    those of the RUN are not compared with the labels: ")
    assert "was not trained on any of these images" in progress.lines[-1]


def edit(path, **fields):
    about = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in {**about, **fields}.items() if value is not None}))


def test_its_checkpoint_is_found_from_another_folder_and_after_a_move(run, tmp_path, monkeypatch):
    folder, images = run
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "before" in evaluate(str(folder), images, None, ["knn"], progress=RecordedProgress())
    edit(folder / "run.json", checkpoint_path=None)  # as in runs from before this field existed
    assert "before" in evaluate(str(folder), images, None, ["knn"], progress=RecordedProgress())
    moved = tmp_path / "moved"
    shutil.move(folder, moved / "deep" / "run")
    shutil.move(tmp_path / "c.pth", moved / "c.pth")
    assert "before" in evaluate(str(moved / "deep" / "run"), images, None, ["knn"], progress=RecordedProgress())
    monkeypatch.chdir(moved)
    shutil.move(moved / "deep" / "run", tmp_path / "run")
    assert "before" in evaluate(str(tmp_path / "run"), images, None, ["knn"], progress=RecordedProgress())


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("gone", "c.pth, which the run was started from, was not found with the same contents"),
        ("changed", "c.pth, which the run was started from, was not found with the same contents"),
        ("no run.json", "run.json, which records the starting checkpoint, is missing or damaged"),
        ("numbers", "run.json, which records the starting checkpoint, is missing or damaged"),
        ("two", "run.json lists 2 checkpoints, but the run has 1 network"),
        ("name for a checksum", "/dev/zero, which the run was started from, was not found with the same contents"),
        ("unreadable", "was not found with the same contents"),
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
    said = RecordedProgress()
    results = evaluate(str(folder), images, None, ["knn"], progress=said)
    assert "before" not in results
    (line,) = (line for line in said.lines if line.startswith("Before"))
    assert reason in line


def test_a_checkpoint_that_is_not_a_run_has_no_before(tmp_path, make_images, make_checkpoint):
    said = RecordedProgress()
    images = str(make_images(tmp_path / "images", 12))
    results = evaluate(str(make_checkpoint(tmp_path / "c.pth")), images, None, ["knn"], progress=said)
    assert "before" not in results
    assert not any(line.startswith("Before") for line in said.lines)


def test_a_run_from_random_weights_has_a_before(tmp_path, make_images):
    from odcft.recipe import load_recipe
    from odcft.train import fine_tune

    images = str(make_images(tmp_path / "images", 24))
    overrides = ["optim.epochs=1", "optim.batch_size=8", "log.tensorboard=false", "seed=3"]
    fine_tune(
        "scratch:test_resnet", images, tmp_path / "run", load_recipe("small", overrides), progress=RecordedProgress()
    )
    results = evaluate(str(tmp_path / "run"), images, None, ["knn"], progress=RecordedProgress())
    assert set(results["before"]) == {"knn"}
