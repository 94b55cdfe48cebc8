"""Counts what ranks exchange, and what the host reads, from step to step."""

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("item", "tolist", "nonzero", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
COLLECTIVES = ("all_reduce", "all_gather", "broadcast", "all_gather_object", "barrier")


class Counters:
    """What was counted since the last `take`, within `counting`.

    Reads are of tensors on the device of the memory, which is the CPU here. Within `on_host_copies` nothing is read
    from it.
    """

    def __init__(self):
        self.paused = 0
        self.take()

    def take(self):
        """Return (collectives, bytes that this rank sends, host reads), and start again."""
        taken = [getattr(self, name, 0) for name in ("collectives", "sent", "reads")]
        self.collectives = self.sent = self.reads = 0
        return taken

    @contextmanager
    def on_host_copies(self):
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    def read(self):
        self.reads += not self.paused

    def collective(self, *tensors):
        self.collectives += 1
        self.sent += sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @contextmanager
    def counting(self):
        """Count the calls of this process. Gradients and buffers are counted if the network is wrapped in here."""
        with ExitStack() as stack:
            for name in READS:
                self._watch(stack, torch.Tensor, name, lambda *args: self.read())
            self._watch(stack, torch, "equal", lambda *args: self.read())
            for name in COLLECTIVES:
                self._watch(stack, torch.distributed, name, self._called)
            self._watch(stack, torch.distributed, "all_gather_object", lambda *args: self._called())
            buffers = "_distributed_broadcast_coalesced"
            self._watch(stack, DistributedDataParallel, buffers, lambda ddp, tensors, *a: self.collective(*tensors))
            whole = DistributedDataParallel.__init__

            def wrap(ddp, *args, **kwargs):
                whole(ddp, *args, **kwargs)
                ddp.register_comm_hook(None, self._gradients)

            stack.enter_context(mock.patch.object(DistributedDataParallel, "__init__", wrap))
            stack.enter_context(_Masks(self))
            yield self

    def _watch(self, stack, owner, name, seen):
        whole = getattr(owner, name)

        def call(*args, **kwargs):
            seen(*args)
            with self.on_host_copies():  # what a read or a collective calls in turn is not counted
                return whole(*args, **kwargs)

        stack.enter_context(mock.patch.object(owner, name, call))

    def _called(self, *args):
        """Count one collective. `all_gather_object` is two, of sizes and of pickled bytes; these are not counted."""
        mine = args[1] if len(args) > 1 and isinstance(args[1], torch.Tensor) else args[0] if args else None
        self.collective(*[mine] if isinstance(mine, torch.Tensor) else [])

    def _gradients(self, _, bucket):
        self.collective(bucket.buffer())
        future = torch.distributed.distributed_c10d._get_default_group().allreduce(
            [bucket.buffer().div_(torch.distributed.get_world_size())]
        )
        return future.get_future().then(lambda done: done.value()[0])


class _Masks(TorchDispatchMode):
    """Indexing by a mask reads how many are true, and so do repeats whose number is in a tensor."""

    def __init__(self, counters):
        super().__init__()
        self.counters = counters

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if by_mask or name in ("masked_select", "repeat_interleave", "unique"):
            self.counters.read()
        return func(*args, **(kwargs or {}))
