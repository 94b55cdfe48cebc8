"""Several processes end in one sentence, whichever of them has something to say."""

import os
import subprocess
import sys

import pytest

# `finetune` on two ranks, of which one meets with something at the third step, while the others wait for its sums.
PROGRAM = """
import os, signal, sys
from odcft import cli, train
from odcft.errors import OdcftError
rank, what = sys.argv.pop(1), sys.argv.pop(1)
calls, real = [], train.lr_at
def lr_at(*args):
    calls.append(1)
    if len(calls) == 3 and os.environ.get("RANK") == rank:
        if what == "mistake":
            raise OdcftError("one rank has run out of luck.")
        if what == "fault":
            raise AssertionError("a fault of ours")
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
train.lr_at = lr_at
cli.main()
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    import numpy as np
    import timm
    import torch
    from PIL import Image

    folder = tmp_path_factory.mktemp("inputs")
    torch.save(timm.create_model("test_resnet").state_dict(), folder / "c.pth")
    draw = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(12):
        Image.fromarray(draw.integers(0, 255, (32, 32, 3)).astype(np.uint8)).save(folder / "images" / f"{i:02d}.png")
    return folder


def finetune(inputs, out, rank, what, launcher=("-c", PROGRAM), devices=("--devices", "2")):
    flags = [
        "--recipe",
        "small",
        "--set",
        "optim.batch_size=4",
        "--set",
        "log.tensorboard=false",
        "--set",
        "log.report=false",
        "--epochs",
        "2",
    ]
    arguments = ["finetune", inputs / "c.pth", inputs / "images", "--out", out, *flags, *devices]
    command = [sys.executable, *map(str, [*launcher, rank, what, *arguments])]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def after_the_start(result):
    """What is said but for how the run goes."""
    expected = (
        "Machine",
        "Loading",
        "Checkpoint",
        "Images",
        "Plan",
        "Features",
        "K-Means",
        "Note",
        "Warning",
        "Fine-tuning",
    )
    return [line for line in result.stderr.splitlines() if line.strip() and not line.startswith(expected)]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_mistake_of_one_rank_is_all_that_is_said(inputs, tmp_path, rank):
    result = finetune(inputs, tmp_path / "run", rank, "mistake")
    assert result.returncode == 2, result.stderr
    assert after_the_start(result) == ["odcft: one rank has run out of luck."]
    assert not (tmp_path / "run" / "lock").exists()


@pytest.mark.slow
def test_mistake_that_all_ranks_notice_is_said_once(inputs, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    result = finetune(inputs, tmp_path / "run", 0, "nothing")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "is not empty" in line


@pytest.mark.slow
def test_fault_of_a_rank_that_is_not_heard_is_repeated(inputs, tmp_path):
    result = finetune(inputs, tmp_path / "run", 1, "fault")
    assert result.returncode == 1
    lines = after_the_start(result)
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "AssertionError: a fault of ours"
    assert result.stderr.count("Traceback") == 1
    assert "gloo" not in result.stderr


@pytest.mark.slow
def test_rank_that_is_killed_is_all_that_is_said(inputs, tmp_path):
    result = finetune(inputs, tmp_path / "run", 1, "kill")
    assert result.returncode == 1
    (line,) = after_the_start(result)
    assert line.startswith("odcft: process 1 was killed (SIGKILL")


@pytest.mark.slow
def test_under_torchrun_the_others_do_not_repeat_it(inputs, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29653")
    result = finetune(inputs, tmp_path / "run", 1, "mistake", (*torchrun, tmp_path / "program.py"), ())
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if line.startswith("odcft: ")]
    # torchrun ends the others by SIGTERM. It may come before they notice the loss; rank 0 then says how to continue.
    assert [line for line in said if "SIGTERM: stopped. " not in line] == ["odcft: one rank has run out of luck."]
    assert len(said) <= 2
    assert "Connection closed by peer" not in result.stderr
