"""The user's own function that reads an image (`--reader my_module:read`), for formats that odcft does not read.

It is code, so it counts only where the user gives it; files that odcft wrote record its name but never make it run.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from odcft.data.decompression_bombs import refuse_large
from odcft.data.high_depth import HighDepthImage, limits_of
from odcft.data.image_files import is_url
from odcft.errors import OdcftError
from odcft.text import short_repr

if TYPE_CHECKING:
    from odcft.data.images import Images


class Reader:
    """A function that turns an image file into an array, and its name.

    The function gets the content of the file as bytes, or its path if its first parameter is called `path`. It returns
    (H, W) or (H, W, C) of integers or floating point: 1 channel (gray), 3 (RGB), or as many as the network takes.

    Data loader processes import it again by its name; a function given in Python is pickled.

    Args:
        given: "module:function", the module being in the current folder or installed; or the function itself.

    Raises:
        OdcftError: it cannot be imported, or is not a function of one argument.
    """

    def __init__(self, given: str | Callable[[Any], Any]) -> None:
        if isinstance(given, str):
            self.name, self._function, self._by_name = given, _imported(given), True
        elif callable(given):
            name = getattr(given, "__qualname__", type(given).__qualname__)
            self.name, self._function, self._by_name = f"{given.__module__}:{name}", given, False
        else:
            raise OdcftError(f"reader={short_repr(given)}: give a function, or its name as MODULE:FUNCTION.")
        self._takes_path = _first_parameter(self.name, self._function) == "path"

    def __reduce__(self) -> tuple[Any, ...]:
        return Reader, (self.name if self._by_name else self._function,)

    def values(self, images: "Images", index: int, bands: int | None) -> HighDepthImage:
        """Read image `index`.

        Args:
            images: the images.
            index: which of them.
            bands: how many channels the network takes (3 also for gray); None accepts any number.

        Raises:
            OdcftError: the function failed, or returned something else than an image; says which.
            OSError: the file cannot be read.
        """
        if self._takes_path and (images.store is not None or is_url(images.path(index))):
            raise OdcftError(f"{self.name} takes a path, but this image is no file of its own; let it take bytes")
        given = images.path(index) if self._takes_path else images.read(index)
        try:
            result = self._function(given)
        except (Exception, SystemExit) as error:
            raise OdcftError(f"{self.name} failed: {_said(error)}") from None
        return _checked(result, self.name, bands)


def make_reader(given: "str | Callable[[Any], Any] | Reader | None") -> Reader | None:
    """The reader that a program was given, if any. Raises an OdcftError if it cannot be imported."""
    return given if given is None or isinstance(given, Reader) else Reader(given)


def refuse_other_reader(recorded: object, reader: Reader | None, made: object) -> None:
    """Refuse to continue something made with another reader: the pixels would differ.

    Args:
        recorded: the reader's name in a file that odcft wrote; None if it was made without one.
        reader: the reader given now.
        made: what it is, for the message: a path.
    """
    now = None if reader is None else reader.name
    if recorded == now:
        return
    if recorded is None:
        raise OdcftError(f"{made} was made without --reader. Drop --reader, or make it again.")
    name = short_repr(recorded, 200, quotes=False)
    if reader is None:
        raise OdcftError(
            f"{made} was made with --reader {name}. A reader is code, so it is never taken from a file: pass it again."
        )
    raise OdcftError(f"{made} was made with --reader {name}, not {now}. Pass that one, or make it again.")


def _imported(name: str) -> Callable[[Any], Any]:
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        raise OdcftError(f"--reader {name}: write it as MODULE:FUNCTION, for example my_module:read.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        function = getattr(importlib.import_module(module_name), function_name, None)
    except (Exception, SystemExit) as error:
        why = _said(error).rstrip(".")
        raise OdcftError(
            f"--reader {name}: {module_name} cannot be imported ({why}). Modules are looked up in the current folder "
            "and among the installed packages."
        ) from None
    if not callable(function):
        raise OdcftError(f"--reader {name}: {module_name} has no function {function_name}.")
    return function


def _said(error: BaseException) -> str:
    """What an error of the user's code says, in a line; its text is code of theirs, too."""
    try:
        return f"{type(error).__name__}: {str(error)[:300]}"
    except (Exception, SystemExit):
        return type(error).__name__


def _first_parameter(name: str, function: Callable[[Any], Any]) -> str:
    """The name of a function's first parameter; "" if it does not tell."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError):  # some builtins have no signature
        return ""
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if not parameters or len(needed) > 1:
        raise OdcftError(f"--reader {name}: it should take one argument, `path` or the bytes of the file.")
    return parameters[0].name


def _checked(result: Any, name: str, bands: int | None) -> HighDepthImage:
    """The array that a reader returned, as an image.

    Raises:
        OdcftError: it is not an array of an image, or of another number of channels than the network takes.
    """
    try:
        values = np.asarray(result)
    except (Exception, SystemExit) as error:
        raise OdcftError(f"{name} returned {type(result).__name__}, which is not an array ({_said(error)})") from None
    if values.dtype.kind not in "uif":
        raise OdcftError(f"{name} returned {type(result).__name__} of type {values.dtype}, not an array of numbers")
    if values.ndim not in (2, 3) or 0 in values.shape:
        raise OdcftError(f"{name} returned an array of shape {values.shape}; it should be H x W or H x W x C")
    channels = values.shape[2] if values.ndim == 3 else 1
    refuse_large(values.shape[1], values.shape[0], channels, values.dtype.itemsize)
    if bands is not None and channels != bands and (bands, channels) != (3, 1):
        hint = "; if they come first in this array, move them last" if values.shape[0] in (1, 3, bands) else ""
        takes = "1 (gray) or 3 (RGB)" if bands in (3, None) else bands
        raise OdcftError(f"{name} returned {channels} channels, but the network takes {takes}{hint}")
    return HighDepthImage(values, *limits_of(values.dtype))
