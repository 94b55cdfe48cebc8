"""Images in shards: tar archives, Parquet files, datasets saved by Hugging Face; found through an index of each."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from odcft.data.image_files import ENDINGS, is_url
from odcft.data.images import Images, summary
from odcft.data.index_cache import Index, cached, checked_counts, stamps_of
from odcft.data.missing_paths import SHARDS
from odcft.data.names import Names
from odcft.data.stores import arrow_datasets, parquet, remote, tables, tar_shards
from odcft.errors import OdcftError
from odcft.progress import Progress

MANY = 8  # shards, which deserve a progress bar
_SPLIT = re.compile(r"(.+?)-\d{5}-of-\d{5}\b")  # of a data set of Hugging Face: train-00000-of-00005.parquet


def find_in_shards(
    source: Path | str, root: Path | str, names: list[str], skipped: dict[str, int], progress: Progress
) -> Images:
    """Find the images in shards of one kind.

    Args:
        source: as the user gave it.
        root: the folder that the names of shards are relative to, or its URL.
        names: of the shards, sorted.
        skipped: what is beside them.
        progress: where to report.
    """
    refuse_compressed(names)
    for name in names:
        path = os.path.join(root, name)
        if not is_url(path) and not os.path.isfile(path):  # reading a pipe might never end
            raise OdcftError(f"{path} is not a file. Remove it, or give {source} as a pattern that leaves it out.")
    kinds = sorted({os.path.splitext(name)[1].lower() for name in names})
    if len(kinds) > 1 or kinds[0] not in SHARDS:
        found = ", ".join(kind or "files without an extension" for kind in kinds)
        raise OdcftError(f"{source} holds or matches {found}. Give shards of one kind, for example '*{SHARDS[0]}'.")
    find = _find_in_tar if kinds == [".tar"] else _find_in_parquet
    images = find(source, root, names, progress)
    images.skipped = {**skipped, **{what: count + skipped.get(what, 0) for what, count in images.skipped.items()}}
    if not len(images):
        raise no_images(source, images.skipped)
    return images


def _find_in_tar(source: Path | str, root: Path | str, names: list[str], progress: Progress) -> Images:
    place = _absolute(root)
    paths = [os.path.join(place, name) for name in names]
    stamps_now = remote.stamps_of if is_url(place) else stamps_of

    def build() -> Index:
        stamps = stamps_now(paths)
        with _indexing(progress, source, len(names)) as advance:
            arrays, skipped = tar_shards.index_shards(place, names, advance)
        return Index(arrays, {"skipped": skipped}, Names(paths), stamps)

    def use(index: Index) -> Images:
        sizes = np.full(len(paths), 1 << 62) if is_url(place) else index.stamps[:, 2]
        store = tar_shards.store_of_index(index, paths, sizes)
        skipped = checked_counts(index.about["skipped"])
        return Images(source, root, names_of(index), names_of(index, "labels"), skipped, store)

    return cached(("tar", place, *names, "", *ENDINGS), build, use, stamps_now)


def _find_in_parquet(source: Path | str, root: Path | str, names: list[str], progress: Progress) -> Images:
    place = _absolute(root)

    def build() -> tuple[list[str], tables.Columns, list[list[int]]]:
        with _indexing(progress, source, len(names)) as advance:
            return names, *parquet.read_footers(place, names, advance)

    stamps_now = remote.stamps_of if is_url(place) else stamps_of
    return _find_in_tables(source, root, place, ("parquet", names), build, parquet.read_row_group, stamps_now)


def find_in_dataset(source: Path, folder: Path, progress: Progress) -> Images:
    """Find the images in a folder that Hugging Face's `datasets` saved; for `source` see `find_in_shards`."""

    def build() -> tuple[list[str], tables.Columns, list[list[int]]]:
        with progress.waiting(f"Indexing    {folder} …"):
            return arrow_datasets.read_state(Path(os.path.abspath(folder)), lambda count: None)

    listing = sorted(name for name in os.listdir(folder) if name.endswith((".arrow", ".json")))
    key, place = ("dataset", listing), os.path.abspath(folder)
    images = _find_in_tables(source, folder, place, key, build, arrow_datasets.read_batch, stamps_of)
    if not len(images):
        raise OdcftError(f"{source} is a saved dataset without rows.")
    return images


