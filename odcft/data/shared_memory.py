"""How batches come from data workers: in shared memory, and without it where there is too little of it.

A container often has 64 MB of it (docker run --shm-size=8g gives more). A batch that torch cannot put there is lost in
the worker, which prints a traceback, and the training waits for it for ever. Here such a batch goes through the pipe.
"""

import multiprocessing
import multiprocessing.queues
import os
import sys
import threading
import time
import warnings

import torch
from torch import Tensor

from odcft.distributed import dist
from odcft.text import shown

PLACE = "/dev/shm"
CURE = "In a container, give it more: docker run --shm-size=8g"


def usable_workers(workers: int) -> int:
    """As many data workers as are asked for, or none where the locks they need cannot be made: that is said."""
    try:
        # Held together, for that many a loader needs: 3 a queue, of which each worker has one, 5 for each event.
        held = [multiprocessing.Lock() for _ in range(4 * workers + 16)] if workers else []
    except OSError as error:
        _say(
            f"{PLACE} cannot be used by data workers ({error.strerror}), so there are none: images are read between "
            f"the steps, which is slower. {CURE}."
        )
        return 0
    del held
    return workers


def handed_over(pixels: Tensor) -> Tensor | bytes:
    """What a worker pickles of a batch: pixels in shared memory, or, where that has no room, their bytes.

    Args:
        pixels: (B, 3, H, W) uint8.
    """
    try:
        return pixels.share_memory_()
    except RuntimeError:  # no room; torch asks for it before it writes
        return pixels.numpy().tobytes()


def received(pixels: Tensor | bytes, shape: tuple[int, ...]) -> Tensor:
    """The pixels that a worker handed over."""
    if isinstance(pixels, Tensor):
        return pixels
    _say(f"{PLACE} is full: batches go through pipes instead, which is slower. {CURE}; else fewer data.workers help.")
    return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(shape) if pixels else torch.empty(shape).byte()


def end_rather_than_wait() -> None:
    """In a data worker: nobody waits for ever, for a batch that cannot be handed over, or for a reader that is gone."""
    parent = os.getppid()

    def lost(error: Exception, batch: object) -> None:
        print(f"A data worker cannot hand over a batch: {shown(error)}.", file=sys.stderr, flush=True)
        os._exit(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # the pipe may be full, and this process has its other end, too: it would be stuck in writing

    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lost)  # type: ignore[attr-defined]
    threading.Thread(target=watch, daemon=True).start()


_said: set[str] = set()


def _say(text: str) -> None:
    """Once a process, on the first rank."""
    if dist.rank() == 0 and text not in _said:
        _said.add(text)
        warnings.warn(text, stacklevel=2)
