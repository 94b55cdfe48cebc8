"""Text for people: untrusted names made safe for a terminal or for Markdown, commands to paste, counts and durations.

Names of files, or text from them, could forge lines on a terminal. Nothing is dropped: characters that cannot be shown
as they are become Python escapes.
"""

import re
import reprlib
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

# Control characters (C0, DEL, C1), line separators, bidirectional and zero-width characters, surrogates.
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: object) -> str:
    """Text for one line of a terminal, with control, invisible and undecodable characters and line breaks escaped.

    Args:
        text: anything `str` takes: a sentence, or a path (bytes that are not UTF-8 come out as \\xNN).
    """
    return _HIDDEN.sub(_escape, str(text))


def _escape(found: re.Match[str]) -> str:
    char = found.group()
    if "\udc80" <= char <= "\udcff":  # a byte of a file name that is not UTF-8
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape", "backslashreplace").decode("ascii")


@dataclass
class Branch:
    """A line of text with others below it: `progress.Progress.draw` shows it as a tree."""

    text: str
    branches: list["Branch"] = field(default_factory=list)

    def add(self, text: str) -> "Branch":
        """Add a line below this one, and return it."""
        self.branches.append(Branch(text))
        return self.branches[-1]

    def lines(self, depth: int = 0) -> Iterator[str]:
        """The same as plain lines, each indented by its depth."""
        yield "  " * depth + self.text
        for branch in self.branches:
            yield from branch.lines(depth + 1)


def short_repr(value: object, most: int = 60, quotes: bool = True) -> str:
    """A value from a file, for a message: its `repr` on one line, cut after `most` characters."""
    if isinstance(value, dict | list | tuple) and len(value) > most:
        return f"a {type(value).__name__} of {len(value):,}"
    if isinstance(value, str):
        text = repr(value[: most + 1]) if quotes else printable(value[: most + 1])
    elif isinstance(value, int) and value.bit_length() > 200:
        text = f"a number of {value.bit_length():,} bits"
    else:
        text = reprlib.repr(value)
    return text if len(text) <= most + 2 else f"{text[:most]}…"


def code_span(text: object) -> str:
    """Text as a Markdown code span, which shows any text literally; "" for blank text."""
    line = printable(text)
    if not line.strip():
        return ""
    fence = "`" * (_longest_run(line) + 1)
    padding = " " if line[0] in "` " or line[-1] in "` " else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def code_block(text: str, language: str = "") -> str:
    """Lines of text as a Markdown code block that nothing in them can close."""
    fence = "`" * max(3, _longest_run(text) + 1)
    lines = "\n".join(printable(line.expandtabs()) for line in text.replace("\r\n", "\n").split("\n"))
    return f"{fence}{language}\n{lines}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def utc_now() -> str:
    """The current time in UTC, as logs and files record it: "2026-11-25T11:02:03+00:00"."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def count_of(number: float, thing: str) -> str:
    """A number with its noun, singular or plural: "1 epoch", "2 epochs", "1,797 images"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """A number of seconds as people say it: "48 s", "12 min", "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def command(verb: str, *words: object, **options: Any) -> str:
    """An odcft command that can be pasted into a shell, whatever characters its paths contain.

    Args:
        verb: the subcommand.
        words: its arguments.
        options: by name; None, False and empty lists are left out, True gives a flag, a list repeats the option.
    """
    parts = ["odcft", verb, *map(str, words)]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, list | tuple) else [value]:
            if one is not None and one is not False:
                parts += [flag] if one is True else [flag, str(one)]
    return shlex.join(parts)
