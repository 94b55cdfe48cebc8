"""Arrays that loader processes share with the training process instead of each having a copy."""

import mmap
import sys
from typing import Any

import numpy as np
import torch


def shared(array: np.ndarray) -> np.ndarray:
    """Copy an array into memory that forked processes share, read-only.

    The pages leave this process's page table again (they stay in memory), so that only who reads them maps them.
    """
    memory = mmap.mmap(-1, max(1, array.nbytes))
    copy: np.ndarray = np.frombuffer(memory, array.dtype, array.size)
    copy[:] = array.ravel()
    copy.flags.writeable = False
    drop_pages(memory)
    return copy.reshape(array.shape)


def drop_pages(memory: mmap.mmap) -> None:
    """Unmap the pages of a shared mapping or a mapped file; they are mapped again when they are read."""
    if sys.platform == "linux":  # elsewhere DONTNEED may mean something else
        memory.madvise(mmap.MADV_DONTNEED)


class SharesArrays:
    """A base class: arrays of an object are pickled as handles to shared memory, copied there once.

    Processes that are started by fork need no pickling; those that are started by spawn get the handles.
    """

    def __getstate__(self) -> dict[str, Any]:
        handles = self.__dict__.setdefault("_handles", {})
        state = {}
        for name, value in self.__dict__.items():
            if isinstance(value, np.ndarray):
                if name not in handles:
                    handles[name] = _to_shared_tensor(value)
                value = handles[name]
            if name != "_handles":
                state[name] = value
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            self.__dict__[name] = value.numpy() if isinstance(value, torch.Tensor) else value


def _to_shared_tensor(array: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(array.copy())
    try:
        return tensor.share_memory_()
    except RuntimeError:  # shared memory is full: each process gets a copy
        return tensor
