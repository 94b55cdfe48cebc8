"""Waiting for all ranks, however long their work takes, as long as each of them is alive.

A collective gives up after a time-out, because it cannot tell a rank that is busy from one that is lost. So where ranks
meet after work that may take some of them far longer (faiss on rank 0, writing, hashing, reading from slow disks), they
wait here first: a thread of every rank leaves a sign of life every few seconds.
"""

import math
import os
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed

from odcft.errors import OdcftError
from odcft.text import short_repr

TIMEOUT = "ODCFT_TIMEOUT"  # environment variable: minutes after which a rank that is not heard of is lost
MINUTES = 10.0
BEAT = 5.0  # seconds between two signs of life


def time_out() -> timedelta:
    """After which time a collective gives up, and a silent rank counts as lost.

    Raises:
        OdcftError: the environment variable is not a positive number.
    """
    given = os.environ.get(TIMEOUT, str(MINUTES))
    with suppress(ValueError):
        if 0 < float(given) < math.inf:
            return timedelta(minutes=min(float(given), 60 * 24 * 30.0))
    raise OdcftError(f"{TIMEOUT}={short_repr(given, quotes=False)} is not a number of minutes. Set it to, say, 30.")


class Attendance:
    """Knows which ranks have arrived, and which are alive.

    Args:
        store: of the process group.
        rank: of this process.
        ranks: how many there are.
        limit: after which time without a sign of life a rank is lost.
    """

    def __init__(self, store: Any, rank: int, ranks: int, limit: timedelta) -> None:
        self.store, self.rank, self.ranks, self.limit = store, rank, ranks, limit.total_seconds()
        self.rounds = 0
        self.heard: dict[int, tuple[bytes, float]] = {}  # rank to its last sign of life, and when it came
        self._beat(0)
        threading.Thread(target=self._keep_beating, daemon=True).start()

    def wait(self) -> None:
        """Wait until every rank has called this as often as this one. A signal can interrupt it.

        Raises:
            DistNetworkError: a rank has given no sign of life for too long, or the store is gone.
        """
        self.rounds += 1
        pause, next_look = 0.001, time.monotonic() + BEAT
        self.heard.clear()
        arrived = self.store.add(f"round {self.rounds}", 1)
        while arrived < self.ranks:
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
            if time.monotonic() > next_look:
                self._refuse_silence()
                next_look = time.monotonic() + BEAT
            arrived = self.store.add(f"round {self.rounds}", 0)

    def _refuse_silence(self) -> None:
        now = time.monotonic()
        for rank, beat in enumerate(self.store.multi_get([f"beat {rank}" for rank in range(self.ranks)])):
            if self.heard.get(rank, (b"", 0.0))[0] != beat:
                self.heard[rank] = (beat, now)
            elif now - self.heard[rank][1] > self.limit:
                raise torch.distributed.DistNetworkError(
                    f"process {rank} has given no sign of life for {self.limit:,.0f} seconds"
                )

    def _beat(self, number: int) -> None:
        self.store.set(f"beat {self.rank}", str(number))

    def _keep_beating(self) -> None:
        with suppress(RuntimeError):  # the store is gone: so is its process, and this one will notice
            number = 0
            while True:
                time.sleep(BEAT)
                number += 1
                self._beat(number)
