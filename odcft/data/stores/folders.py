"""Which files a folder holds: searched recursively, in one order on every machine."""

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from odcft.data.image_files import skipped_ending, special_kind
from odcft.data.index_cache import THREADS, stamp_of
from odcft.data.names import Names

Stamp = tuple[int, int, int, int, int]


@dataclass
class Listing:
    """What one folder holds.

    Attributes:
        stamp: of the folder, taken before it was read; zeros if it cannot be opened.
        files: the names of the wanted files, sorted, joined by NUL (which no name has).
        folders: the names of its folders, without those that symlinks lead to.
        links: the names of symlinks to folders.
        broken: the names of symlinks that lead nowhere (yet).
        skipped: everything else, as an extension or a phrase, to how often.
    """

    stamp: Stamp = (0, 0, 0, 0, 0)
    files: str = ""
    folders: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def search(top: str, endings: tuple[str, ...]) -> tuple[Names, Counter[str], Names, np.ndarray]:
    """Search a folder for files with these endings.

    A folder that can be reached in several ways through symlinks is read once, under its real name if that is inside
    `top`. Files and folders whose names begin with a dot are left out.

    Returns:
        The names of the files, relative to `top` and sorted; what else there is, counted; the folders that were read,
        and their stamps.
    """
    listings: dict[str, Listing] = {}
    skipped: Counter[str] = Counter()
    watched: dict[str, Stamp] = {}
    seen: set[tuple[int, int]] = set()
    folders, links = [""], list[str]()
    with ThreadPoolExecutor(THREADS) as pool:
        while folders or links:
            links.sort()  # symlinks come after all real folders, so that they cannot change the names of images
            batch = sorted(folders) if folders else [links.pop(0)]
            folders = []
            for folder, listing in zip(batch, pool.map(lambda name: _list(top, name, endings), batch), strict=True):
                watched[folder] = listing.stamp
                if not listing.stamp[1]:
                    skipped["folder that cannot be opened"] += 1
                elif listing.stamp[:2] in seen:
                    skipped["folder already read"] += 1
                else:
                    seen.add(listing.stamp[:2])
                    listings[folder] = listing
                    skipped += listing.skipped
                    folders += [os.path.join(folder, name) for name in listing.folders]
                    links += [os.path.join(folder, name) for name in listing.links]
                    watched |= dict.fromkeys((os.path.join(folder, name) for name in listing.broken), (0, 0, 0, 0, 0))
    stamps = np.array(list(watched.values()), np.int64).reshape(-1, 5)
    return Names(_in_order(listings)), skipped, Names(os.path.join(top, name) for name in watched), stamps


def _in_order(listings: dict[str, Listing]) -> Iterator[str]:
    """All names, sorted as whole paths: a folder stands among its siblings as its name and a slash."""
    if "" not in listings:
        return
    open_folders = [("", _entries("", listings))]
    while open_folders:
        prefix, entries = open_folders[-1]
        for name in entries:
            if name.endswith("/"):
                open_folders.append((prefix + name, _entries(prefix + name, listings)))
                break
            yield prefix + name
        else:
            open_folders.pop()


def _entries(prefix: str, listings: dict[str, Listing]) -> Iterator[str]:
    """The files of a folder and, with a slash, the folders in it that were read."""
    listing = listings[prefix.rstrip("/")]
    files = listing.files.split("\0") if listing.files else []
    inner = [f"{name}/" for name in listing.folders + listing.links if prefix + name in listings]
    return iter(sorted([*files, *inner]) if inner else files)


def _list(top: str, folder: str, endings: tuple[str, ...]) -> Listing:
    path, files, found = os.path.join(top, folder), [], Listing()
    try:
        stamp = stamp_of(os.stat(path))
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                if name[0] != "." and name.lower().endswith(endings) and entry.is_file(follow_symlinks=False):
                    files.append(name)
                else:
                    _sort_out(entry, endings, files, found)
    except OSError:
        return Listing()
    found.stamp, found.files = stamp, "\0".join(sorted(files))
    return found


def _sort_out(entry: os.DirEntry, endings: tuple[str, ...], files: list[str], found: Listing) -> None:
    """Put an entry that is not a plain image where it belongs: into `files` or into `found`."""
    name, kind, wanted = entry.name, _kind(entry), entry.name.lower().endswith(endings)
    if name.startswith("."):
        if kind == "folder" or wanted:
            found.skipped["hidden folder" if kind == "folder" else "hidden image"] += 1
        return
    if kind == "folder":
        (found.links if entry.is_symlink() else found.folders).append(name)
        return
    if kind == "nothing":
        found.broken.append(name)
    if kind not in ("file", "nothing"):
        found.skipped[kind] += 1
    elif wanted:
        files.append(name)
    else:
        found.skipped[skipped_ending(name)] += 1


def _kind(entry: os.DirEntry) -> str:
    """Return "folder", "file", "nothing" (a dangling symlink, unreadable), or what `special_kind` says."""
    try:
        if entry.is_dir():
            return "folder"
        return "file" if entry.is_file() else special_kind(entry.stat().st_mode)
    except OSError:
        return "nothing"
