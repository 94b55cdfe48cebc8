"""What a RUN folder says about itself, read for the report: every file is data of unknown origin.

Shapes: N images, K clusters, D embedding.
"""

import math
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from odcft.distributed import ownership
from odcft.errors import OdcftError
from odcft.files import read_json, read_text
from odcft.recipe import Recipe, load_recipe
from odcft.run.clusters_parquet import read_cluster_table
from odcft.run.folder import STEP, read_quarantine
from odcft.run.metrics import read_lines

MAX_METRICS_BYTES = 1 << 29
MAX_CLUSTERS = 1 << 20
SIZE_FIGURES = ("loss", "loss_over_ln_k", "epoch", "step", "entropy", "largest_share", "centroid_spread")


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
        return self.recipe.optim.epochs if self.recipe else None

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
        record.recipe_text = read_text(folder / "recipe.yaml")
    record.lines = _clean_lines(folder / "metrics.jsonl")
    with suppress(OdcftError, ValueError):
        record.unreadable = read_quarantine(folder)
    if with_clusters and (folder / "clusters.parquet").is_file():
        record.clusters = Assignment(*read_cluster_table(folder / "clusters.parquet"))
        _add_states(record)
    return record


def _clean_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl with a step, sorted by it, without anything that is neither a number nor a warning."""
    try:
        if path.is_file() and path.stat().st_size > MAX_METRICS_BYTES:
            raise OdcftError(f"{path} has {path.stat().st_size:,} bytes, too many for a log.")
        lines = read_lines(path)
    except OSError as error:
        raise OdcftError(f"{path} cannot be read: {error.strerror}.") from None
    kept = []
    for line in lines:
        numbers: dict[str, Any] = {
            str(name): value
            for name, value in line.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
        }
        if "step" in numbers and all(math.isfinite(value) for value in numbers.values()):
            warned = line.get("warnings")
            numbers["warnings"] = [w for w in warned if isinstance(w, str)] if isinstance(warned, list) else []
            kept.append(numbers)
    return sorted(kept, key=lambda line: line["step"])


def _add_states(record: RunRecord) -> None:
    """Add the centroids of the newest state and the labels of an earlier one, as far as the states have them."""
    assert record.clusters is not None
    states = sorted((record.folder / "checkpoints").glob(STEP))
    count = len(record.clusters.names)
    for state in reversed(states):
        with suppress(OSError, SafetensorError, KeyError, ValueError, RuntimeError):
            with safe_open(state / "same.safetensors", "np") as tensors:
                found = tensors.get_tensor("method.centroids")
            if found.ndim == 2 and len(found) <= MAX_CLUSTERS and np.isfinite(found).all():
                record.centroids_KD = found.astype(np.float32)
                break
    for state in states[:-1]:
        labels = _labels_of(state, count)
        if labels is not None:
            record.earlier_N, record.earlier_step = labels, int(state.name.removeprefix("step-"))
            return


def _labels_of(state: Path, count: int) -> np.ndarray | None:
    """The labels (N,) in a state, in the order of the images; None if it is damaged or of other images."""
    shards = sorted(state.glob("rank-*-of-*.safetensors"))
    labels_N = np.full(count, -1, np.int64)
    try:
        for shard in shards:
            rank, ranks = (int(part) for part in shard.stem.removeprefix("rank-").split("-of-"))
            if ranks != len(shards) or not 0 <= rank < ranks:
                return None
            with safe_open(shard, "np") as tensors:
                found = torch.from_numpy(tensors.get_tensor("rows.labels"))
            labels_N[ownership.image_of(torch.arange(len(found)), rank, ranks).numpy()] = found.numpy()
    except (OSError, SafetensorError, ValueError, IndexError, TypeError, RuntimeError):
        return None
    return labels_N if len(shards) and (labels_N >= 0).all() else None
