"""What a shell offers when Tab is pressed: recipes, fields of a recipe with their values, protocols, and other choices.

Shells wait for the answer, so nothing here imports torch. `odcft --install-completion` sets a shell up.
"""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, Literal, get_args, get_origin

Offers = list[tuple[str, str]]  # each a word to complete to, and what it is


def choices(*words: str) -> Callable[[str], list[str]]:
    """A function that offers those words that begin with what has been typed."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def recipes(incomplete: str) -> Offers:
    """The shipped recipes; where none fits, the shell offers files."""
    from odcft.recipe import shipped

    firsts = {name: text.splitlines()[0].lstrip("# ") for name, text in shipped().items()}
    return [(name, about) for name, about in firsts.items() if name.startswith(incomplete)]


def fields(incomplete: str) -> Offers:
    """`group.field=value` for --set: every value of a field that has a few, otherwise its default to edit."""
    from odcft.recipe import Recipe

    return [(word, about) for word, about in _all_fields(Recipe, "") if word.startswith(incomplete)]


def _all_fields(group: Any, prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in group.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            yield from _all_fields(field.annotation, f"{name}.")
            continue
        default = _as_yaml(field.get_default(call_default_factory=True))
        values = list(dict.fromkeys([default, *map(_as_yaml, _few_values(field.annotation))]))
        for value in values:
            yield f"{prefix}{name}={value}", "the default" if value == default else ""


def _few_values(annotation: Any) -> Iterator[Any]:
    """All values that a field's type lists: those of a Literal, or of a bool."""
    if annotation is bool:
        yield from (True, False)
    elif get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for part in get_args(annotation):
            if not isinstance(part, str):
                yield from _few_values(part)


def _as_yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "[" + ",".join(map(_as_yaml, value)) + "]" if isinstance(value, list | tuple) else str(value)


def protocols(incomplete: str) -> list[str]:
    """Protocols of `evaluate`, after those that have been typed: `svm,k` becomes `svm,knn`."""
    from odcft.evaluation.protocols import PROTOCOLS, UNLABELLED

    before, comma, last = incomplete.rpartition(",")
    typed = before.split(",")
    return [
        f"{before}{comma}{name}" for name in (*PROTOCOLS, UNLABELLED) if name.startswith(last) and name not in typed
    ]


def presets(incomplete: str) -> Offers:
    """Presets, with what each changes."""
    from odcft.presets import PRESETS

    return [(name, preset.what) for name, preset in PRESETS.items() if name.startswith(incomplete)]


# ---------------------------------------------------------------- bash


@contextmanager
def words_of_bash() -> Iterator[None]:
    """Let `--set memory.variant=o` complete in bash, which hands over "a=b" as the three words "a", "=" and "b".

    Inside, typer sees the words as they were typed; what it prints is then cut down to the part that bash completes.
    For other shells, and when nothing is completed, nothing happens.
    """
    if os.environ.get("_ODCFT_COMPLETE") != "complete_bash":
        yield
        return
    words, typed = _joined(os.environ.get("COMP_WORDS", "").split("\n")[: int(os.environ.get("COMP_CWORD", 0)) + 1])
    os.environ |= {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    if typed.startswith("-"):  # --set=memory.variant=o: typer answers without the name of the option
        typed = typed.partition("=")[2]
    answer = io.StringIO()
    try:
        with redirect_stdout(answer):
            yield
    finally:
        for line in answer.getvalue().splitlines():
            print(line.removeprefix(typed))


def _joined(words: list[str]) -> tuple[list[str], str]:
    """Join again what bash took apart at "="; also return what stands before the part of the last word it completes.

    Nothing is joined to an empty word, which is one that begins after a space.
    """
    joined: list[str] = []
    before = ""
    for last, word in zip(["", *words], words, strict=False):
        if joined and word and "=" in (last, word):
            before = joined[-1] + (word if word == "=" else "")
            joined[-1] += word
        else:
            before = ""
            joined.append(word)
    return joined, before
