"""Runs that are stopped or killed and resumed end with the same bits as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stopped_runs import QUICK, ask_to_stop, at_step, forget, outcome, quick

from odcft import prepare
from odcft.distributed import stop_signals
from odcft.distributed.stop_signals import Stopped
from odcft.errors import OdcftError
from odcft.recipe import load_recipe
from odcft.run import snapshot_files
from odcft.train import fine_tune

ROOT = Path(__file__).parent.parent.parent


# ---------------------------------------------------------------- stopped and resumed


@pytest.mark.parametrize("steps", [(0,), (1,), (2,), (1, 3, 4), (5,)])  # three steps an epoch, two a log line
def test_run_that_was_stopped_anywhere_ends_with_the_same_bits(inputs, go, tmp_path, monkeypatch, listening, steps):
    at_step(monkeypatch, steps, ask_to_stop)
    for number, step in enumerate(steps):
        with pytest.raises(Stopped, match=f"Saved after {step + 1} of 6 steps"):
            go(resume=number > 0)
        assert not (tmp_path / "run" / "backbone").exists()
        forget()
        monkeypatch.undo()
        at_step(monkeypatch, steps[number + 1 :], ask_to_stop)
    go(resume=True)
    assert outcome(tmp_path / "run") == outcome(inputs / "whole")
    assert not [path.name for path in (tmp_path / "run").iterdir() if path.name == "lock" or path.name[0] == "."]


def test_run_that_is_stopped_before_its_first_step_starts_from_the_beginning(
    inputs, go, tmp_path, monkeypatch, listening
):
    def interrupted(*args):
        ask_to_stop()
        time.sleep(1)

    monkeypatch.setattr(prepare, "kmeans", interrupted)
    with pytest.raises(Stopped, match="nothing"):
        go()
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    forget()
    go(resume=True)
    assert "has no state to resume from yet" in "".join(go.said)
    assert outcome(tmp_path / "run") == outcome(inputs / "whole")


def test_run_killed_while_its_first_state_was_written_starts_from_the_beginning(inputs, go, tmp_path, monkeypatch):
    def killed(*args):
        raise RuntimeError("killed")

    monkeypatch.setattr(snapshot_files, "write_text_atomically", killed)
    with pytest.raises(RuntimeError, match="killed"):
        go()
    assert list((tmp_path / "run" / "checkpoints").glob(".*.unfinished"))
    monkeypatch.undo()
    with pytest.raises(OdcftError, match="is not empty"):
        go()
    go(resume=True)
    assert outcome(tmp_path / "run") == outcome(inputs / "whole")


@pytest.mark.slow
def test_killed_and_stopped_processes_end_with_the_same_bits():
    """A short version of what docs/reliability.md reports."""
    command = [sys.executable, str(ROOT / "benchmarks" / "faults.py"), "--json", "--sigkill", "2", "--sigterm", "1"]
    nothing = ["--damage", "0", "--disk", "0", "--two-ranks", "0"]
    result = subprocess.run([*command, *nothing], capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads(result.stdout)
    assert figures["sigkill"]["identical"] == 2
    assert figures["sigkill"]["kills"] >= 2
    assert figures["sigterm"]["asked"] == figures["sigterm"]["exit_75"] >= 1
    assert figures["sigterm"]["slowest_s"] < 30


@pytest.mark.slow
def test_two_ranks_one_killed_then_asked_to_stop_then_alone(inputs, go, tmp_path):
    run = tmp_path / "run"
    settings = [part for override in (*QUICK, "log.snapshot_minutes=0.001") for part in ("--set", override)]
    arguments = [inputs / "c.pth", inputs / "images", "--out", run, "--recipe", "small", *settings]
    command = [sys.executable, "-m", "odcft", "finetune", *map(str, arguments), "--devices", "2", "--epochs", "400"]

    def started(*extra):
        process = subprocess.Popen([*command, *extra], stderr=subprocess.PIPE, text=True)
        began, states = time.monotonic(), set((run / "checkpoints").glob("step-*"))
        while len(set((run / "checkpoints").glob("step-*")) - states) < 2:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() - began < 100
            time.sleep(0.02)
        return process

    process = started()
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert "Continue with --resume" in err

    process = started("--resume")
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75, err
    assert "SIGUSR1: stopped. Saved after" in err

    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    both = [load_file(newest / f"rank-{rank}-of-2.safetensors")["rows.features"] for rank in (0, 1)]
    alone = snapshot_files.load(newest).rows["features"]
    assert torch.equal(alone[0::2], both[0])
    assert torch.equal(alone[1::2], both[1])
    epochs = int(newest.name[5:]) // 3 + 2
    summary = go(quick("optim.epochs=400", "log.snapshot_minutes=0.001"), resume=True, epochs=epochs)
    assert summary["steps"] == 3 * epochs
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == len(set(steps))
    assert steps == sorted(steps)


def test_finished_run_is_left_alone(go, tmp_path):
    first = go()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    again = go(resume=True)
    assert "nothing is left to do" in "".join(go.said)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    (tmp_path / "run" / "clusters.parquet").unlink()  # as if it had been killed before that was written
    go(resume=True)
    assert (tmp_path / "run" / "clusters.parquet").exists()


# ---------------------------------------------------------------- what may change when resuming


@pytest.fixture(scope="module")
def stopped_once(inputs):
    """A run that was asked to stop in its fourth step."""
    with pytest.MonkeyPatch.context() as patched, stop_signals.handling_signals():
        at_step(patched, (3,), ask_to_stop)
        with pytest.raises(Stopped):
            fine_tune(str(inputs / "c.pth"), str(inputs / "images"), inputs / "stopped", quick())
    return inputs / "stopped"


@pytest.fixture
def stopped_run(stopped_once, tmp_path):
    """A copy of it."""
    return shutil.copytree(stopped_once, tmp_path / "run")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("optim.lr=0.5", "optim.lr=0.1, not 0.5"),
        ("memory.clusters=3", "memory.clusters=2, not 3"),
        ("neck.dropout=0", "neck.dropout=0.5, not 0.0"),
        ("seed=7", "seed=0, not 7"),
        ("optim.epochs=9", "optim.epochs=2, not 9.*--epochs"),
    ],
)
def test_another_recipe_is_refused(stopped_run, go, changed, message):
    with pytest.raises(OdcftError, match=message):
        go(quick(changed), resume=True)


def test_edited_recipe_in_the_run_is_noticed(stopped_run, inputs, odcft_command):
    path = stopped_run / "recipe.yaml"
    path.write_text(path.read_text().replace("lr: 0.1", "lr: 0.2"))
    code, _, err = odcft_command("finetune", inputs / "c.pth", inputs / "images", "--out", stopped_run, "--resume")
    assert code == 2
    assert "optim.lr=0.1, not 0.2" in err


def test_epochs_and_workers_and_log_interval_may_change(stopped_run, go):
    summary = go(quick("log.interval=1", "data.workers=1"), resume=True, epochs=3)
    assert summary["steps"] == 9
    assert load_recipe(stopped_run / "recipe.yaml").optim.epochs == 3
    with pytest.raises(OdcftError, match=r"has already done 3.0 epochs"):
        go(resume=True, epochs=2)


def test_a_prolonged_run_that_is_stopped_resumes_without_repeating_epochs(stopped_run, go, monkeypatch, listening):
    at_step(monkeypatch, (5,), ask_to_stop)
    monkeypatch.setattr(
        snapshot_files, "save", lambda *args: "No space left on device"
    )  # no state knows of the new epochs
    with pytest.raises(Stopped):
        go(resume=True, epochs=4)
    forget()
    monkeypatch.undo()
    assert "4 epochs instead of 2: the learning rate goes from" in "".join(go.said)
    assert go(load_recipe(stopped_run / "recipe.yaml"), resume=True)["epochs"] == 4
    with pytest.raises(OdcftError, match=r"optim.epochs=4, not 9"):
        go(quick("optim.epochs=9"), resume=True)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", r"1 are missing \(03.png\)"),
        ("new", r"1 are new \(new.png\)"),
        ("content", "the content of .*05.png has changed"),
        ("checkpoint", "was started from .*c.pth, not from .*other.pth"),
    ],
)
def test_other_data_or_checkpoint_is_refused(stopped_run, go, inputs, tmp_path, case, message, make_checkpoint):
    data, ckpt = tmp_path / "images", inputs / "c.pth"
    shutil.copytree(inputs / "images", data)
    if case == "missing":
        (data / "03.png").unlink()
    elif case == "new":
        shutil.copy(data / "03.png", data / "new.png")
    elif case == "content":
        shutil.copy(data / "03.png", data / "05.png")
    else:
        ckpt = make_checkpoint(tmp_path / "other.pth")
    with pytest.raises(OdcftError, match=message):
        go(resume=True, data=data, ckpt=ckpt)
