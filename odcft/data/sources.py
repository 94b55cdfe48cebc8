"""Which images a DATA argument names: a folder, a list file, or shards; on this machine or at a URL."""

import glob
import os
import re
from pathlib import Path

from odcft.data.custom_reader import Reader
from odcft.data.image_files import ENDINGS, MAX_BYTES, file_size, is_url, read_file
from odcft.data.images import Images
from odcft.data.index_cache import Index, cached, checked_counts, stamps_of
from odcft.data.missing_paths import SHARDS, WHAT
from odcft.data.names import Names
from odcft.data.shards import (
    find_in_dataset,
    find_in_shards,
    names_of,
    no_images,
    refuse_compressed,
    refuse_several_splits,
)
from odcft.data.stores import folders, remote
from odcft.data.stores.arrow_datasets import find_dataset
from odcft.data.stores.lists import LISTS, read_list
from odcft.data.stores.tar_shards import COMPRESSED
from odcft.errors import OdcftError
from odcft.progress import Progress


def find_images(data: str | Path, progress: Progress | None = None, reader: Reader | None = None) -> Images:
    """Find the images of a DATA argument. What is found is kept in a cache, for the next time (index_cache.py).

    Args:
        data: a folder, searched recursively (images sorted by path; if it has none, its shards; or a dataset saved by
            `datasets` of Hugging Face); a `.txt` with one path per line, a `.csv` or `.tsv` with a column of paths
            (relative to the list); a `.tar` or `.parquet`, or a pattern for several. Or the URL of any of these.
        progress: where to show that it takes long.
        reader: the user's function that reads the images. With it, all files of a folder count as images.

    Raises:
        OdcftError: `data` does not exist, holds no images, or cannot be read.
    """
    images = _find(data, ENDINGS if reader is None else ("",), progress or Progress(quiet=True))
    images.reader = reader
    return images


def _find(data: str | Path, endings: tuple[str, ...], progress: Progress) -> Images:
    """Find the images; those of a folder are the files with these endings."""
    if not os.fspath(data):
        raise OdcftError(f"DATA is empty. Give {WHAT}.")
    if is_url(os.fspath(data)):
        try:
            return _find_remote(str(data), endings, progress)
        except OSError as error:
            raise OdcftError(f"{data} cannot be read: {error.strerror or error}.") from None
    path = Path(data)
    try:
        path.lstat()
        if not path.exists():
            raise FileNotFoundError  # a dangling symlink
    except (FileNotFoundError, NotADirectoryError):
        if glob.has_magic(str(path)):
            return _find_pattern(str(path), progress)
        raise OdcftError(f"{path} does not exist. Give {WHAT}.") from None
    except (OSError, ValueError) as error:  # a NUL byte is a ValueError
        raise OdcftError(f"{path} cannot be read: {getattr(error, 'strerror', error)}.") from None
    if path.is_dir():
        return _find_in_folder(path, endings, progress)
    ending = path.suffix.lower()
    if path.is_file() and ending in LISTS:
        return _find_in_list(path, progress)
    if path.is_file() and ending in SHARDS:
        return find_in_shards(path, path.parent, [path.name], {}, progress)
    refuse_compressed([str(path)])
    raise OdcftError(f"{path} is neither a folder nor a list, nor shards. Give {WHAT}.")


def _find_pattern(pattern: str, progress: Progress) -> Images:
    found = sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise OdcftError(f"{pattern} does not exist, and matches nothing. Give {WHAT}.")
    root = _before_magic(pattern) or "."
    return find_in_shards(pattern, root, [os.path.relpath(path, root) for path in found], {}, progress)


def _before_magic(pattern: str) -> str:
    """The folder that all matches of a pattern are in."""
    return os.path.dirname(re.split(r"[*?\[]", pattern, maxsplit=1)[0])


