"""Ranks wait for each other as long as all are alive, and no longer."""

import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed
from torch.distributed import DistNetworkError, HashStore

from odcft.distributed import attendance as module
from odcft.distributed import dist
from odcft.distributed.attendance import Attendance, time_out
from odcft.errors import OdcftError


def test_a_busy_rank_is_waited_for_and_a_silent_one_is_not(monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.02)
    store, limit = HashStore(), timedelta(seconds=0.3)
    first, second = (Attendance(store, rank, 2, limit) for rank in (0, 1))
    late = threading.Timer(1.0, second.wait)  # longer than the limit, but alive
    late.start()
    began = time.monotonic()
    first.wait()
    assert time.monotonic() - began > 0.9
    late.join()
    monkeypatch.setattr(Attendance, "_beat", lambda self, number: None)
    with pytest.raises(DistNetworkError, match="has given no sign of life"):
        first.wait()
    monkeypatch.setattr(dist, "_started", lambda: True)
    assert dist.is_lost_peer_error(DistNetworkError("x"))


@pytest.mark.parametrize("given", ["0", "-1", "soon", "nan", "inf", ""])
def test_a_time_out_that_is_no_number_of_minutes_is_refused(monkeypatch, given):
    monkeypatch.setenv("ODCFT_TIMEOUT", given)
    with pytest.raises(OdcftError, match=r"ODCFT_TIMEOUT=.* is not a number of minutes"):
        time_out()
    monkeypatch.setenv("ODCFT_TIMEOUT", "0.5")
    assert time_out() == timedelta(seconds=30)


def test_collectives_get_the_time_out_and_gathering_waits_for_all(monkeypatch):
    given, order = {}, []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a, **options: given.update(options))
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", HashStore)
    monkeypatch.setattr(dist, "_attendance", None)
    dist.start(torch.device("cpu"))
    assert given["timeout"] == time_out()
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(dist._attendance, "wait", lambda: order.append("wait"))
    monkeypatch.setattr(torch.distributed, "barrier", lambda: order.append("barrier"))
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda parts, mine: order.append("gather"))
    dist.barrier()
    dist.gather_dict({})
    assert order == ["wait", "barrier", "wait", "gather"]
