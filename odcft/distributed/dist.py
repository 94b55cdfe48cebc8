"""Collectives and process groups, with the same functions for one process as for many.

A rank draws its batches from the images it owns (see ownership.py), so it reads and writes the samples memory locally,
and only tensors with one entry or row per cluster are exchanged.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import torch
import torch.distributed
from torch import Tensor, nn

from odcft.distributed import accelerator
from odcft.distributed.attendance import Attendance, time_out
from odcft.errors import OdcftError

_attendance: Attendance | None = None  # of several ranks


def rank() -> int:
    """This process's rank; 0 for a single process."""
    return torch.distributed.get_rank() if _started() else 0


def world_size() -> int:
    """The number of ranks; 1 for a single process."""
    return torch.distributed.get_world_size() if _started() else 1


def local_world_size() -> int:
    """The number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def local_rank() -> int:
    """This process's number on its machine, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def this_device() -> torch.device:
    """Where this rank computes: a GPU of its own if there are any, else the CPU."""
    kind = accelerator.kind()
    return torch.device(kind) if kind in ("cpu", "mps") else torch.device(kind, local_rank())


def nccl_version() -> str | None:
    """The version of NCCL that this torch has, which ranks on GPUs need; None if it has none."""
    if not (torch.distributed.is_available() and torch.distributed.is_nccl_available()):
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def _started() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def start(device: torch.device) -> None:
    """Join the other processes that torchrun (or `--devices`) started; do nothing in a single process."""
    global _attendance
    if "RANK" in os.environ and not _started():
        if device.type not in accelerator.BACKENDS:
            raise OdcftError(f"Several processes cannot share work on {device.type}. Use one, or --accelerator cpu.")
        accelerator.set_device(device)
        limit = time_out()
        torch.distributed.init_process_group(accelerator.BACKENDS[device.type], timeout=limit)
        store = torch.distributed.PrefixStore("odcft", torch.distributed.distributed_c10d._get_default_store())
        _attendance = Attendance(store, rank(), world_size(), limit)


def join() -> bool:
    """Under a launcher, join the other processes; return whether this call did, rather than an earlier one.

    Raises:
        OdcftError: there are more processes than GPUs.
    """
    if "RANK" not in os.environ or _started():
        return False
    if accelerator.kind() != "cpu" and local_rank() >= accelerator.device_count():
        raise OdcftError(
            f"{local_world_size()} processes need as many GPUs, but this machine has {accelerator.device_count()}."
        )
    start(this_device())
    return True


def leave() -> None:
    """Leave the other processes, after all have done their work."""
    global _attendance
    _attendance = None
    torch.distributed.destroy_process_group()


def is_lost_peer_error(error: BaseException) -> bool:
    """Whether torch raised this error because another process has ended (and reports why itself), or is unreachable."""
    if not _started() or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.distributed.DistError) or "gloo/" in str(error)


def exit_process(code: int) -> NoReturn:
    """End this process with an exit code; one of several ranks skips Python's own shutdown.

    The threads that carried out collectives may still be releasing tensors, and outlive the group if DDP holds it. One
    that needs the interpreter while that is shutting down aborts the process, although all its work is done (described
    in github.com/pytorch/pytorch/pull/179291, not fixed there).
    """
    if not _started():
        sys.exit(code)
    if code == 0:  # after an error the other ranks are not in the same place, and would not answer
        torch.distributed.destroy_process_group()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the terminal may be gone
            stream.flush()
    os._exit(code)


def wait_for_all() -> None:
    """Wait until every rank has arrived here, without a time limit as long as all are alive. The host waits."""
    if _attendance is not None and world_size() > 1:
        _attendance.wait()


def was_restarted() -> bool:
    """Whether torchrun has started these processes again after a failure; the same answer on every rank."""
    mine = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return any(gather_dict({rank(): mine}).values())


def all_sum_(*tensors: Tensor) -> None:
    """Sum each tensor over the ranks, in place."""
    if world_size() > 1:
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def all_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor over the ranks, as a new tensor."""
    summed = tensor.clone()
    all_sum_(summed)
    return summed


def broadcast_(*tensors: Tensor) -> None:
    """Copy rank 0's values to every rank, in place."""
    if world_size() > 1:
        for tensor in tensors:
            torch.distributed.broadcast(tensor, src=0)


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all ranks, ordered by rank; their numbers may differ, and the host waits for them.

    Args:
        rows: (S, ...), of this rank.

    Returns:
        (sum of S, ...), the same on every rank.
    """
    if world_size() == 1:
        return rows
    counts = torch.zeros(world_size(), dtype=torch.int64, device=rows.device)
    counts[rank()] = len(rows)
    all_sum_(counts)
    sizes = counts.tolist()
    parts = gather_filled(rows, max(sizes)).split(max(sizes))
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def gather_filled(rows: Tensor, most: int, fill: float = 0.0) -> Tensor:
    """The rows of all ranks, ordered by rank, each rank's filled up to as many, so that no host waits for numbers.

    Args:
        rows: (S, ...), of this rank.
        most: S of no rank is larger.
        fill: what the rows that are added hold.

    Returns:
        (ranks * most, ...), the same on every rank; of a single process the rows as they are.
    """
    if world_size() == 1:
        return rows
    filled = rows.new_full((most, *rows.shape[1:]), fill)
    filled[: len(rows)] = rows
    parts = [torch.empty_like(filled) for _ in range(world_size())]
    torch.distributed.all_gather(parts, filled)
    return torch.cat(parts)


def gather_dict(mine: dict) -> dict:
    """The dicts of all ranks, merged; for small dicts only. Ranks may take any time to get here."""
    if world_size() == 1:
        return mine
    wait_for_all()
    parts: list[dict] = [{} for _ in range(world_size())]
    torch.distributed.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def data_parallel(model: nn.Module, device: torch.device, sync_bn: Iterable[nn.Module] = ()) -> nn.Module:
    """The model with gradients averaged over all ranks; unchanged in a single process.

    Args:
        model: on the device.
        device: of this rank.
        sync_bn: the parts of the model whose batch norm takes its statistics over all ranks; changed in place. Only on
            a GPU: torch cannot do it on CPUs, whose ranks normalise over their own batches.
    """
    if world_size() == 1:
        return model
    if device.type != "cpu":
        from timm.layers import convert_sync_batchnorm  # torch's own drops the activation of BatchNormAct2d

        for part in sync_bn:
            convert_sync_batchnorm(part)
    ids = [device.index] if device.type != "cpu" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids)


@contextmanager
def exchanging_gradients(model: nn.Module, now: bool) -> Iterator[None]:
    """A context for forward and backward pass; with `now` false, gradients are only added up on this rank."""
    if now or not isinstance(model, nn.parallel.DistributedDataParallel):
        yield
    else:
        with model.no_sync():
            yield


def barrier() -> None:
    """Wait until every rank has arrived here, and the device has done its work."""
    if world_size() > 1:
        wait_for_all()
        torch.distributed.barrier()
