"""Values that the host reads a step late."""

import torch

from odcft.distributed.delayed_reader import DelayedReader


def test_late_answers_come_a_step_later_and_survive_a_snapshot(monkeypatch):
    class Event:
        record = synchronize = staticmethod(lambda: None)

    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **options: real(*args, **options))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    late = DelayedReader()
    assert late._exchange(torch.tensor([1.0])) is None
    assert late._exchange(torch.tensor([2.0])).item() == 1
    resumed = DelayedReader()
    resumed.restore_pending(late.pending())
    assert resumed._exchange(torch.tensor([3.0])).item() == late._exchange(torch.tensor([3.0])).item() == 2
