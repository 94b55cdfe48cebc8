"""Images and a short recipe for the tests of all pretext tasks."""

import numpy as np
import pytest
from PIL import Image

from odcft.recipe import load_recipe

QUICK = ["optim.batch_size=16", "optim.lr=0.1", "augment.flip=0", "augment.crop_scale=[0.9, 1]", "augment.gray=0"]


@pytest.fixture
def quick_recipe():
    """A function that returns a recipe for a few seconds of training, with the given changes."""
    return lambda *changes: load_recipe("pretext", [*QUICK, *changes])


@pytest.fixture
def rows_of_stripes(tmp_path):
    """Images with a bright top and a red left: every task can be solved."""
    draw = np.random.default_rng(0)
    for i in range(96):
        pixels = draw.integers(0, 40, (32, 32, 3))
        pixels[:12] += 150
        pixels[:, :12, 0] += 60
        pixels[:, 20:, 1] += int(draw.integers(0, 30))
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{i:02d}.png")
    return str(tmp_path)
