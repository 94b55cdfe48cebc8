"""What commonly fails in a run through no fault of odcft, explained in a sentence that says what to do."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from odcft.distributed import dist
from odcft.errors import OdcftError, ran_out_of_memory
from odcft.recipe import Recipe
from odcft.text import short_repr

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def explain_failures(recipe: Recipe, in_parts: bool = True) -> Iterator[None]:
    """Turn running out of memory, dying data workers and failing disks into an OdcftError.

    Args:
        recipe: of the run; the advice names its numbers.
        in_parts: whether `optim.accumulate` can help.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if ran_out_of_memory(error):
            raise OdcftError(out_of_memory(recipe, in_parts)) from None
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise OdcftError(could_not_compile(error)) from None
        if "DataLoader worker" in str(error):
            raise OdcftError(worker_died(str(error), recipe)) from None
        raise
    except OSError as error:
        if error.errno in DISK_FULL:
            what = f"{error.filename or 'The output'} cannot be written: {error.strerror}. Make room"
        elif error.errno is not None and error.filename is not None:
            what = f"{error.filename}: {error.strerror}. Fix it"
        else:
            raise
        raise OdcftError(f"{what} and continue with --resume.") from None


def out_of_memory(recipe: Recipe, in_parts: bool = True) -> str:
    """The error after running out of memory, with the parts or the batch size to try next."""
    optim, ranks = recipe.optim, dist.world_size()
    return (
        f"Out of memory with optim.batch_size={optim.batch_size} on {ranks} process{'es' if ranks > 1 else ''}. "
        f"Start again with {more_parts(recipe) if in_parts else ''}{smaller_batch(recipe)}, or, "
        f"if you have more devices, continue with --resume --devices {2 * ranks}: the processes share the batch."
    )


def could_not_compile(error: Exception) -> str:
    """The error after torch.compile failed."""
    why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (
        f"torch.compile failed ({short_repr(why, 200, quotes=False)}). It needs a C++ compiler on a CPU, and Triton on "
        "a GPU. Start again without optim.compile."
    )


def more_parts(recipe: Recipe) -> str:
    """The option for twice as many parts of a batch and "or ", if it can be divided into so many; else ""."""
    parts = 2 * (recipe.optim.accumulate if isinstance(recipe.optim.accumulate, int) else 1)
    if 2 * parts * dist.world_size() > recipe.optim.batch_size:
        return ""
    return f"--set optim.accumulate={parts} (the same batch in {parts} parts), or "


def smaller_batch(recipe: Recipe) -> str:
    """The options for half the batch, and the learning rate that goes with it."""
    optim, half = recipe.optim, max(2 * dist.world_size(), recipe.optim.batch_size // 2)
    return f"--set optim.batch_size={half} --set optim.lr={optim.lr * half / optim.batch_size:g}"


def worker_died(text: str, recipe: Recipe) -> str:
    """The error after a data worker died, with the likely cause."""
    workers = recipe.data.workers if isinstance(recipe.data.workers, int) else 8
    return (
        f"A data worker died ({text.strip().splitlines()[0]}). Usually the memory ran out; in a container, the shared "
        f"memory (docker run --shm-size=8g). Continue with --resume --set data.workers={workers // 2}."
    )
