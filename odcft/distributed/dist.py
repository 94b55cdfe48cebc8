"""Processes working together: the same verbs for one process as for many, so that nobody asks which it is.

Ownership rule: with W ranks, rank r owns images i with i % W == r, and keeps image i at its row i // W. A rank draws
its batches from its own images, so reading and writing the samples memory is local, and only K-sized tensors travel.
"""

import os
import sys
from contextlib import suppress
from typing import NoReturn

import torch
import torch.distributed
from torch import Tensor, nn


def rank() -> int:
    """This process's number among the ranks, 0 when alone."""
    return torch.distributed.get_rank() if _started() else 0


def world_size() -> int:
    """How many ranks there are, 1 when alone."""
    return torch.distributed.get_world_size() if _started() else 1


def local_rank() -> int:
    """This process's number on its machine: the GPU it takes."""
    return int(os.environ.get("LOCAL_RANK", 0))


def this_device() -> torch.device:
    """Where this rank computes: a GPU of its own if there are any, else the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def _started() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def start(device: torch.device) -> None:
    """Join the processes that torchrun (or `--devices`) started; alone, do nothing."""
    if "RANK" in os.environ and not _started():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")


def lost_another(error: BaseException) -> bool:
    """Whether this is torch's way to say that another process is gone, which says itself why, or cannot be reached."""
    if not _started() or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.distributed.DistError) or "gloo/" in str(error)


def leave(code: int) -> NoReturn:
    """End this process with an exit code; one of several ends on the spot, having left the group if all is well.

    The threads that carried the tensors may still be letting go of them, and outlive the group where DDP holds it: one
    that asks for Python while Python takes itself down aborts the process, after all its work was done (described in
    github.com/pytorch/pytorch/pull/179291, not mended there).
    """
    if not _started():
        sys.exit(code)
    if code == 0:  # with an error, the others are somewhere else and would not answer
        torch.distributed.destroy_process_group()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the terminal may be gone
            stream.flush()
    os._exit(code)


def all_sum_(*tensors: Tensor) -> None:
    """Sum each tensor over the ranks, in place. Alone there is nothing to add."""
    if world_size() > 1:
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def all_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor over the ranks, as a new tensor."""
    summed = tensor.clone()
    all_sum_(summed)
    return summed


def broadcast_(*tensors: Tensor) -> None:
    """Give every rank rank 0's values, in place."""
    if world_size() > 1:
        for tensor in tensors:
            torch.distributed.broadcast(tensor, src=0)


def gather_rows(rows: Tensor) -> Tensor:
    """All ranks' rows, rank by rank; the ranks may hold different numbers of them.

    Args:
        rows: (S, ...), this rank's.

    Returns:
        (sum of S, ...), the same on every rank.
    """
    if world_size() == 1:
        return rows
    counts = torch.zeros(world_size(), dtype=torch.int64, device=rows.device)
    counts[rank()] = len(rows)
    all_sum_(counts)
    sizes = counts.tolist()
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def gather_dict(mine: dict) -> dict:
    """The entries of all ranks' dicts; meant for few and small ones."""
    if world_size() == 1:
        return mine
    parts: list[dict] = [{} for _ in range(world_size())]
    torch.distributed.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The model as all ranks train it: gradients averaged, batch statistics over all ranks. Alone, the model itself."""
    if world_size() == 1:
        return model
    if device.type == "cuda":  # torch has SyncBN for accelerators only; CPU ranks normalise over their own batches
        from timm.layers import convert_sync_batchnorm  # torch's own would lose the activation in timm's BatchNormAct2d

        model = convert_sync_batchnorm(model)
    ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids)


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        torch.distributed.barrier()