def _find_in_tables(
    source: Path | str,
    root: Path | str,
    place: str,
    key: tuple[str, list[str]],
    read: Callable[[], tuple[list[str], tables.Columns, list[list[int]]]],
    read_chunk: tables.ReadChunk,
    stamps_now: Callable[..., np.ndarray],
) -> Images:
    """Find the images in tables.

    Args:
        source: as the user gave it.
        root, place: the folder of the files: as it was given, and absolute.
        key: what kind they are, and the files that are watched.
        read: returns the names of the files, what their columns are for, and the rows of each of their chunks.
        read_chunk: for `TableStore`.
        stamps_now: the stamps of paths.
    """
    watched = [os.path.join(place, name) for name in key[1]]

    def build() -> Index:
        stamps = stamps_now(watched)
        names, columns, rows = read()
        chunks = [(file, chunk) for file, counts in enumerate(rows) for chunk in range(len(counts))]
        starts = np.cumsum([0, *(count for counts in rows for count in counts)], dtype=np.int64)
        found = Names(tables.row_names(names, [sum(counts) for counts in rows]))
        arrays = {"names": found.bytes_B, "ends": found.ends, "starts": starts}
        arrays["chunks"] = np.array(chunks, np.int64).reshape(-1, 2)
        return Index(arrays, {"files": names, "columns": vars(columns)}, Names(watched), stamps)

    def use(index: Index) -> Images:
        store = tables.store_of_index(index, place, read_chunk)
        return Images(source, root, names_of(index), None, {}, store)

    return cached((key[0], place, *key[1]), build, use, stamps_now)


def _absolute(root: Path | str) -> str:
    return str(root) if is_url(str(root)) else os.path.abspath(root)


@contextmanager
def _indexing(progress: Progress, source: Path | str, shards: int) -> Iterator[Callable[..., None]]:
    """Show a bar for many shards, a line for few. Yields `advance`."""
    if shards >= MANY:
        with progress.phase("Index", shards, "shards") as advance:
            yield advance
    else:
        with progress.waiting(f"Indexing    {source} …"):
            yield lambda count: None


def names_of(index: Index, which: str = "names") -> Names:
    """Names, or labels, of an index. Raises an error (ValueError, KeyError) if they do not fit."""
    names = Names.of_arrays(index.arrays[which], index.arrays["ends" if which == "names" else f"{which}_ends"])
    if len(names) != len(index.arrays["ends"]) - 1:
        raise ValueError("names and labels of different lengths")
    return names


def no_images(path: Path | str, skipped: dict[str, int]) -> OdcftError:
    """The error that there are no images, with what there is instead."""
    what = f"holds no images (but {summary(skipped)})" if skipped else "is empty"
    return OdcftError(f"{path} {what}. odcft looks for {', '.join(ENDINGS)}, in sub-folders too.")


def refuse_compressed(paths: list[str]) -> None:
    """Refuse compressed archives, with what to do about them."""
    for path in paths:
        if path.lower().endswith(tar_shards.COMPRESSED):
            raise OdcftError(
                f"{path} is compressed, so images cannot be read from its middle. Decompress it, and give the .tar."
            )


def refuse_several_splits(path: Path | str, shards: Sequence[str]) -> None:
    """Refuse a folder of a data set with a training and a test part, which would be mixed."""
    found = {match[1]: name for name in shards if (match := _SPLIT.match(os.path.basename(name)))}
    if len(found) > 1:
        split, name = max(found.items())
        raise OdcftError(
            f"{path} holds several splits: {', '.join(sorted(found))[:200]}. Give one of them, for example "
            f"'{os.path.join(path, os.path.dirname(name), split)}-*', or all with '*'."
        )
