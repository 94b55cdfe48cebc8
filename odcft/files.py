"""Files that appear whole or not at all, checksums, and small files that anybody may have written."""

import csv
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from odcft.errors import OdcftError

LARGEST = 16 << 20  # bytes of JSON; timm's config.json of a network for 21,000 classes has 3 million


def read_text(path: Path) -> str:
    """The text of a small file that anybody may have written; what is no UTF-8 in it is replaced.

    Raises:
        OdcftError: it is not there, no regular file, or too large.
    """
    try:
        if not path.is_file():
            raise OdcftError(f"{path} is {'no file' if path.exists() else 'missing'}.")
        if path.stat().st_size > LARGEST:
            raise OdcftError(f"{path} has {path.stat().st_size:,} bytes, too many for a description.")
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise OdcftError(f"{path} cannot be read: {error.strerror}.") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file that anybody may have written.

    Raises:
        OdcftError: it is not there, no regular file, too large, or no JSON object.
    """
    try:
        about = json.loads(read_text(path))
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict):
        raise OdcftError(f"{path} is damaged: it is no JSON object.")
    return about


UNFINISHED = ".unfinished"  # being written: .NAME.unfinished a file, .unfinished what a folder will hold


# A file system's names are bytes: those that are no UTF-8 come out of Python, and into a table, as the same bytes.
NAMES: Any = {"encoding": "utf-8", "errors": "surrogateescape"}


def remove(path: Path) -> None:
    """Remove a file, a folder, or a link but not what it leads to; or nothing, where there is nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make a folder with those above it; what was made and is still empty at the end goes again."""
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with suppress(OSError):  # one that is not empty, and so all above it
            for place in new:
                place.rmdir()


def _write_table(path: Path, header: list[str], rows: Iterable[tuple]) -> None:
    with whole(path) as unfinished, unfinished.open("w", newline="", **NAMES) as file:
        table = csv.writer(file)
        table.writerow(header)
        table.writerows(rows)


def read_column(path: Path, column: str) -> list[str]:
    """One column of a .csv of ours.

    Raises:
        OdcftError: it is not there, or not as we write it.
    """
    try:
        if not path.is_file():
            raise OdcftError(f"{path} is {'no file' if path.exists() else 'missing'}.")
        with path.open(newline="", **NAMES) as file:
            return [row[column] for row in csv.DictReader(file)]
    except OSError as error:
        raise OdcftError(f"{path} cannot be read: {error.strerror}.") from None
    except (csv.Error, KeyError) as error:
        raise OdcftError(f"{path} is damaged ({error}), or not a table of odcft's with a column {column}.") from None


def write_whole(path: Path, text: str) -> None:
    """A text file that appears whole or not at all, and stays through a power failure."""
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A new file to write into, which takes its place once it is whole and on the disk, and goes on an error.

    It is made under a name of its own beside its place, whatever has that name is not written through, and it has the
    rights that the umask gives.

    Yields:
        Where to write.
    """
    unfinished = _new(path)
    try:
        yield unfinished
        sync(unfinished)
        unfinished.replace(path)
        sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def _new(path: Path) -> Path:
    """An empty file of ours under the name that `path` has until it is whole."""
    unfinished = path.with_name(f".{path.name}{UNFINISHED}")
    unfinished.unlink(missing_ok=True)
    os.close(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    return unfinished


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """A hidden folder to write files into, which take their places in `folder` once all of them are whole.

    It lies inside: what is beside `folder` may be another disk, or nobody's to write to.

    Args:
        folder: made, or these of its files replaced; gone again where it was made and nothing came of it.

    Yields:
        Where to write.
    """
    with made(folder):
        unfinished = folder / UNFINISHED
        remove(unfinished)
        unfinished.mkdir()
        try:
            yield unfinished
            for file in sorted(unfinished.iterdir()):
                sync(file)
                file.replace(folder / file.name)
            sync(folder)
        finally:
            remove(unfinished)


def save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """safetensors' own, but with the rights that the umask gives: it makes files for their owner alone.

    Raises:
        OSError: it cannot be written.
    """
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666))
    rights = stat.S_IMODE(path.stat().st_mode)
    try:
        safetensors.torch.save_file(tensors, path, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    path.chmod(rights)


def save_checkpoint(tree: Any, path: Path) -> None:
    """torch's own, for a file that is there.

    Raises:
        OSError: it cannot be written; torch hides it behind an error of its own.
    """
    try:
        with path.open("wb") as file:
            torch.save(tree, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def sync(path: Path) -> None:
    """Have a file, or what a folder lists, on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(ckpt: str) -> str:
    """Of a checkpoint's bytes; a name (timm:resnet18) stands for itself."""
    path = Path(ckpt)
    for inner in ("backbone/model.safetensors", "model.safetensors", "pytorch_model.bin"):
        if path.is_dir() and (path / inner).exists():
            path = path / inner
    return digest(path) if path.is_file() else ckpt


def digest(path: Path, from_disk: bool = False) -> str:
    """SHA-256 of a file, in hexadecimal.

    Args:
        path: the file.
        from_disk: forget what memory holds of it first, so that the disk has to show what it has.
    """
    with path.open("rb") as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        found = hashlib.sha256()
        while piece := file.read(1 << 22):
            found.update(piece)
    return found.hexdigest()
