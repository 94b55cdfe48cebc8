"""The report of a run that trains: written now and then, and once more at its end. No failure of it fails the run."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from odcft.distributed import dist
from odcft.progress import Progress

SHARE = 0.01  # of the time, at most, that writing the report may take while the run trains
FIRST_AFTER = 120.0  # seconds
THUMBNAIL_SECONDS = 60.0  # that thumbnails may take at the end, about
EXTRACTION_SECONDS = 15.0  # that features of the sample may take at the end, about, per backbone
LEAST_SAMPLE = 200  # images


class LiveReport:
    """Keeps RUN/report.html up to date while the run trains; only rank 0 writes, and it waits for nobody.

    Args:
        run: the RUN.
        wanted: `log.report`.
        say: called once if a report could not be written.
    """

    def __init__(self, run: Path, wanted: bool, say: Callable[[str], None]) -> None:
        self.run, self.say = run, say
        self.wanted = wanted and dist.rank() == 0
        self.next = time.monotonic() + FIRST_AFTER

    def update(self) -> None:
        """Write the page if it is time to: curves and health; clusters and pictures follow at the end."""
        if not self.wanted or time.monotonic() < self.next:
            return
        began = time.monotonic()
        try:
            write_progress(self.run)
        except Exception as error:
            self.wanted = False
            self.say(failure(error))
        took = time.monotonic() - began
        self.next = began + max(FIRST_AFTER, took / SHARE)


def write_progress(run: Path) -> None:
    """Write RUN/report.html from the log alone."""
    from odcft.reports.page import refuse_page, write_page
    from odcft.reports.run_record import read_run
    from odcft.reports.run_report import first_page

    record = read_run(run, with_clusters=False)
    refuse_page(run / "report.html", overwrite=True)
    page = first_page(record)
    page.notes.append("The run is still training: clusters and their pictures will be here when it has ended.")
    page.training = True
    write_page(page, run / "report.html")


def lacks_last_report(run: Path) -> bool:
    """Whether a finished run lacks its last report: a process killed while it wrote that leaves an earlier one."""
    from odcft.reports.page import is_early_report

    page = run / "report.html"
    return not page.exists() or is_early_report(page)


def write_at_end(run: Path, progress: Progress, *, images: Any, reader: Any = None) -> Path | None:
    """Write RUN/report.html of a finished run, on this one of its processes; return it, or None if that failed.

    Args:
        run: the RUN.
        progress: where to report.
        images: of the run, in its order.
        reader: the user's function that reads them.
    """
    try:
        from odcft.reports.run_report import SAMPLE, report
        from odcft.run.metrics import read_lines

        speed = (read_lines(run / "metrics.jsonl") or [{}])[-1].get("images_per_second", 0.0)
        # Training takes a backward pass, too; still, one process extracts what several have trained on.
        sample = min(SAMPLE, max(LEAST_SAMPLE, int(speed * EXTRACTION_SECONDS)))
        with progress.waiting("Writing the report …"):
            report(
                run,
                images=images,
                reader=reader,
                sample=sample,
                seconds=THUMBNAIL_SECONDS,
                alone=dist.world_size() > 1,
                progress=Progress(quiet=True),
            )
    except Exception as error:
        progress.say(failure(error))
        return None
    return run / "report.html"


def failure(error: Exception) -> str:
    """The line that says why there is no report."""
    said = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
    return f"Note        The report could not be written ({said}). The run is not affected; try: odcft report RUN"
