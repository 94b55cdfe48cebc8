"""A folder for each cluster, with a link to each of its images (or a copy of it), the nearest to the centroid first.

    DIR/images.csv                         folder, file, path, kind
    DIR/cluster_0012/00001_IMG_4711.jpg    link to the image

A file is named by its rank in the cluster and the last part of the image's path, so that two images of one name do not
meet, and no name begins with a dash or leaves the folder.
"""

import csv
import errno
import io
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from odcft.errors import OdcftError
from odcft.files import PATH_ENCODING, UNFINISHED, new_folder, remove, write_table
from odcft.reports.run_clusters import RunClusters, RunImages
from odcft.run import output_checks
from odcft.text import count_of

KINDS = ("absolute", "relative", "copy")
LIST, HEADER = "images.csv", ["folder", "file", "path", "kind"]
OWN_FOLDER, OWN_FILE = re.compile(r"cluster_\d+"), re.compile(r"\d{5,}_")  # names that are given here
MAX_NAME = 255  # bytes of a file name on all usual file systems
# What Windows and its file systems do not allow in names, and control characters.
_UNSAFE = re.compile('[\x00-\x1f\x7f"*/:<>?\\\\|\u2028\u2029\u202a-\u202e\u2066-\u2069]')
ENDINGS = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}  # of formats whose name is not their ending
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # what file systems without links answer


