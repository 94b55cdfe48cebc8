"""The clusters of a RUN, finished or not, and its images, wherever they are now.

Shapes: N images of the run, K clusters.
"""

import glob
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from odcft.data.custom_reader import make_reader
from odcft.data.image_files import is_url
from odcft.data.images import Images
from odcft.data.names import Names
from odcft.data.sources import find_images
from odcft.data.view import View
from odcft.errors import OdcftError
from odcft.files import iterate_column, read_json
from odcft.progress import Progress
from odcft.recipe import DataRecipe, load_recipe
from odcft.reports.run_record import UNREADABLE
from odcft.run import snapshot_files
from odcft.run.clusters_parquet import read_cluster_rows
from odcft.run.folder import read_quarantine
from odcft.run.memory_folder import open_memory
from odcft.text import count_of, short_repr

MEMORY = "memory.json"  # what a folder of `odcft init-memory` has instead of run.json
MAX_SAID = 1000  # characters of a path from a file, in a message
PIECE = 1 << 16  # rows whose distances are computed at a time


@dataclass
class RunClusters:
    """The clusters of the images of a RUN.

    Attributes:
        run: the folder.
        names: of the images, in the order of images.csv.
        label_N: the cluster of each, int64.
        distance_N: of its stored feature to the centroid, float32.
        K: how many clusters there are, empty ones too.
        step: if the run has not ended, after how many steps it was in this state; None if it has.
    """

    run: Path
    names: Names
    label_N: np.ndarray
    distance_N: np.ndarray
    K: int
    step: int | None = None

    @property
    def size_K(self) -> np.ndarray:
        """The number of images in each cluster, int64 (K,)."""
        return np.bincount(self.label_N, minlength=self.K)

    def largest_first(self) -> list[int]:
        """The clusters that have images, the largest first; of equal size, by number."""
        size_K = self.size_K
        return [k for k in np.argsort(-size_K, kind="stable").tolist() if size_K[k]]

    def by_distance(self) -> Iterator[tuple[int, np.ndarray]]:
        """Every cluster that has images, the largest first, with their rows: the nearest to the centroid first."""
        order = np.lexsort((self.distance_N, self.label_N))  # by cluster, then by distance, then by row
        ends = np.cumsum(self.size_K)
        for cluster in self.largest_first():
            yield cluster, order[ends[cluster] - self.size_K[cluster] : ends[cluster]]

    def mean_distance_K(self) -> np.ndarray:
        """The mean distance to the centroid in each cluster, float64 (K,); NaN where it is empty."""
        sums = np.bincount(self.label_N, weights=self.distance_N, minlength=self.K)
        size_K = self.size_K
        return np.divide(sums, size_K, out=np.full(self.K, np.nan), where=size_K > 0)


def read_run(run: Path) -> RunClusters:
    """The clusters a RUN ended with; of one that has not ended, those of its newest saved state; those of a memory.

    Raises:
        OdcftError: it is neither a RUN nor a memory, has no clusters yet, or is damaged.
    """
    if described_by(run) == MEMORY:
        return _of_memory(run)
    names = Names(iterate_column(run / "images.csv", "path"))
    step = None
    if (table := run / "clusters.parquet").exists() or table.is_symlink():
        labels_N, distance_N = read_cluster_rows(table, names)
    else:
        labels_N, distance_N, step = _of_state(run, len(names))
    most = int(labels_N.max(initial=0)) + 1
    clusters: Any = "auto"
    with suppress(OdcftError):  # no recipe, or one of another version: then clusters at the end may be missing
        clusters = load_recipe(run / "recipe.yaml").memory.clusters
    return RunClusters(
        *(run, names, labels_N, distance_N),
        max(most, min(clusters, len(names))) if isinstance(clusters, int) else most,
        step,
    )


def described_by(run: Path) -> str:
    """The file that says what a folder is: run.json of a RUN, memory.json of a memory.

    Raises:
        OdcftError: it is neither.
    """
    try:
        for name in ("run.json", MEMORY):
            if (run / name).is_file():
                return name
    except OSError as error:
        raise OdcftError(f"{run} cannot be read: {error.strerror}.") from None
    raise OdcftError(f"{run} is not a RUN: give a folder that `odcft finetune` (or `odcft init-memory`) wrote.")


def _of_memory(folder: Path) -> RunClusters:
    """The first clusters, of K-Means."""
    _, tensors, _, names, _ = open_memory(folder)
    labels_N, centroids_KD = tensors["labels"].long(), tensors["centroids"]
    distance_N = distances(tensors["features"], labels_N, centroids_KD, len(names))
    return RunClusters(folder, names, labels_N.numpy(), distance_N, len(centroids_KD))


