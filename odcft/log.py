"""What a run says: progress on the terminal, metrics.jsonl, TensorBoard. Only rank 0 speaks."""

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from odcft import dist, folders
from odcft.words import shown

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


class Metrics:
    """metrics.jsonl and TensorBoard event files of a RUN; writes nothing on other ranks than 0."""

    def __init__(self, run: Path, tensorboard: bool, first_step: int = 0) -> None:
        self._lines: list[dict[str, Any]] = []
        self._unwritten = b""
        self._file: int | None = None
        self._events: Any = None
        if dist.rank() > 0:
            return
        path = run / "metrics.jsonl"
        # Resumed: what was written after the state that is gone on from does not count, nor does half a line.
        self._lines = [line for line in read_lines(path) if _step(line) < first_step]
        folders.write_whole(path, "".join(json.dumps(line) + "\n" for line in self._lines))
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(run / "tensorboard"), purge_step=first_step or None)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One JSON object of figures of a step; the numbers among them to TensorBoard, too."""
        if self._file is None:
            return
        self._lines.append({"step": step, "time": now(), **values})
        self._unwritten += (json.dumps(self._lines[-1]) + "\n").encode()
        with suppress(OSError):  # the disk is full: the lines wait until there is room
            self._drain()
        if self._events is not None:
            try:
                for name, value in values.items():
                    if isinstance(value, int | float):
                        self._events.add_scalar(name, value, step)
            except OSError:
                self._events = None  # TensorBoard's writer does not get over a full disk; metrics.jsonl has everything

    def lines(self) -> list[dict[str, Any]]:
        """All lines of the run so far, those before it was resumed too; none on other ranks than 0."""
        return self._lines

    def last(self) -> dict[str, Any]:
        """The newest line, or {}."""
        return self._lines[-1] if self._lines else {}

    def sync(self) -> None:
        """Have every line on the disk.

        Raises:
            OSError: the disk is full.
        """
        if self._file is None:
            return
        self._drain()
        os.fsync(self._file)
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Write out what is held back."""
        if self._file is not None:
            with suppress(OSError):
                self._drain()
            os.close(self._file)
        self._file = None
        if self._events is not None:
            with suppress(OSError):
                self._events.close()

    def _drain(self) -> None:
        while self._unwritten:
            assert self._file is not None
            self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says, without half a line that a killed run may have left."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError, RecursionError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


def _step(line: dict[str, Any]) -> float:
    step = line.get("step")
    return step if isinstance(step, int | float) else math.inf


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


def print_json(values: dict[str, Any]) -> None:
    """The one JSON object that `--json` promises on stdout."""
    json.dump(values, sys.stdout)
    sys.stdout.write("\n")
