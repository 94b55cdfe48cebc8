"""The one exception that is the user's to fix, and one of torch's that may be."""


class OdcftError(Exception):
    """A mistake the user can fix: a flag, path, recipe, checkpoint or data.

    The message is one sentence or two: what is wrong, with the value, and what to do next. The command line prints it
    without a traceback and exits with 2. Our own mistakes are assertions, and do show their traceback.
    """


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether this is torch's or Python's way to say that memory ran out."""
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text
