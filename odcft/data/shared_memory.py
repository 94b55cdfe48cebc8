"""How data workers send batches to the training process: in shared memory, or through a pipe if that is full.

A container often has only 64 MB of shared memory (docker run --shm-size=8g gives more). If a batch does not fit, torch
prints a traceback in the worker and loses the batch, and training waits for it for ever. Here it goes through a pipe.
"""

import multiprocessing
import multiprocessing.queues
import os
import shutil
import sys
import threading
import time
import warnings
from contextlib import suppress
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from odcft.distributed import dist
from odcft.text import printable

SHARED_MEMORY = "/dev/shm"
AHEAD = 4  # batches that a loader process reads ahead, if they fit
BUDGET = 0.5  # of the free shared memory
REMEDY = "In a container, give it more: docker run --shm-size=8g"


class Queue(NamedTuple):
    """How the loader processes of a rank read ahead."""

    ahead: int  # batches of each process
    shared: bool  # whether they are in shared memory; if not, they go through pipes


def fitting_queue(workers: int, batch_bytes: int) -> Queue:
    """As many batches as fit in shared memory, for each loader process to read ahead.

    The queues of all ranks of this machine may together take half of what was free at first: features for an
    evaluation are read while training has its own queue, and NCCL needs some. If not even one batch of each process
    fits, all go through pipes, which is slower, but still faster than having fewer processes.

    Args:
        workers: loader processes of each rank.
        batch_bytes: of the pixels of a batch.
    """
    free = _free_at_first()
    if not workers or free is None:
        return Queue(AHEAD, True)
    fitting = int(BUDGET * free / dist.local_world_size() / workers / max(1, batch_bytes))
    return Queue(min(AHEAD, max(1, fitting)), fitting > 0)


def use_pipes() -> None:
    """In a data worker: send all batches through the pipe."""
    global _pipes_only
    _pipes_only = True


@cache
def _free_at_first() -> int | None:
    """Bytes of shared memory that were free when this process first asked; None where the system does not say."""
    try:
        return shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return None


def usable_workers(workers: int) -> int:
    """Return `workers`; or, with a warning, 0 if the locks that they need cannot be created."""
    try:
        # All at once, as many as a data loader needs: 3 for each queue (one a worker), 5 for each event.
        locks = [multiprocessing.Lock() for _ in range(4 * workers + 16)] if workers else []
    except OSError as error:
        _warn_once(
            f"Data workers cannot use {SHARED_MEMORY} ({error.strerror}), so the training process reads the images "
            f"itself, which is slower. {REMEDY}."
        )
        return 0
    del locks
    return workers


def pack_pixels(pixels: Tensor) -> Tensor | bytes:
    """Return what a data worker pickles for the pixels of a batch: a tensor in shared memory, or bytes if that is full.

    Args:
        pixels: (B, 3, H, W) uint8.
    """
    if not _pipes_only:
        with suppress(RuntimeError):  # full; torch reserves the space before it writes
            return pixels.share_memory_()
    return pixels.numpy().tobytes()


def unpack_pixels(pixels: Tensor | bytes, shape: tuple[int, ...]) -> Tensor:
    """Return the pixels that `handed_over` has sent."""
    if isinstance(pixels, Tensor):
        return pixels
    _warn_once(
        f"{SHARED_MEMORY} is full or too small, so batches go through pipes, which is slower. {REMEDY}, or use fewer "
        "data.workers."
    )
    return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(shape) if pixels else torch.empty(shape).byte()


def exit_instead_of_hanging() -> None:
    """In a data worker: exit if a batch cannot be sent or the training process is gone, instead of waiting for ever."""
    parent = os.getppid()

    def exit_on_error(error: Exception, batch: object) -> None:
        print(f"A data worker cannot send a batch: {printable(error)}.", file=sys.stderr, flush=True)
        os._exit(1)

    def exit_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # a write to a full pipe would block: this process holds the reading end, too

    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(exit_on_error)  # type: ignore[attr-defined]
    threading.Thread(target=exit_with_parent, daemon=True).start()


_pipes_only = False
_warned: set[str] = set()


def _warn_once(text: str) -> None:
    """Warn once per process, on the first rank only."""
    if dist.rank() == 0 and text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=2)