def file_name(rank: int, path: str, digits: int = 5, ending: str = "") -> str:
    """The name of an image in the folder of its cluster.

    Args:
        rank: in the cluster, from 1.
        path: of the image; its last part is kept, cut to the length that file systems allow, with its ending.
        digits: that all ranks are written with.
        ending: for an image whose path has none.
    """
    base = _UNSAFE.sub("_", path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1])
    stem, own = os.path.splitext(base)
    if not own or len(os.fsencode(own)) > 16:
        stem, own = base, ending
    prefix = f"{rank:0{digits}d}_"
    room = MAX_NAME - len(prefix) - len(os.fsencode(own))
    # A character of several bytes that is cut in two goes away; bytes that are not UTF-8 stay.
    while len(os.fsencode(stem)) > room:
        stem = stem[: max(1, len(stem) - max(1, (len(os.fsencode(stem)) - room) // 4))]
    return f"{prefix}{stem}{own}".rstrip(". ")


def folder_name(cluster: int, K: int) -> str:
    """The name of the folder, and of the sheet, of a cluster: all with equally many digits."""
    return f"cluster_{cluster:0{max(4, len(str(K - 1)))}d}"


def refuse_folder(out: Path, overwrite: bool) -> None:
    """Refuse a folder that holds anything (without `overwrite`), or anything but what was written here before.

    Raises:
        OdcftError: names the first file in the way. Nothing has been removed.
    """
    output_checks.refuse_invalid_path(out)
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OdcftError(f"{out} is {'a link' if out.is_symlink() else 'a file'}. Choose a folder for the output.")
    output_checks.refuse_unwritable(out / LIST)
    there = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if there and not overwrite:
        raise OdcftError(f"{out} is not empty. Pass --overwrite to replace it, or choose another folder.")
    ours = _listed(out / LIST) if there else {}
    for path in (path for name in there for path in _inside(out / name)):
        place = os.path.relpath(path, out)
        mode = path.lstat().st_mode
        kind = "link" if stat.S_ISLNK(mode) else "copy" if stat.S_ISREG(mode) else "other"
        if place != LIST and ours.get(place) != kind:
            raise OdcftError(
                f"{out} holds files odcft did not write ({place}), so --overwrite will not touch it. "
                "Choose another folder."
            )


def _inside(path: Path) -> list[Path]:
    """The files, links and empty folders below a path, without following links.

    What a killed process left unfinished is ours, and so is the folder of a cluster whose links were moved away.
    """
    if path.name == UNFINISHED or path.is_symlink() or not path.is_dir():
        return [] if path.name == UNFINISHED else [path]
    children = sorted(path.iterdir())
    if not children:
        return [] if re.fullmatch(r"cluster_\d+", path.name) else [path]
    return [inner for child in children for inner in _inside(child)]


def _listed(path: Path) -> dict[str, str]:
    """What an earlier images.csv lists, of files with names that are given here: place to "link" or "copy"."""
    try:
        if path.is_symlink() or not path.is_file():
            return {}
        with path.open(newline="", **PATH_ENCODING) as file:
            rows = csv.reader(file)
            if next(rows, []) != HEADER:
                return {}
            found = (row for row in rows if len(row) == len(HEADER) and OWN_FOLDER.fullmatch(row[0]))
            return {os.path.join(row[0], row[1]): row[3] for row in found if OWN_FILE.match(row[1])}
    except (OSError, csv.Error):
        return {}


def write_folders(
    clusters: RunClusters, found: RunImages, out: Path, kind: str, advance: Callable[[int], object]
) -> dict[str, int]:
    """Write the folders; call `refuse_folder` first.

    Args:
        clusters: of the RUN.
        found: its images.
        out: the folder to write into; it is filled only when everything has been written.
        kind: one of KINDS: links to absolute or relative paths, or copies. Images in shards can only be copied.
        advance: called with the number of images done, now and then.

    Returns:
        folders, images, unreadable (could not be copied).

    Raises:
        OdcftError: it cannot be written.
    """
    try:
        with new_folder(out):
            unfinished = out / UNFINISHED
            remove(unfinished)
            unfinished.mkdir()
            try:
                rows, unreadable = _fill(clusters, found, out, unfinished, kind, advance)
                for old in [path for path in out.iterdir() if path.name != UNFINISHED]:
                    remove(old)
                for new in sorted(unfinished.iterdir()):
                    new.rename(out / new.name)
                write_table(out / LIST, HEADER, rows)
            finally:
                remove(unfinished)
    except OSError as error:
        if error.errno in NO_LINKS and kind != "copy":
            raise OdcftError(
                f"{out} is on a file system without links ({error.strerror}). Pass --links copy."
            ) from None
        raise OdcftError(f"{out} cannot be written: {error.strerror}. Make room, or choose another folder.") from None
    return {"folders": len({row[0] for row in rows}), "images": len(rows), "unreadable": unreadable}


def _fill(
    clusters: RunClusters, found: RunImages, out: Path, unfinished: Path, kind: str, advance: Callable[[int], object]
) -> tuple[list[tuple[str, str, str, str]], int]:
    """Write all folders into `unfinished`, from where they move to `out`; return the rows of images.csv."""
    rows, unreadable, digits = [], 0, max(5, len(str(int(clusters.size_K.max()))))
    for cluster, members in clusters.by_distance():
        folder = folder_name(cluster, clusters.K)
        present = [row for row in members.tolist() if found.where_N[row] >= 0]
        if present:
            (unfinished / folder).mkdir()
        for rank, row in enumerate(present, 1):
            index, path = int(found.where_N[row]), clusters.names[row]
            if kind == "copy":
                content = _read(found, index)
                if content is None:
                    unreadable += 1
                    continue
                name = file_name(rank, path, digits, _ending(content))
                with (unfinished / folder / name).open("xb") as file:
                    file.write(content)
            else:
                name = file_name(rank, path, digits)
                target = os.path.abspath(found.images.path(index))
                if kind == "relative":
                    target = os.path.relpath(os.path.realpath(target), os.path.realpath(out / folder))
                os.symlink(target, unfinished / folder / name)
            rows.append((folder, name, path, "copy" if kind == "copy" else "link"))
        advance(len(members))
    return rows, unreadable


def _read(found: RunImages, index: int) -> bytes | None:
    try:
        return found.images.read(index)
    except (OSError, OdcftError):
        return None


def _ending(content: bytes) -> str:
    """The ending for an image of this content, by its first bytes; "" if it is none that Pillow knows."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return ENDINGS.get(str(image.format), f".{str(image.format).lower()}")
    except Exception:  # of many types
        return ""


def refuse_too_large(found: RunImages, out: Path) -> str:
    """Refuse to copy more than the disk can hold; return how much it is, as a phrase, or "" if that is not known."""
    sizes = found.images.sizes()
    if sizes is None:
        return ""
    wanted = sizes[found.where_N[found.where_N >= 0]]
    total = int(wanted[wanted > 0].sum())
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if total > free:
        raise OdcftError(
            f"Copies of {count_of(len(wanted), 'image')} take {total / 1e9:.1f} GB, and {existing} has "
            f"{free / 1e9:.1f} GB left. Choose a folder on another disk, or links."
        )
    return f"{total / 1e6:,.1f} MB"
