"""What a run says: progress on the terminal, metrics.jsonl, TensorBoard. Only rank 0 speaks."""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from odcft.distributed import dist
from odcft.text import duration, shown

LONG = 5.0  # seconds of silence before something without a bar is named


class Progress:
    """Phases with a rate and the time left: bars on a terminal, otherwise a plain line now and then. All on stderr."""

    def __init__(self, every: float = 30.0, quiet: bool = False) -> None:
        from rich.console import Console

        self.every = every  # seconds between two plain lines
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.quiet = quiet or dist.rank() > 0

    def say(self, line: str) -> None:
        """One line for the person, whatever names are in it."""
        if not self.quiet:
            self.console.print(shown(line), markup=False)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Show that something goes on that has no bar: a spinner on a terminal, else a line where it takes long."""
        from rich.text import Text

        if self.quiet:
            yield
        elif self.console.is_terminal:
            with self.console.status(Text(shown(what))):
                yield
        else:
            line = threading.Timer(LONG, self.say, [what])
            line.start()
            try:
                yield
            finally:
                line.cancel()

    @contextmanager
    def phase(self, title: str, total: int, unit: str = "img") -> Iterator[Callable[..., None]]:
        """Show `total` things being done.

        Yields:
            advance(count, note=""): count more are done; the note is shown behind the rate.
        """
        if self.quiet:
            yield lambda count, note="": None
        elif self.console.is_terminal:
            with self._bar(title, total, unit) as advance:
                yield advance
        else:
            yield self._lines(title, total, unit)

    @contextmanager
    def _bar(self, title: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
        from rich import progress
        from rich.text import Text

        class Bar(progress.Progress):
            """With the note below, where it has the whole width: beside the bar it would push out rate and time."""

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
                bar.update(task, advance=count, rate=f"{rate:,.0f} {unit}/s")
                if note:
                    bar.update(task, note=shown(note))

            yield advance

    def _lines(self, title: str, total: int, unit: str) -> Callable[..., None]:
        started = spoke = time.monotonic()
        done = 0
        last_note = ""

        def advance(count: int, note: str = "") -> None:
            nonlocal done, spoke, last_note
            done += count
            last_note = note or last_note
            now = time.monotonic()
            if now - spoke >= self.every or done >= total:
                spoke = now
                rate = done / max(1e-9, now - started)
                left = duration((total - done) / max(1e-9, rate))
                text = f"{title}: {done:,}/{total:,} {unit}, {rate:,.0f} {unit}/s, {left} left"
                self.say(f"{text}  {last_note}" if last_note else text)

        return advance


def print_json(values: dict[str, Any]) -> None:
    """The one JSON object that `--json` promises on stdout."""
    json.dump(values, sys.stdout)
    sys.stdout.write("\n")
