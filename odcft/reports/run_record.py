"""What a RUN folder says about itself, read for the report: every file is data of unknown origin.

Shapes: N images, K clusters, D embedding.
"""

import math
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from odcft.distributed import ownership
from odcft.errors import OdcftError
from odcft.files import read_json, read_text
from odcft.recipe import Recipe, dump, load_recipe
from odcft.reports.charts import CURVES
from odcft.run.clusters_parquet import read_cluster_table
from odcft.run.folder import STEP, read_quarantine
from odcft.run.metrics import parse_line, raw_lines

MAX_METRICS_BYTES = 1 << 29
MOST_LINES, LAST_LINES = 10_000, 200  # of the log; half as many after it was thinned; the last ones, which all stay
MAX_CENTROIDS = 1 << 28  # numbers
MAX_RECIPE = 1 << 16  # characters of recipe.yaml that are shown as they are
SIZE_FIGURES = ("loss", "loss_over_ln_k", "epoch", "step", "entropy", "largest_share", "centroid_spread")
FIGURES = {*SIZE_FIGURES, *(key for curve in CURVES.values() for key in curve.keys)}
EPOCH_FIGURES = ("nmi_previous", "knn")  # which a log has once an epoch
WARNINGS = ("diverging", "chance", "uneven", "alike")  # of collapse_warnings.py
# What safetensors, torch and numpy raise for a file that is damaged, or holds something else.
UNREADABLE = (OSError, SafetensorError, KeyError, ValueError, IndexError, TypeError, RuntimeError)


@dataclass
class Assignment:
    """The clusters that a run ended with.

    Attributes:
        names: of the images, as clusters.parquet has them (bytes that are not UTF-8 as \\xNN).
        cluster_N: the cluster of each.
        distance_N: of its feature to the centroid; NaN if the file does not say.
    """

    names: list[str]
    cluster_N: np.ndarray
    distance_N: np.ndarray


@dataclass
class RunRecord:
    """A RUN as its files describe it; what is missing or damaged is empty.

    Attributes:
        folder: the RUN.
        about: run.json.
        recipe: of the run; None if it cannot be read.
        recipe_text: recipe.yaml as it is.
        lines: of metrics.jsonl, only numbers that are finite and the names of warnings.
        unreadable: images left out from the start, name to reason.
        clusters: None while the run has not ended.
        centroids_KD: of the newest state.
        earlier_N: the labels in an earlier state, in the order of the images.
        earlier_step: the steps that state had done.
    """

    folder: Path
    about: dict[str, Any] = field(default_factory=dict)
    recipe: Recipe | None = None
    recipe_text: str = ""
    lines: list[dict[str, Any]] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    clusters: Assignment | None = None
    centroids_KD: np.ndarray | None = None
    earlier_N: np.ndarray | None = None
    earlier_step: int = 0

    @property
    def method(self) -> str:
        """odc, dc or codc."""
        return self.recipe.method if self.recipe else "odc"

    @property
    def planned_epochs(self) -> int | None:
        """How many epochs the recipe plans; None if it cannot be read."""
        epochs = self.recipe.optim.epochs if self.recipe else None
        return None if epochs == "auto" else epochs

    @property
    def epochs_done(self) -> float:
        """By the last line of the log."""
        return float(self.lines[-1].get("epoch", 0.0)) if self.lines else 0.0

    @property
    def finished(self) -> bool:
        """Whether the run is complete."""
        return isinstance(self.about.get("finished"), int) and self.clusters is not None

    def full_lines(self) -> list[dict[str, Any]]:
        """Those lines that hold every figure the checks of a run's health need."""
        return [line for line in self.lines if all(name in line for name in SIZE_FIGURES)]

    def image_count(self) -> int | None:
        """How many images the run was started with, by run.json; None if it does not say."""
        found = self.about.get("images")
        return found if isinstance(found, int) and not isinstance(found, bool) and 0 <= found < 1 << 40 else None

    def cluster_count(self) -> int | None:
        """K."""
        found = self.recipe.memory.clusters if self.recipe else None
        return found if isinstance(found, int) else None


def read_run(folder: Path, *, with_clusters: bool = True) -> RunRecord:
    """Read what a report needs of a RUN.

    Args:
        folder: the RUN.
        with_clusters: also its clusters and states, which grow with the number of images.

    Raises:
        OdcftError: it is not a RUN, or its log or its clusters cannot be read.
    """
    try:
        is_run = folder.is_dir() and (folder / "run.json").is_file()
    except OSError as error:
        raise OdcftError(f"{folder} cannot be read: {error.strerror}.") from None
    if not is_run:
        raise OdcftError(f"{folder} is not a RUN: it has no run.json. Give the folder that `odcft finetune` wrote.")
    record = RunRecord(folder, read_json(folder / "run.json"))
    with suppress(OdcftError):
        record.recipe = load_recipe(folder / "recipe.yaml")
        text = read_text(folder / "recipe.yaml")
        record.recipe_text = text if len(text) <= MAX_RECIPE else dump(record.recipe)
    record.lines = _clean_lines(folder / "metrics.jsonl")
    with suppress(OdcftError, ValueError):
        record.unreadable = read_quarantine(folder)
    table = folder / "clusters.parquet"
    if with_clusters and (table.exists() or table.is_symlink()):
        record.clusters = Assignment(*read_cluster_table(table, record.image_count()))
        _add_states(record)
    return record


