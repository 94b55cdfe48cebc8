"""What the benchmarks that train share: runs and results that are kept, so that nothing is done twice; and curves.

Everything lies in one output folder. An interrupted benchmark is continued by the same command: what is finished is
read, and a run that was stopped is resumed.
"""

import json
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from odcft import files
from odcft.run.metrics import read_lines

EXIT_STOPPED = 75  # as of odcft: stopped on request, the state is saved


def once(path: Path, work: Callable[[], Any]) -> Any:
    """The result in this JSON file; if it does not exist, that of `work`, which is then kept there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text_atomically(path, json.dumps(work(), indent=1))
    return json.loads(path.read_text(encoding="utf-8"))


def once_file(path: Path, write: Callable[[Path], None]) -> None:
    """Have this file written unless it exists; `write` is given a path beside it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic_file(path) as unfinished:
            write(unfinished)


def refuse_other_settings(path: Path, settings: Mapping[str, Any]) -> str:
    """Keep the settings of an output folder in this file; if it has others, say which: results must not be mixed."""
    wanted = json.loads(json.dumps(settings))
    kept = once(path, lambda: wanted)
    different = sorted(name for name in {*kept, *wanted} if kept.get(name) != wanted.get(name))
    return f"{path} has different settings ({', '.join(different)}): choose another --out" if different else ""


def odcft(*words: object) -> Any:
    """Run an odcft command in its own process and return what it prints with --json.

    If it fails, or is stopped, the benchmark ends with the same exit code. Ctrl-C reaches the command as well, and
    SIGTERM is passed on; the command then saves its state, so we wait for it.
    """
    command = [sys.executable, "-m", "odcft", *map(str, words), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        before = signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
        try:
            printed = _output_of(process)
        finally:
            signal.signal(signal.SIGTERM, before)
    if process.returncode:
        sys.exit(process.returncode)
    return json.loads(printed)


def _output_of(process: subprocess.Popen) -> str:
    while True:
        try:
            return process.communicate()[0]
        except KeyboardInterrupt:
            continue


def fine_tune(run: Path, ckpts: Iterable[str], data: str, options: Iterable[object]) -> dict[str, Any]:
    """Do a run, or resume it; return what it printed (`summary`) and the wall-clock and CPU seconds it took."""
    resumed = (run / "run.json").exists()
    began, used = time.monotonic(), _cpu_seconds()
    summary = odcft("finetune", *ckpts, data, "--out", run, *options, *(["--resume"] if resumed else []))
    times = {"seconds": time.monotonic() - began, "cpu_seconds": _cpu_seconds() - used}
    return {**times, "resumed": resumed, "summary": summary}


def _cpu_seconds() -> float:
    """CPU seconds of all child processes that have ended: the cost of a run, however busy the machine is."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def name_of(ckpt: str) -> str:
    """What to call a checkpoint: its file name up to the first dot; for the backbone of a RUN, the RUN's name."""
    path = Path(ckpt)
    name = (path.parent if path.name == "backbone" else path).name.split(".")[0]
    return re.sub(r"[^\w+-]+", "_", name)


# ---------------------------------------------------------------- pictures


@dataclass
class Curve:
    """A line of a picture: x, y, and its label and colour if it has its own."""

    x: list[float]
    y: list[float]
    label: str | None = None
    colour: str | None = None
    marker: str = ""


def curve_of_run(run: Path, figure: str, label: str | None = None, colour: str | None = None) -> Curve:
    """A figure of metrics.jsonl over the epochs."""
    lines = [line for line in read_lines(run / "metrics.jsonl") if figure in line]
    return Curve([line["epoch"] for line in lines], [line[figure] for line in lines], label, colour)


def draw(
    path: Path,
    panels: Mapping[str, list[Curve]],
    *,
    x: str | Mapping[str, str],
    y: str,
    bottom: float | None = None,
    log_x: bool = False,
) -> None:
    """Draw panels of curves side by side and save the picture.

    Args:
        path: of the PNG.
        panels: title to curves.
        x: label of the x axes, or of each by its panel's title.
        y: label of the y axis, which the panels share.
        bottom: where the y axis starts.
        log_x: a logarithmic x axis, labelled with the curves' own values.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    picture, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3), sharey=True, squeeze=False)
    for axis, (title, curves) in zip(axes[0], panels.items(), strict=True):
        for curve in curves:
            axis.plot(curve.x, curve.y, color=curve.colour, label=curve.label, marker=curve.marker, linewidth=1)
        axis.set(title=title, xlabel=x if isinstance(x, str) else x[title])
        if log_x:
            ticks = sorted({value for curve in curves for value in curve.x})
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
        if any(curve.label for curve in curves):
            axis.legend()
    axes[0][0].set(ylabel=y, ylim=(bottom, None))
    picture.tight_layout()
    picture.savefig(path, dpi=150)
    plt.close(picture)
