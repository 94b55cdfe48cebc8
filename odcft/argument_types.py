"""Arguments of Python functions are checked, against their annotations and by value, and refused in a sentence."""

import collections.abc
import functools
import inspect
import numbers
import os
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from odcft.errors import OdcftError
from odcft.text import short_repr

StrPath: TypeAlias = str | os.PathLike[str]
_Function = TypeVar("_Function", bound=Callable[..., Any])
_NAMES = {str: "a str", int: "an int", float: "a number", bool: "True or False", type(None): "None"}
_ALSO = {int: numbers.Integral, float: numbers.Real}  # numpy's too


def checked(function: _Function) -> _Function:
    """The function, which refuses arguments that are not what their annotations say.

    It understands classes, unions, `Sequence[…]` (a list or tuple), `Mapping[…]`, `Callable`, and the name `Recipe`.
    A bool does not pass for a number, nor text for a list.
    """

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        hints = _hints(function)
        for name, value in signature.bind(*args, **options).arguments.items():
            if not _fits(value, hints[name]):
                raise OdcftError(
                    f"{name}={short_repr(value)} ({type(value).__name__}): give {_or(_expected(hints[name]))}."
                )
        return function(*args, **options)

    signature = inspect.signature(function)
    return cast(_Function, call)


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """What the annotations of its arguments stand for."""
    import odcft

    arguments = {name: hint for name, hint in function.__annotations__.items() if name != "return"}
    about: Any = types.SimpleNamespace(__annotations__=arguments)
    return get_type_hints(about, function.__globals__, {"Recipe": odcft.Recipe})


def _fits(value: Any, hint: Any) -> bool:
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind is Any:
        return True
    if kind in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is collections.abc.Callable:
        return callable(value)
    if kind is collections.abc.Sequence:
        return isinstance(value, list | tuple) and all(_fits(one, parts[0]) for one in value)
    if kind is collections.abc.Mapping:
        return isinstance(value, Mapping) and all(_fits(name, parts[0]) for name in value)
    kind = _ALSO.get(kind, kind)
    return isinstance(value, kind) and not (isinstance(value, bool) and hint is not bool)


def _expected(hint: Any) -> Iterator[str]:
    """What an annotation allows, in words."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        for part in parts:
            yield from _expected(part)
    elif kind is collections.abc.Callable:
        yield "a function"
    elif kind is collections.abc.Sequence:
        yield f"a list of {_or(one.partition(' ')[2] for one in _expected(parts[0]) if one != 'None')}"
    elif kind is collections.abc.Mapping:
        yield "a dict"
    elif kind is os.PathLike:
        yield "a Path"
    else:
        yield _NAMES.get(kind, f"a {getattr(kind, '__name__', kind)}")


def _or(words: Iterator[str]) -> str:
    *most, last = dict.fromkeys(words)
    return f"{', '.join(most)} or {last}" if most else last


def text_of(path: Any) -> Any:
    """A path as text; None stays None.

    Raises:
        OdcftError: it is something else.
    """
    if path is None:
        return None
    if not isinstance(path, str | os.PathLike) or not isinstance(text := os.fspath(path), str):
        raise OdcftError(f"{type(path).__name__} given where a path or a name belongs. Give a str or a Path.")
    return text


def path_of(path: Any) -> Path | None:
    """A path as a Path; None stays None."""
    return None if path is None else Path(text_of(path))


def texts_of(paths: Any) -> Any:
    """One path as text, or the paths of a list or tuple as a list of texts.

    Raises:
        OdcftError: there is none.
    """
    if paths is None or (isinstance(paths, list | tuple) and not paths):
        raise OdcftError(f"ckpt={paths!r}: give a checkpoint, or a list of them.")
    return [text_of(path) for path in paths] if isinstance(paths, list | tuple) else text_of(paths)


def in_range(name: str, value: Any, least: float, most: float) -> Any:
    """A number of a range; None stays None.

    Raises:
        OdcftError: it is outside of it.
    """
    if value is not None and not least <= value <= most:
        raise OdcftError(f"{name}={value}: give a number from {least:,} to {most:,}.")
    return value