def _of_state(run: Path, count: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Labels, distances and the step of the newest state."""
    folder = snapshot_files.newest_to_look_at(run)
    if folder is None:
        raise OdcftError(
            f"{run} has no clusters yet: it has neither ended nor saved a state. Continue it: "
            "odcft finetune … --resume."
        )
    try:
        state = snapshot_files.load(folder)
        features_ND, labels_N = state.rows["features"], state.rows["labels"].long()
        centroids_KD = state.same["method.centroids"]
        distance_N = distances(features_ND, labels_N, centroids_KD, count)
        return labels_N.numpy(), distance_N, int(state.about["step"])
    except UNREADABLE as error:
        raise OdcftError(f"{folder} cannot be read ({error}). If {run} is training, try again in a minute.") from None


def distances(features_ND: torch.Tensor, labels_N: torch.Tensor, centroids_KD: torch.Tensor, count: int) -> np.ndarray:
    """The distance of each feature to the centroid of its label, float32 (N,).

    Raises:
        ValueError: the tensors are not those of so many images; torch raises others (UNREADABLE).
    """
    if (features_ND.ndim, labels_N.ndim, centroids_KD.ndim) != (2, 1, 2):
        raise ValueError("its tensors have other shapes")
    if not len(features_ND) == len(labels_N) == count or not 0 <= labels_N.min() <= labels_N.max() < count:
        raise ValueError("it is of other images")
    found = [
        (features_ND[rows].float() - centroids_KD[labels_N[rows]].float()).norm(dim=1)
        for rows in torch.arange(count).split(PIECE)
    ]
    return torch.cat(found).numpy()


@dataclass
class RunImages:
    """The images of a RUN as they are now.

    Attributes:
        images: all that DATA has now.
        where_N: for each image of the run its index in `images`; -1 if it is gone.
        view: how the run saw them.
        new: how many images DATA has that the run did not.
    """

    images: Images
    where_N: np.ndarray
    view: View
    new: int

    @property
    def gone(self) -> int:
        """How many images of the run are no longer there."""
        return int((self.where_N < 0).sum())

    def notes(self) -> list[str]:
        """What a person should know about them."""
        found = []
        if self.gone:
            found.append(
                f"Note        Left out: {count_of(self.gone, 'image')} of the run, no longer in {self.images.source}."
            )
        if self.new:
            what = count_of(self.new, "image")
            found.append(f"Note        Left out: {what} in {self.images.source} that the run did not have.")
        return found


def find_run_images(clusters: RunClusters, data: str | None, reader: Any, progress: Progress) -> RunImages:
    """Find the images of a RUN again.

    Args:
        clusters: of the RUN.
        data: where its images are now; None to look where they were. Nothing is fetched from a URL unasked.
        reader: the user's function that reads them, or its name.
        progress: where to report.

    Raises:
        OdcftError: they are not there, or not one of them is of the run.
    """
    images = find_images(place_of_images(clusters.run) if data is None else data, progress, make_reader(reader))
    rows = images.names.rows_of(set(clusters.names))
    where_N = np.fromiter((rows.get(name, -1) for name in clusters.names), np.int64, len(clusters.names))
    if not rows:
        raise OdcftError(
            f"None of the {count_of(len(clusters.names), 'image')} of {clusters.run} is in {images.source}; "
            f"the first is {clusters.names[0]}. Pass what it was run on, where that is now: --data DATA."
        )
    unreadable = images.names.rows_of(read_quarantine(clusters.run))
    return RunImages(images, where_N, _view_of(clusters.run), len(images) - len(rows.keys() | unreadable.keys()))


def place_of_images(run: Path) -> str:
    """Where the images of a RUN are, by its run.json: the absolute path, or relative to this folder or those of RUN."""
    file = run / described_by(run)
    about = read_json(file)
    data, absolute = about.get("data"), about.get("data_path")
    if not isinstance(data, str) or not data:
        raise OdcftError(f"{file} does not say where the images are. Pass --data DATA.")
    said = short_repr(data, MAX_SAID, quotes=False)
    if is_url(data):
        raise OdcftError(f"{run} was run on {said}. Nothing is fetched unasked: pass --data {said} if it should be.")
    places = [absolute] if isinstance(absolute, str) else []
    places += [data, *(os.path.join(folder, data) for folder in run.absolute().parents)]
    for place in places:
        if os.path.exists(place) and os.path.samefile(place, run):
            continue  # a RUN is often called what its images are
        if os.path.exists(place) or (glob.has_magic(place) and glob.glob(place)):
            return place
    raise OdcftError(f"{run} was run on {said}, which does not exist here. Pass where it is now: --data DATA.")


def _view_of(run: Path) -> View:
    """How many bands and which range of values the images have; the sizes do not matter to sheets."""
    data = DataRecipe()
    if described_by(run) == MEMORY:
        data = open_memory(run)[-1].data
    elif (run / "recipe.yaml").is_file():
        data = load_recipe(run / "recipe.yaml").data
    intensity = None if isinstance(data.range, str) else data.range
    return View(224, intensity=intensity, bands=3 if data.bands == "auto" else data.bands)