def _clean_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl with a step, sorted by it, with the figures that a report uses; of a long log fewer.

    Beyond MOST_LINES, every second line is dropped, again and again; those with a figure of a whole epoch go last, and
    the last lines stay.
    """
    kept: dict[int, dict[str, Any]] = {}
    last: deque[tuple[int, bytes]] = deque(maxlen=LAST_LINES)
    every = 1
    try:
        if path.is_file() and path.stat().st_size > MAX_METRICS_BYTES:
            raise OdcftError(f"{path} has {path.stat().st_size:,} bytes, too many for a log.")
        for number, raw in enumerate(raw_lines(path)):
            last.append((number, raw))
            wanted = number % every == 0 or any(name.encode() in raw for name in EPOCH_FIGURES)
            if wanted and (line := _clean(raw)) is not None:
                kept[number] = line
            if len(kept) > 2 * MOST_LINES:
                every *= 2
                kept = {n: one for n, one in kept.items() if n % every == 0 or not one.keys().isdisjoint(EPOCH_FIGURES)}
                kept = dict(islice(kept.items(), 0, None, 1 if len(kept) < 1.5 * MOST_LINES else 2))
    except OSError as error:
        raise OdcftError(f"{path} cannot be read: {error.strerror}.") from None
    kept |= {number: line for number, raw in last if (line := _clean(raw)) is not None}
    return sorted((kept[number] for number in sorted(kept)), key=lambda line: line["step"])


def _clean(raw: bytes) -> dict[str, Any] | None:
    """The figures in a line of metrics.jsonl that are finite numbers, and its warnings; None for a line to skip."""
    line = parse_line(raw) or {}
    numbers: dict[str, Any] = {
        name: line[name]
        for name in FIGURES & line.keys()
        if isinstance(line[name], int | float) and not isinstance(line[name], bool) and abs(line[name]) < 1e30
    }
    if "step" not in numbers:
        return None
    warned = line.get("warnings")
    numbers["warnings"] = [one for one in WARNINGS if one in warned] if isinstance(warned, list) else []
    return numbers


def _add_states(record: RunRecord) -> None:
    """Add the centroids of the newest state and the labels of an earlier one, as far as the states have them."""
    assert record.clusters is not None
    states = sorted((record.folder / "checkpoints").glob(STEP))
    count = len(record.clusters.names)
    for state in reversed(states):
        with suppress(*UNREADABLE):
            found = _tensor(state / "same.safetensors", "method.centroids", 2, MAX_CENTROIDS).float().numpy()
            if np.isfinite(found).all():
                record.centroids_KD = found
                break
    for state in states[:-1]:
        labels = _labels_of(state, count)
        if labels is not None:
            record.earlier_N, record.earlier_step = labels, int(state.name.removeprefix("step-"))
            return


def _tensor(path: Path, name: str, dimensions: int, most: int) -> torch.Tensor:
    """A tensor of a state.

    Args:
        path: of the file, which may be anything.
        name: of the tensor.
        dimensions: that it must have.
        most: elements.

    Raises:
        ValueError: this is not a file, or the tensor has another shape; UNREADABLE has what else is raised.
    """
    if not path.is_file():  # a pipe would be waited for
        raise ValueError("not a file")
    with safe_open(path, "pt") as tensors:
        shape = tensors.get_slice(name).get_shape()
        if len(shape) != dimensions or math.prod(shape) > most:
            raise ValueError("another shape")
        return torch.as_tensor(tensors.get_tensor(name))


def _labels_of(state: Path, count: int) -> np.ndarray | None:
    """The labels (N,) in a state, in the order of the images; None if it is damaged or of other images."""
    shards = sorted(state.glob("rank-*-of-*.safetensors"))
    labels_N = np.full(count, -1, np.int64)
    try:
        for shard in shards:
            rank, ranks = (int(part) for part in shard.stem.removeprefix("rank-").split("-of-"))
            if ranks != len(shards) or not 0 <= rank < ranks:
                return None
            found = _tensor(shard, "rows.labels", 1, count)
            if found.is_floating_point() or found.is_complex():
                return None
            labels_N[ownership.image_of(torch.arange(len(found)), rank, ranks).numpy()] = found.numpy()
    except UNREADABLE:
        return None
    return labels_N if len(shards) and (labels_N >= 0).all() else None
