"""metrics.jsonl of a RUN; its figures also go to trackers such as TensorBoard."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from odcft import files
from odcft.distributed import dist
from odcft.run.trackers import Trackers
from odcft.text import utc_now

MAX_LINE = 1 << 16  # bytes in a line, at most


class Metrics:
    """Writes metrics.jsonl of a RUN, and gives its figures to the trackers; only rank 0 writes.

    Args:
        run: the RUN.
        trackers: those of the run; closed with the file.
        first_step: the number of steps done before; later lines are dropped.
    """

    def __init__(self, run: Path, trackers: Trackers, first_step: int = 0) -> None:
        self.trackers = trackers
        self._lines: list[dict[str, Any]] = []
        self._unwritten = b""
        self._file: int | None = None
        if dist.rank() > 0:
            return
        path = run / "metrics.jsonl"
        # When resuming, drop lines written after the state the run resumes from, and a half-written last line.
        self._lines = [line for line in read_lines(path) if _step(line) < first_step]
        files.write_text_atomically(path, "".join(json.dumps(line) + "\n" for line in self._lines))
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write the figures of a step as one JSON object; the trackers get the numbers among them."""
        if self._file is None:
            return
        self._lines.append({"step": step, "time": utc_now(), **values})
        self._unwritten += (json.dumps(self._lines[-1]) + "\n").encode()
        with suppress(OSError):  # the disk is full: the lines wait until there is room
            self._drain()
        self.trackers.scalars(step, values)

    def lines(self) -> list[dict[str, Any]]:
        """All lines of the run so far, including those from before it was resumed; empty except on rank 0."""
        return self._lines

    def last(self) -> dict[str, Any]:
        """The newest line, or {}."""
        return self._lines[-1] if self._lines else {}

    def sync(self) -> None:
        """Flush every line to disk.

        Raises:
            OSError: the disk is full.
        """
        if self._file is None:
            return
        self._drain()
        os.fsync(self._file)
        self.trackers.flush()

    def close(self) -> None:
        """Write the lines that are still pending, and close the files."""
        if self._file is not None:
            with suppress(OSError):
                self._drain()
            os.close(self._file)
        self._file = None
        self.trackers.close()

    def _drain(self) -> None:
        """Write the pending lines to the file."""
        while self._unwritten:
            assert self._file is not None
            self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without a half-written one that a killed run may have left."""
    return [line for raw in raw_lines(path) if (line := parse_line(raw)) is not None]


def raw_lines(path: Path) -> Iterator[bytes]:
    """The lines of metrics.jsonl as they are, one at a time; those that odcft would not write so long come in parts."""
    if path.is_file():
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE):
                yield line


def parse_line(raw: bytes) -> dict[str, Any] | None:
    """The object in a line of metrics.jsonl; None if there is none."""
    with suppress(ValueError, RecursionError):
        line = json.loads(raw.decode("utf-8", "replace"))
        return line if isinstance(line, dict) else None
    return None


def _step(line: dict[str, Any]) -> float:
    step = line.get("step")
    return step if isinstance(step, int | float) else math.inf
