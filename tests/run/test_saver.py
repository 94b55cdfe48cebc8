"""When the state of a run is saved."""

import time

from odcft.run import saver


def test_saving_waits_until_it_costs_little(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    timer = saver.SaveTimer(minutes=10, share=0.02)
    clock[0] += 1
    assert timer.due(epoch_ends=True)
    assert not timer.due(epoch_ends=False)
    clock[0] += 3
    timer.saved(began=clock[0] - 3)
    clock[0] += 149
    assert not timer.due(epoch_ends=True)  # 3 seconds are 2 % of 150
    clock[0] += 1
    assert timer.due(epoch_ends=True)
    clock[0] += 450
    assert timer.due(epoch_ends=False)


def test_a_state_that_took_long_is_not_the_reason_for_the_next(monkeypatch):
    """What counts is the time since the last state was complete, and how long saving that one took."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    timer = saver.SaveTimer(minutes=2, share=0.5)
    clock[0] = 119.9
    assert not timer.due(epoch_ends=False)
    clock[0] = 120
    assert timer.due(epoch_ends=False)
    clock[0] = 160
    timer.saved(began=120)  # 40 seconds
    clock[0] = 239
    assert not timer.due(epoch_ends=True)
    clock[0] = 240
    assert timer.due(epoch_ends=True)
    assert not timer.due(epoch_ends=False)
    clock[0] = 280
    assert timer.due(epoch_ends=False)
