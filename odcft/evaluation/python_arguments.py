"""Arguments that a Python program gives: the command line's have the right types already."""

from collections.abc import Mapping
from numbers import Integral
from typing import Any

from odcft.errors import OdcftError
from odcft.text import short_repr

WORDS = ("layers", "crop", "accelerator")
WORDS_OR_NONE = ("arch", "input", "part")
FLAGS = ("per_class", "allow_partial", "overwrite", "progress")
SIZES = (8, 4096)  # pixels, as on the command line


def refuse_wrong_types(**given: Any) -> None:
    """Refuse arguments of `evaluate` or `embed` that have the wrong type, by their names.

    Paths are checked where they are converted, and `reader` where it is used.

    Raises:
        OdcftError: names the first one, and what to give.
    """
    for name, value in given.items():
        if wanted := _wanted(name, value):
            raise OdcftError(f"{name}={short_repr(value)}: give {wanted}.")


def _wanted(name: str, value: Any) -> str:
    """What to give instead of a value; "" if it is right."""
    if name in WORDS:
        return "" if isinstance(value, str) else "a word"
    if name in WORDS_OR_NONE:
        return "" if value is None or isinstance(value, str) else "a name, or None"
    if name in FLAGS:
        return "" if isinstance(value, bool) else "True or False"
    if name == "size":
        least, most = SIZES
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        return "" if value is None or (whole and least <= int(value) <= most) else f"a number from {least} to {most:,}"
    if name == "protocol":
        several = isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)
        return (
            "" if several or isinstance(value, str) else 'names of protocols, for example "svm,knn" or ["svm", "knn"]'
        )
    if name == "arch_args":
        named = isinstance(value, Mapping) and all(isinstance(one, str) for one in value)
        return "" if value is None or named or isinstance(value, str) else 'a dict such as {"patch_size": 8}, or None'
    raise AssertionError(f"unknown argument {name}")
