"""What a log line is made of, and how a snapshot keeps it."""

import pytest
import torch

from odcft.state import Window


def test_a_loss_that_only_some_steps_have_is_averaged_over_these_also_after_a_resume():
    window, resumed = Window(torch.device("cpu")), Window(torch.device("cpu"))
    window.add(torch.tensor(4.0), torch.tensor(0.5), 8, torch.tensor(3.0))
    resumed.restore(*window.stored())
    resumed.add(torch.tensor(2.0), torch.tensor(0.0), 8, torch.tensor(1.0))
    resumed.add(torch.tensor(0.0), torch.tensor(0.1), 8)
    figures = resumed.close(K=2)
    assert [figures[name] for name in ("loss", "change_ratio", "instance_loss")] == pytest.approx([2.0, 0.2, 2.0])
    resumed.add(torch.tensor(1.0), torch.tensor(0.0), 8)
    assert set(resumed.stored()[0]) == {"loss", "change"}
    assert "instance_loss" not in resumed.close(K=2)
