"""The exception for mistakes the user can fix, and a check for running out of memory."""


class OdcftError(Exception):
    """A mistake the user can fix: in a flag, path, recipe, checkpoint or data.

    The message is one or two sentences: what is wrong, with the value, and what to do next. The command line prints it
    without a traceback and exits with 2. Bugs of ours are assertions, and show their traceback.
    """


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python raised this error because memory ran out."""
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text
