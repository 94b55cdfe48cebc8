"""An uninterrupted run to compare with, and a function that trains."""

import pytest
from stopped_runs import quick, write_inputs

from odcft.distributed import stop_signals
from odcft.progress import Progress
from odcft.train import fine_tune


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A checkpoint, 12 images, and an uninterrupted run of two epochs of three steps."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder, 12)
    fine_tune(str(folder / "c.pth"), str(folder / "images"), folder / "whole", quick())
    return folder


@pytest.fixture
def go(inputs, tmp_path):
    """A function that trains into tmp_path/run; `said` collects what it says."""

    class Listener(Progress):
        def say(self, line):
            go.said.append(line)

    def go(recipe=None, **options):
        recipe = recipe or quick()
        run = options.pop("run", tmp_path / "run")
        ckpt, data = options.pop("ckpt", inputs / "c.pth"), options.pop("data", inputs / "images")
        return fine_tune(str(ckpt), str(data), run, recipe, progress=Listener(), **options)

    go.said = []
    return go


@pytest.fixture
def listening():
    """Handle signals, as on the command line."""
    with stop_signals.handling_signals():
        yield
