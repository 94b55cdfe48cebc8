"""Thumbnails that do not fit into a report: files in a folder beside it.

Shapes: L images that the page lists.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from odcft.data.thumbnails import make_thumbnails
from odcft.errors import OdcftError
from odcft.files import UNFINISHED, atomic_folder, remove
from odcft.plan import cores_of_rank
from odcft.progress import Progress
from odcft.reports.page import Page, is_report
from odcft.run.folder import PICTURE_FILES
from odcft.run.output_checks import clear_folder, refuse_foreign_files

if TYPE_CHECKING:
    from odcft.reports.run_report import Pictures

SIDE = 160  # pixels
PER_FOLDER = 1000  # images


def picture_folder(page: Path) -> Path:
    """The folder beside a page: report.html has report_pictures, report.htm report_htm_pictures."""
    return page.with_name(f"{page.name.removesuffix('.html').replace('.', '_')}_pictures")


def refuse_picture_folder(page: Path) -> None:
    """Refuse the folder if it is a link, or holds something and is not that of an earlier report.

    Raises:
        OdcftError: says which.
    """
    folder = picture_folder(page)
    if folder.is_symlink():
        raise OdcftError(f"{folder}, which the pictures go to, is a link. Remove it, or choose another --out.")
    if (
        folder.exists()
        and not (is_report(page) and folder.is_dir())
        and not (folder.is_dir() and not any(folder.iterdir()))
    ):
        raise OdcftError(f"{folder}, which the pictures go to, already exists. Remove it, or choose another --out.")
    refuse_foreign_files(folder, PICTURE_FILES)


def _unfinished(page: Path) -> Path:
    """Where pictures wait until their page has been written."""
    folder = picture_folder(page)
    return folder.with_name(f".{folder.name}{UNFINISHED}")


@contextmanager
def pictures_of(page: Path) -> Iterator[None]:
    """On leaving, put the pictures that `write_pictures` wrote in the place of earlier ones; on an error, discard them.

    Raises:
        OdcftError: something else is in their place by now.
    """
    folder, new = picture_folder(page), _unfinished(page)
    with suppress(OSError):
        remove(new)  # left by a process that was killed
    try:
        yield
        if new.is_dir():
            _put(new, folder)
    finally:
        with suppress(OSError):
            remove(new)


def _put(new: Path, folder: Path) -> None:
    try:
        clear_folder(folder, PICTURE_FILES)
        folder.rmdir()
        new.rename(folder)
    except OSError as error:
        raise OdcftError(f"{folder} cannot be written: {error.strerror or error}. Choose another --out.") from None


def write_pictures(
    page: Page, pictures: "Pictures", listed: np.ndarray, place: Path, progress: Progress
) -> dict[str, str]:
    """Write thumbnails of the listed images that have none in the page, inside `pictures_of`.

    They wait in a hidden folder, so that an earlier page keeps its pictures until it is replaced.

    Args:
        page: gets the names of the files.
        pictures: where the images are.
        listed: rows of the images that the page lists (L,).
        place: where the page will be.
        progress: where to report.

    Returns:
        Name to reason for those that cannot be read.

    Raises:
        OdcftError: the folder cannot be written.
    """
    assert pictures.images is not None
    folder, ending = _unfinished(place), page.media.rpartition("/")[2]
    index_L = pictures.index_N[listed]
    rest = [i for i in range(len(listed)) if index_L[i] >= 0 and not (i < len(page.thumbnails) and page.thumbnails[i])]
    files = [""] * len(listed)
    unreadable: dict[str, str] = {}
    try:
        remove(folder)
        folder.mkdir(parents=True)
        with progress.phase("Pictures", len(rest)) as advance:
            for number, start in enumerate(range(0, len(rest), PER_FOLDER)):
                part = rest[start : start + PER_FOLDER]
                made, bad = make_thumbnails(
                    pictures.images,
                    index_L[part],
                    pictures.view,
                    side=SIDE,
                    most_bytes=float("inf"),
                    threads=cores_of_rank(),
                    advance=advance,
                )
                unreadable |= {pictures.images.names[index]: why for index, why in bad.items()}
                with atomic_folder(folder / f"{number:05d}") as unfinished:
                    for i in part:
                        if (content := made.get(int(index_L[i]))) is not None:
                            files[i] = f"{number:05d}/{i:08d}.{ending}"
                            (unfinished / f"{i:08d}.{ending}").write_bytes(content)
    except OSError as error:
        raise OdcftError(f"{folder} cannot be written: {error.strerror or error}. Choose another --out.") from None
    page.folder = picture_folder(place).name
    page.data["images"]["file"] = files
    return unreadable
