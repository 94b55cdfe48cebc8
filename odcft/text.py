"""Names and other people's words made safe to show: on a terminal, where they could forge lines, and in Markdown.

Nothing is left out: what cannot be shown as it is, is written as Python writes it in a string.
"""

import re
import reprlib
from datetime import datetime, timezone

# Controls (C0, DEL, C1), separators of lines, what turns the direction of writing around or has no width, surrogates.
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def shown(text: object) -> str:
    """Text for one line of a terminal: controls, line breaks, turned or invisible letters and broken ones as escapes.

    Args:
        text: anything that has a text: a sentence, a path of any bytes (bytes that are no letters come out as \\xNN).
    """
    return _HIDDEN.sub(_escaped, str(text))


def _escaped(found: re.Match[str]) -> str:
    letter = found.group()
    if "\udc80" <= letter <= "\udcff":  # a byte of a file name that is not UTF-8
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape", "backslashreplace").decode("ascii")


def brief(value: object, most: int = 60, quotes: bool = True) -> str:
    """A value that a file holds, for a message: on one line, as Python writes it, and not longer than `most`."""
    if isinstance(value, dict | list | tuple) and len(value) > most:
        return f"a {type(value).__name__} of {len(value):,}"
    if isinstance(value, str):
        text = repr(value[: most + 1]) if quotes else shown(value[: most + 1])
    elif isinstance(value, int) and value.bit_length() > 200:
        text = f"a number of {value.bit_length():,} bits"
    else:
        text = reprlib.repr(value)
    return text if len(text) <= most + 2 else f"{text[:most]}…"


def code_span(text: object) -> str:
    """Text between backticks, as Markdown shows it letter by letter, whatever it holds; "" for nothing."""
    line = shown(text)
    if not line.strip():
        return ""
    fence = "`" * (_longest_run(line) + 1)
    padding = " " if line[0] in "` " or line[-1] in "` " else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def code_block(text: str, language: str = "") -> str:
    """Lines of text as a block of code, that nothing in them can end."""
    fence = "`" * max(3, _longest_run(text) + 1)
    lines = "\n".join(shown(line.expandtabs()) for line in text.replace("\r\n", "\n").split("\n"))
    return f"{fence}{language}\n{lines}\n{fence}"


def markdown_text(text: object) -> str:
    """Text on a line of Markdown as it is: no link, no emphasis, no HTML."""
    escaped = re.sub(r"([\\`*_{}\[\]()#+\-.!|~>:@])", r"\\\1", shown(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;")


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def now() -> str:
    """The time in UTC, as logs and files have it: "2026-11-25T11:02:03+00:00"."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def count_of(number: float, thing: str) -> str:
    """ "1 epoch", "2 epochs", "1,797 images"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds as people say them: "48 s", "12 min", "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
