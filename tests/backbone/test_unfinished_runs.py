"""A RUN without a backbone: the error says how far it is and how to continue it."""

import json
import os
import shlex

import pytest
from written_runs import line_of, write_run

from odcft.backbone.load import load_backbone
from odcft.errors import OdcftError


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path, pixels=False, finished=False, lines=[line_of(0, 0.5), line_of(1, 0.5)])


def refusal(path):
    with pytest.raises(OdcftError) as refused:
        load_backbone(path)
    return str(refused.value)


def test_it_says_how_far_the_run_is_and_how_to_continue(run):
    (run / "metrics.jsonl").open("a").write('{"step": 2, "epoch": 2')  # a line being written
    said = refusal(run)
    assert "has not finished training, so it has no backbone yet: 1 of 3 epochs done. If" in said
    assert "backbone_best" not in said
    words = shlex.split(said.partition("continue it: ")[2])
    data = str(run.parent / "images")
    assert words == ["odcft", "finetune", "scratch:test_resnet", data, "--out", str(run), "--resume"]


@pytest.mark.parametrize(
    ("done", "says"),
    [(0.04, "0 of"), (0.456, "0.5 of"), (99.96, "100 of"), (1234.5, "1,234.5 of"), (12345, "12,345 of")],
)
def test_epochs_are_said_as_people_write_them(run, done, says):
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "epoch": done}) + "\n")
    assert f"no backbone yet: {says} 3 epochs done." in refusal(run)


def test_the_best_epoch_so_far_is_named(run):
    (run / "backbone_best").mkdir()
    (run / "backbone_best" / "config.json").write_text("{}")
    assert str(run / "backbone_best") in refusal(run)


def test_a_finished_run_without_its_backbone_and_a_saved_state(run, tmp_path):
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(about | {"finished": 30}))
    assert "its backbone is gone. Write it again: odcft finetune" in refusal(run)
    state = tmp_path / "step-000000010"
    state.mkdir()
    (state / "state.json").write_text("{}")
    (state / "same.safetensors").write_bytes(b"")
    assert "only for resuming" in refusal(state)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", "[]"),
        ("run.json", '{"checkpoint": ["a", 7, null], "data": {}, "epochs": %s}' % ("9" * 400)),
        ("metrics.jsonl", '{"epoch": NaN}\n'),
        ("metrics.jsonl", '{"epoch": %s}\n' % ("9" * 400)),
        ("metrics.jsonl", "[" * 10_000 + "\n"),
        ("recipe.yaml", "{"),
        ("metrics.jsonl", None),
    ],
)
def test_damaged_files_of_a_run_still_give_one_sentence(run, name, content):
    (run / name).unlink()
    os.mkfifo(run / name) if content is None else (run / name).write_text(content)
    said = refusal(run)
    assert "has not finished training" in said
    assert " done. If it" in said
    assert "\n" not in said
