"""`finetune --eval` measures while a run trains, keeps the best epoch, and changes nothing about the run."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from stopped_runs import quick, write_inputs

from odcft.backbone.load import load_backbone
from odcft.errors import OdcftError
from odcft.evaluation.comparison import evaluate
from odcft.evaluation.during_training import EpochEvaluation, load_images_to_evaluate
from odcft.progress import Progress
from odcft.train import fine_tune


@pytest.fixture
def inputs(tmp_path, make_images):
    write_inputs(tmp_path, 12)
    make_images(tmp_path / "labelled", 16)
    return tmp_path


def run(folder, name, recipe=None, **more):
    ckpt, images = str(folder / "c.pth"), str(folder / "images")
    fine_tune(ckpt, images, folder / name, recipe or quick(), progress=Progress(quiet=True), **more)
    return folder / name


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("overrides", [[], ["method=dc"]])
def test_run_ends_with_the_same_bits(inputs, overrides):
    plain = run(inputs, "plain", quick(*overrides))
    watched = run(inputs, "watched", quick(*overrides), eval_data=str(inputs / "labelled"))
    one, other = weights(plain / "backbone"), weights(watched / "backbone")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [line["loss"] for line in lines(plain)] == [line["loss"] for line in lines(watched)]
    measured = [line["epoch"] for line in lines(watched) if "knn" in line]
    assert measured == [1.0, 2.0]


def test_figure_is_that_of_evaluate_and_best_epoch_is_kept(inputs, monkeypatch):
    figures = iter([50.0, 90.0, 90.0, 70.0])
    folder = run(inputs, "run", quick("optim.epochs=4"), eval_data=str(inputs / "labelled"))
    last = [line["knn"] for line in lines(folder) if "knn" in line][-1]
    assert last == evaluate(str(folder / "backbone"), str(inputs / "labelled"), None, ["knn"], size=32)["knn"]["top1"]

    monkeypatch.setattr("odcft.evaluation.during_training.knn", lambda *args: {"top1": next(figures)})
    best = run(inputs, "best", quick("optim.epochs=4"), eval_data=str(inputs / "labelled"))
    second = run(inputs, "second", quick("optim.epochs=4"))
    states = json.loads((best / "backbone_best" / "config.json").read_text())
    assert states["odcft"]["epochs"] == 2
    assert not (second / "backbone_best").exists()
    assert load_backbone(best / "backbone_best").backbone.size == load_backbone(best / "backbone").backbone.size
    kept, last = weights(best / "backbone_best"), weights(best / "backbone")
    assert any(not torch.equal(kept[name], last[name]) for name in kept)


def test_every_second_epoch_and_the_last(inputs):
    folder = run(inputs, "run", quick("optim.epochs=3"), eval_data=str(inputs / "labelled"), eval_every=2)
    assert [line["epoch"] for line in lines(folder) if "knn" in line] == [2.0, 3.0]


def test_images_without_labels_are_refused_before_anything_starts(inputs):
    with pytest.raises(OdcftError, match="no labels"):
        run(inputs, "run", eval_data=str(inputs / "labelled" / "a"))
    assert not (inputs / "run").exists()


def test_images_that_vanish_cost_a_figure_but_not_the_run(inputs):
    labels = load_images_to_evaluate(str(inputs / "labelled"))
    backbone = load_backbone(inputs / "c.pth").backbone.train()
    for path in (inputs / "labelled").rglob("*.png"):
        path.unlink()
    said = []
    evaluation = EpochEvaluation(labels, 1, 5, [backbone], backbone.input.view, inputs)
    assert evaluation.after_epoch(1, [], said.append) == {}
    assert said[0].startswith("Warning     Epoch 1 was not evaluated: None of the 16 images")
    assert backbone.training


@pytest.mark.slow
def test_command_line_on_two_ranks(inputs):
    what = ["finetune", inputs / "c.pth", inputs / "images", "--out", inputs / "run", "--recipe", "small"]
    more = ["--epochs", "1", "--set", "optim.batch_size=4", "--eval", inputs / "labelled", "--devices", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "odcft", *map(str, [*what, *more])],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "knn" in lines(inputs / "run")[-1]
    assert (inputs / "run" / "backbone_best" / "model.safetensors").is_file()