def _find_in_folder(path: Path, endings: tuple[str, ...], progress: Progress) -> Images:
    dataset = find_dataset(path)
    if dataset is not None:
        return find_in_dataset(path, dataset, progress)

    def build() -> Index:
        with progress.waiting(f"Indexing    {path} …"):
            names, skipped, watched, stamps = folders.search(os.path.abspath(path), endings)
        return Index({"names": names.bytes_B, "ends": names.ends}, {"skipped": dict(skipped)}, watched, stamps)

    def use(index: Index) -> tuple[Names, dict[str, int]]:
        return names_of(index), checked_counts(index.about["skipped"])

    names, skipped = cached(("folder", os.path.abspath(path), *endings), build, use)
    if names:
        return Images(path, path, names, None, skipped)
    if any(skipped.get(ending) for ending in SHARDS):
        shards, skipped, *_ = folders.search(str(path), SHARDS)
        refuse_several_splits(path, shards)
        return find_in_shards(path, path, list(shards), dict(skipped), progress)
    refuse_compressed([os.path.join(path, name) for name in folders.search(str(path), COMPRESSED)[0]])
    raise no_images(path, skipped)


def _find_in_list(path: Path, progress: Progress) -> Images:
    def build() -> Index:
        with progress.waiting(f"Reading     {path} …"):
            stamps = stamps_of([os.path.abspath(path)])
            try:
                if path.stat().st_size > MAX_BYTES:
                    raise OdcftError(f"{path} has more than {MAX_BYTES:,} bytes: too many for a list. Divide it.")
                content = path.read_bytes()
            except OSError as error:
                raise OdcftError(f"{path} cannot be read: {error.strerror}.") from None
            found = read_list(content, str(path), lambda name: os.path.isfile(os.path.join(path.parent, name)))
        index = _index_of_list(*found)
        index.watched, index.stamps = Names([os.path.abspath(path)]), stamps
        return index

    def use(index: Index) -> Images:
        labels = names_of(index, "labels") if "labels" in index.arrays else None
        return Images(path, path.parent, names_of(index), labels, checked_counts(index.about["skipped"]))

    return cached(("list", os.path.abspath(path)), build, use)


def _index_of_list(names: list[str], labels: list[str] | None, skipped: dict[str, int]) -> Index:
    found = Names(names)
    arrays = {"names": found.bytes_B, "ends": found.ends}
    if labels is not None:
        found = Names(labels)
        arrays |= {"labels": found.bytes_B, "labels_ends": found.ends}
    return Index(arrays, {"skipped": skipped})


def _find_remote(url: str, endings: tuple[str, ...], progress: Progress) -> Images:
    """The images at a URL. Folders and lists are read anew each time: no server says whether one has changed."""
    ending = os.path.splitext(url)[1].lower()
    if glob.has_magic(url.split("://", 1)[1]):
        root = _before_magic(url)
        if not (found := remote.matches(url, root)):
            raise OdcftError(f"{url} matches nothing. Give {WHAT}.")
        return find_in_shards(url, root, found, {}, progress)
    if ending in SHARDS and not remote.is_folder(url):
        return find_in_shards(url, os.path.dirname(url), [os.path.basename(url)], {}, progress)
    if ending in LISTS and not remote.is_folder(url):
        root = os.path.dirname(url)
        names, labels, skipped = read_list(read_file(url), url, lambda name: file_size(os.path.join(root, name)) >= 0)
        if absolute := [name for name in names if os.path.isabs(name) or is_url(name)]:
            raise OdcftError(f"{url} lists {absolute[0]}, which is not relative to it. Make all paths relative.")
        return Images(url, root, Names(names), None if labels is None else Names(labels), skipped)
    refuse_compressed([url])
    if not remote.is_folder(url):
        raise OdcftError(f"{url} is neither a folder nor a list, nor shards. Give {WHAT}.")
    url = url.rstrip("/") if url.rstrip("/")[-1] != ":" else url  # not of file:///, which is the root
    with progress.waiting(f"Indexing    {url} …"):
        names, skipped = remote.search(url, endings)
    if not names and any(skipped[ending] for ending in SHARDS):
        names, skipped = remote.search(url, SHARDS)
        refuse_several_splits(url, names)
        return find_in_shards(url, url, names, dict(skipped), progress)
    if not names:
        raise no_images(url, skipped)
    return Images(url, url, Names(names), None, dict(skipped))
