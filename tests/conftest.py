"""Images and checkpoints that tests make for themselves: nothing is downloaded."""

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)


@pytest.fixture
def make_images():
    """A function that writes `count` small photographs-like images of two kinds into folders `a` and `b`."""

    def make(folder, count=12, side=32):
        draw = np.random.default_rng(0)
        for i in range(count):
            kind = "ab"[i % 2]
            base = draw.integers(0, 255, (4, 4, 3)) if kind == "a" else draw.integers(0, 255, (1, 4, 3)).repeat(4, 0)
            path = folder / kind / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(base.astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC).save(path)
        return folder

    return make


@pytest.fixture
def make_checkpoint():
    """A function that writes a checkpoint of a small timm network, as people's training code saves it."""

    def make(path, arch="test_resnet", prefix="module.", wrap="state_dict", seed=0, **extra):
        import timm

        torch.manual_seed(seed)
        net = timm.create_model(arch, num_classes=4)
        state = {prefix + name: tensor for name, tensor in net.state_dict().items()}
        torch.save({wrap: state, "epoch": 3, **extra} if wrap else state, path)
        return path

    return make


@pytest.fixture
def odcft_command(capfd):
    """A function that runs the command line in this process: arguments in, (exit code, stdout, stderr) out."""
    import sys

    from odcft.cli import main

    def run(*args):
        old, sys.argv = sys.argv, ["odcft", *map(str, args)]
        try:
            main()
        except SystemExit as end:
            out, err = capfd.readouterr()
            return end.code, out, err
        finally:
            sys.argv = old

    return run
