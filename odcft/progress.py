"""What is printed during a run: lines, progress bars and the JSON result. Only rank 0 prints."""

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from odcft.distributed import dist
from odcft.text import Branch, duration, printable

SILENCE = 3.0  # seconds before a task without a progress bar is announced


class Progress:
    """Shows phases with rate and time left: a bar on a terminal and in notebooks, otherwise a plain line now and then.

    It writes to stderr, or below the cell of a notebook; a bar there needs ipywidgets.
    """

    def __init__(self, every: float = 30.0, quiet: bool = False, opening: str = "") -> None:
        from rich.console import Console

        self.every = every  # seconds between two plain lines
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.quiet = quiet or dist.rank() > 0
        self.opening = opening  # a line that stands above the first other one; a refusal is alone
        self.bars = self.console.is_terminal or (self.console.is_jupyter and find_spec("ipywidgets") is not None)

    def say(self, line: str, style: str = "") -> None:
        """Print one line, with anything in it that could harm the terminal escaped; on a terminal, in a rich style."""
        if not self.quiet:
            opening, self.opening = self.opening, ""
            if opening:
                self.console.print(printable(opening), markup=False)
            self.console.print(printable(line), markup=False, style=style or None)

    def draw(self, branch: Branch) -> None:
        """Print a tree: drawn on a terminal, otherwise as plain lines."""
        from rich.text import Text
        from rich.tree import Tree

        if not self.console.is_terminal:
            for line in branch.lines():
                self.say(line)
        elif not self.quiet:

            def grow(tree: Tree, branches: list[Branch]) -> Tree:
                for one in branches:
                    grow(tree.add(Text(printable(one.text))), one.branches)
                return tree

            self.console.print(grow(Tree(Text(printable(branch.text), "bold")), branch.branches), soft_wrap=False)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Announce a task without a progress bar: a spinner on a terminal, otherwise a line if it takes long."""
        from rich.text import Text

        if self.quiet:
            yield
        elif self.console.is_terminal:
            with self.console.status(Text(printable(what))):
                yield
        else:
            line = threading.Timer(SILENCE, self.say, [what])
            line.start()
            try:
                yield
            finally:
                line.cancel()

    @contextmanager
    def phase(self, title: str, total: int, unit: str = "img") -> Iterator[Callable[..., None]]:
        """Show the progress through `total` items.

        Yields:
            advance(count, note=""): report that `count` more are done; the note is shown with the rate.
        """
        if self.quiet:
            yield lambda count, note="": None
        elif self.bars:
            with self._bar(title, total, unit) as advance:
                yield advance
        else:
            with self._plain_lines(title, total, unit) as advance:
                yield advance

    @contextmanager
    def _bar(self, title: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
        from rich import progress
        from rich.text import Text

        class Bar(progress.Progress):
            """A bar with the note on a line below: beside the bar it would push the rate and time off the screen."""

            def get_renderables(self) -> Iterator[Any]:
                yield from super().get_renderables()
                notes = [task.fields["note"] for task in self.tasks if task.fields["note"]]
                yield from (Text(f"  {note}", no_wrap=False, overflow="fold") for note in notes)

        bar = Bar(
            progress.TextColumn(f"{title:<12}"),
            progress.BarColumn(bar_width=24),
            progress.TextColumn("{task.percentage:>3.0f} %"),
            progress.TextColumn("{task.fields[rate]}"),
            progress.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=self.console,
        )
        started, done = time.monotonic(), 0
        with bar:
            task = bar.add_task(title, total=total, rate="", note="")

            def advance(count: int, note: str = "") -> None:
                nonlocal done
                done += count
                rate = done / max(1e-9, time.monotonic() - started)
                bar.update(task, advance=count, rate=f"{_rate(rate)} {unit}/s")
                if note:
                    bar.update(task, note=printable(note))

            yield advance

    @contextmanager
    def _plain_lines(self, title: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
        """A line after SILENCE, whether or not anything is done by then, then one every `every` seconds, and a last."""
        started = last_line = time.monotonic()
        done = 0
        last_note = ""

        def line() -> None:
            text = f"{title}: {done:,}/{total:,} {unit}"
            if done:
                rate = done / max(1e-9, time.monotonic() - started)
                left = duration((total - done) / rate)
                text += f", {_rate(rate)} {unit}/s, {left} left"
            self.say(f"{text}  {last_note}" if last_note else text)

        def advance(count: int, note: str = "") -> None:
            nonlocal done, last_line, last_note
            done += count
            last_note = note or last_note
            now = time.monotonic()
            if now - last_line >= self.every or done >= total:
                first.cancel()
                last_line = now
                line()

        first = threading.Timer(SILENCE, line)
        first.daemon = True
        first.start()
        try:
            yield advance
        finally:
            first.cancel()


def _rate(per_second: float) -> str:
    """With two digits at least: some work takes a minute a unit."""
    return f"{per_second:.2g}" if per_second < 1 else f"{per_second:,.{1 if per_second < 10 else 0}f}"


def print_json(values: dict[str, Any]) -> None:
    """Print the one JSON object of `--json` on stdout, with null for numbers that are not finite."""
    json.dump(_finite(values), sys.stdout, allow_nan=False)
    sys.stdout.write("\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
