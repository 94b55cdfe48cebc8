"""Trackers: TensorBoard, Weights & Biases and MLflow offline; one that fails is dropped, and the run goes on."""

import ast
import json
import os
from pathlib import Path

import numpy as np
import pytest

from odcft.errors import OdcftError
from odcft.recipe import load_recipe
from odcft.run import trackers
from odcft.run.trackers import MLflow, TensorBoard, Trackers, WandB, require_trackers

ID = "0123456789abcdef" * 2
PICTURE = np.full((8, 12, 3), 200, np.uint8)


@pytest.fixture
def no_network(monkeypatch):
    """Refuses every connection to another machine, and forgets what the environment says of trackers."""
    import socket

    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    reached, connect = [], socket.socket.connect

    def checked(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            reached.append(address)
            raise OSError("the network was used")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", checked)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: reached.append(args) or [])
    yield
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        del os.environ[name]
    assert not reached


@pytest.fixture
def plan():
    return load_recipe("small")


def fill(tracker, step):
    tracker.scalars(step, {"loss": 1.5, "empty": 2})
    tracker.sizes(step, np.array([3, 4, 5, 0]))
    tracker.picture(step, "clusters", PICTURE)
    tracker.flush()
    tracker.close()


def test_tensorboard_has_scalars_a_histogram_and_a_picture(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fill(TensorBoard(tmp_path, 0), 7)
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(7, 1.5)]
    assert found.Histograms("cluster_sizes")[0].histogram_value.num == 4
    image = found.Images("clusters")[0]
    assert (image.width, image.height) == (12, 8)


class Failing:
    """A tracker whose methods fail; `scalars` the second time only."""

    def __init__(self):
        self.calls = 0

    def scalars(self, step, values):
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("the server is away\nand more")

    def flush(self):
        raise KeyError

    def close(self):
        raise OSError(28, "No space left on device")


def test_a_tracker_that_fails_is_dropped_with_one_note():
    notes = []
    group, good = Trackers(notes.append), Failing()
    group.open("A", Failing)
    group.open("B", lambda: good)
    group.open("C", lambda: 1 / 0)
    group.scalars(0, {"loss": 1.0, "warnings": ["no number"]})
    assert list(group.active) == ["A", "B"]
    (note,) = notes
    assert note.startswith("Note        C cannot be started (division by zero). The run continues without it;")
    group.scalars(1, {"loss": 1.0})
    group.scalars(2, {"loss": 1.0})
    assert not group
    assert good.calls == 2
    assert len(notes) == 3
    assert "A failed (the server is away). The run" in notes[1]


def test_a_tracker_that_is_not_installed_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    require_trackers([])
    with pytest.raises(OdcftError, match=r'log\.trackers=mlflow needs .* pip install "odcft\[mlflow\]"'):
        require_trackers(["mlflow"])


def test_the_recipe_takes_one_name_or_several():
    assert load_recipe("small").log.trackers == []
    assert load_recipe("small", ["log.trackers=wandb"]).log.trackers == ["wandb"]
    assert load_recipe("small", ["log.trackers=[mlflow, wandb]"]).log.trackers == ["mlflow", "wandb"]
    with pytest.raises(OdcftError, match=r"log\.trackers"):
        load_recipe("small", ["log.trackers=[comet]"])


def test_the_id_of_a_run_is_that_of_its_run_json(tmp_path):
    other = trackers.id_of(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"id": ID}))
    assert trackers.id_of(tmp_path) == ID
    (tmp_path / "run.json").write_text(json.dumps({"id": "' OR 1 = 1"}))
    assert trackers.id_of(tmp_path) == other != ID


def test_trackers_are_imported_only_when_they_are_used():
    tree = ast.parse(Path(trackers.__file__).read_text())
    at_once = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [line for line in at_once if any(name in line for name in ("wandb", "mlflow", "tensorboard"))]


@pytest.mark.slow
def test_mlflow_keeps_files_beside_the_run_and_finds_a_resumed_run_again(tmp_path, plan, no_network):
    pytest.importorskip("mlflow")
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    first = MLflow(run, plan, ID)
    fill(first, 7)
    again = MLflow(run, plan, ID)
    fill(again, 9)
    assert again.id == first.id != MLflow(run, plan, ID[::-1]).id
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
    found = first.client.get_run(first.id)
    assert found.info.status == "FINISHED"
    assert found.data.params["optim.lr"] == "0.1"
    assert [(one.step, one.value) for one in first.client.get_metric_history(first.id, "loss")] == [(7, 1.5), (9, 1.5)]
    assert found.data.metrics["cluster_sizes_50_percent"] == 3.5
    assert list((tmp_path / "runs" / "mlruns").rglob("clusters*.png"))


@pytest.mark.slow
def test_wandb_is_offline_and_beside_the_run(tmp_path, plan, no_network):
    pytest.importorskip("wandb")
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    for step in (7, 9):  # the second as a resumed run
        tracker = WandB(run, plan, ID)
        assert tracker.run.settings.mode == "offline"
        assert tracker.run.id == ID
        fill(tracker, step)
    parts = sorted((tmp_path / "runs" / "wandb").glob(f"offline-run-*-{ID}"))
    assert parts
    written = b"".join(path.read_bytes() for part in parts for path in part.glob("run-*.wandb"))
    assert b"cluster_sizes" in written
    assert b"loss" in written
    assert sorted(path.name for path in run.iterdir()) == []


@pytest.mark.slow
def test_a_run_with_all_trackers_trains_and_resumes(tmp_path, make_images, make_checkpoint, no_network):
    from odcft.train import fine_tune

    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    images, ckpt = make_images(tmp_path / "images", 48), make_checkpoint(tmp_path / "c.pth")
    quick = ["optim.batch_size=8", "neck.hidden=16", "neck.dim=8", "memory.clusters=2", "memory.min_cluster=2"]
    recipe = load_recipe("small", [*quick, "optim.epochs=1", "log.trackers=[wandb, mlflow]"])
    fine_tune(str(ckpt), str(images), tmp_path / "runs" / "one", recipe)
    fine_tune(str(ckpt), str(images), tmp_path / "runs" / "one", recipe, resume=True, epochs=2)
    losses = list((tmp_path / "runs" / "mlruns").rglob("metrics/loss"))
    assert len(losses) == 1
    assert [line.split()[2] for line in losses[0].read_text().splitlines()] == ["5", "11"]
    assert len(list((tmp_path / "runs" / "mlruns").rglob("clusters*.png"))) == 2
    assert len(list((tmp_path / "runs" / "wandb").glob("offline-run-*"))) == 2
