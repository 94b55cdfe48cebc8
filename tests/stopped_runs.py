"""Helpers that interrupt runs in the middle of a step, for the tests of resuming and of faults."""

import json
import os
import signal

from safetensors.torch import load_file

from odcft import train
from odcft.distributed import stop_signals
from odcft.recipe import load_recipe
from odcft.run import snapshot_files

TIMES = ("images_per_second", "data_wait", "time")
QUICK = [
    *("optim.batch_size=4", "log.interval=2", "neck.hidden=16", "neck.dim=8", "neck.dropout=0.5"),
    *(
        "log.tensorboard=false",
        "log.report=false",
        "log.snapshot_share=1",
        "optim.epochs=2",
        "memory.centroid_interval=2",
    ),
]


def write_inputs(folder, images):
    """A checkpoint `c.pth` and so many `images/` of noise."""
    import numpy as np
    import timm
    import torch
    from PIL import Image

    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), folder / "c.pth")
    draw = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(images):
        Image.fromarray(draw.integers(0, 255, (32, 32, 3)).astype(np.uint8)).save(folder / "images" / f"{i:02d}.png")


def quick(*overrides, recipe="small"):
    return load_recipe(recipe, [*QUICK, *overrides])


def forget():
    """Forget the signal, as a new process would."""
    stop_signals._asked = ""


def at_step(monkeypatch, steps, do):
    """Call `do` in the middle of these steps; returns the list of all steps taken."""
    real, calls = train.lr_at, []

    def lr_at(step, *args):
        calls.append(step)
        if step in steps:
            do()
        return real(step, *args)

    monkeypatch.setattr(train, "lr_at", lr_at)
    return calls


def ask_to_stop(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def outcome(run):
    """The results of a run that must not depend on interruptions: tensors, figures, number of steps."""
    state = snapshot_files.load(sorted((run / "checkpoints").glob("step-*"))[-1])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = [{name: value for name, value in line.items() if name not in TIMES} for line in lines]
    tensors = {**load_file(run / "backbone" / "model.safetensors"), **state.same, **state.rows, **state.own}
    return {name: tensor.tolist() for name, tensor in tensors.items()}, figures, state.about["step"]
