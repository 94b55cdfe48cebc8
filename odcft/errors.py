"""The one exception that is the user's to fix, and one of torch's that may be."""

import reprlib


class OdcftError(Exception):
    """A mistake the user can fix: a flag, path, recipe, checkpoint or data.

    The message is one sentence or two: what is wrong, with the value, and what to do next. The command line prints it
    without a traceback and exits with 2. Our own mistakes are assertions, and do show their traceback.
    """


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether this is torch's or Python's way to say that memory ran out."""
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def shown(value: object, most: int = 60, quoted: bool = True) -> str:
    """What a file says, for a message: on one line, of printable letters, and not longer than `most`."""
    if isinstance(value, dict | list | tuple) and len(value) > most:
        return f"a {type(value).__name__} of {len(value):,}"
    if isinstance(value, str):
        text = repr(value[: most + 1]) if quoted else repr(value[: most + 1])[1:-1]
    elif isinstance(value, int) and value.bit_length() > 200:
        text = f"a number of {value.bit_length():,} bits"
    else:
        text = reprlib.repr(value)
    return text if len(text) <= most + 2 else f"{text[:most]}…"
