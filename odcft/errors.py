"""The exception for mistakes the user can fix, and what several modules check."""


class OdcftError(Exception):
    """A mistake the user can fix: in a flag, path, recipe, checkpoint or data.

    The message is one or two sentences: what is wrong, with the value, and what to do next. The command line prints it
    without a traceback and exits with 2. Bugs of ours are assertions, and show their traceback.
    """


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python raised this error because memory ran out."""
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def refuse_not_finite(bad: int, images: int, source: str) -> None:
    """Refuse features that hold NaN or infinite numbers, if any do.

    Args:
        bad: how many images have such features.
        images: of how many.
        source: the checkpoint.

    Raises:
        OdcftError: there are some.
    """
    if bad:
        raise OdcftError(
            f"{source} gives features that are NaN or infinite for {bad:,} of {images:,} images: its weights are "
            "damaged. Use another checkpoint, for example an earlier state."
        )
