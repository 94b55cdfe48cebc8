"""Writing files completely or not at all, checksums, and reading small files from untrusted sources."""

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

MAX_JSON_BYTES = 16 << 20  # bytes of JSON; timm's config.json of a network with 21,000 classes has 3 million
UNFINISHED = ".unfinished"  # while it is written, a file is called .NAME.unfinished; .unfinished holds a folder's files

# File names are bytes on disk. Python represents those that are not UTF-8 by surrogates; this writes the same bytes.
PATH_ENCODING: Any = {"encoding": "utf-8", "errors": "surrogateescape"}


def read_text(path: Path) -> str:
    """The text of a small file from an untrusted source; bytes that are not UTF-8 are replaced.

    Raises:
        OdcftError: it does not exist, is not a regular file, cannot be read, or is too large.
    """
    try:
        if not path.is_file():
            raise OdcftError(f"{path} is {'not a file' if path.exists() else 'missing'}.")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise OdcftError(
                f"{path} has {path.stat().st_size:,} bytes, which is too large for a description "
                f"(at most {MAX_JSON_BYTES:,})."
            )
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise OdcftError(f"{path} cannot be read: {error.strerror}.") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file from an untrusted source.

    Raises:
        OdcftError: `read_text` cannot read it, or it is not a JSON object.
    """
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise OdcftError(f"{path} is damaged: it is not a JSON object.")
    return content


def remove(path: Path) -> None:
    """Remove a file, a folder, or a link (not its target), if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Create a folder and its parents; on leaving, remove those created here that are still empty."""
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with suppress(OSError):  # raised by the first that is not empty; its parents are not empty either
            for place in new:
                place.rmdir()


def write_table(path: Path, header: list[str], rows: Iterable[tuple]) -> None:
    """Write a .csv file, completely or not at all."""
    with atomic_file(path) as unfinished, unfinished.open("w", newline="", **PATH_ENCODING) as file:
        table = csv.writer(file)
        table.writerow(header)
        table.writerows(rows)


def read_column(path: Path, column: str) -> list[str]:
    """One column of a .csv file that odcft wrote, as a list; for the errors see `iterate_column`."""
    return list(iterate_column(path, column))


def iterate_column(path: Path, column: str) -> Iterator[str]:
    """One column of a .csv file that odcft wrote, a cell at a time.

    Raises:
        OdcftError: it does not exist, cannot be read, or is not a table with this column.
    """
    try:
        if not path.is_file():
            raise OdcftError(f"{path} is {'not a file' if path.exists() else 'missing'}.")
        with path.open(newline="", **PATH_ENCODING) as file:
            for row in csv.DictReader(file):
                yield row[column] or ""  # None if the line is too short
    except OSError as error:
        raise OdcftError(f"{path} cannot be read: {error.strerror}.") from None
    except (csv.Error, KeyError) as error:
        raise OdcftError(f"{path} is damaged ({error}), or is not an odcft table with a column {column}.") from None


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text file, completely or not at all; it survives a power failure."""
    with atomic_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Write a file completely or not at all: under a temporary name, renamed to `path` once it is on the disk.

    The temporary file is in the same folder and has the permissions that the umask gives. Whatever already has its
    name is replaced, never written through. On an error it is removed, and `path` stays as it was.

    Yields:
        The temporary path to write to.
    """
    unfinished = create_unfinished(path)
    try:
        yield unfinished
        fsync(unfinished)
        unfinished.replace(path)
        fsync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def create_unfinished(path: Path) -> Path:
    """Create the empty temporary file that will become `path`; return where it is."""
    unfinished = path.with_name(f".{path.name}{UNFINISHED}")
    unfinished.unlink(missing_ok=True)
    os.close(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    return unfinished


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Write several files of a folder: into a hidden folder, moved to their places once all of them are complete.

    The hidden folder is inside `folder`, because its parent may be on another disk or not be writable.

    Args:
        folder: created if it does not exist, and removed again on an error; files that are not rewritten stay.

    Yields:
        The hidden folder to write into.
    """
    with new_folder(folder):
        unfinished = folder / UNFINISHED
        remove(unfinished)
        unfinished.mkdir()
        try:
            yield unfinished
            for file in sorted(unfinished.iterdir()):
                fsync(file)
                file.replace(folder / file.name)
            fsync(folder)
        finally:
            remove(unfinished)


def save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write safetensors, with the permissions that the umask gives: safetensors itself lets only the owner read.

    Raises:
        OSError: it cannot be written; safetensors raises an error of its own.
    """
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666))
    permissions = stat.S_IMODE(path.stat().st_mode)
    try:
        safetensors.torch.save_file(tensors, path, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    path.chmod(permissions)


def save_checkpoint(tree: Any, path: Path) -> None:
    """Write anything that torch can save.

    Raises:
        OSError: it cannot be written; torch raises an error of its own.
    """
    try:
        with path.open("wb") as file:
            torch.save(tree, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def fsync(path: Path) -> None:
    """Wait until a file, or the listing of a folder, is on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoint_sha256(ckpt: str) -> str:
    """The checksum of a checkpoint's bytes; for a name (timm:resnet18), the name itself."""
    path = Path(ckpt)
    for inner in ("backbone/model.safetensors", "model.safetensors", "pytorch_model.bin"):
        if path.is_dir() and (path / inner).exists():
            path = path / inner
    return file_sha256(path) if path.is_file() else ckpt


def file_sha256(path: Path, from_disk: bool = False) -> str:
    """SHA-256 of a file, in hexadecimal.

    Args:
        path: the file.
        from_disk: drop the file from the page cache first, so that it is read back from the disk.
    """
    with path.open("rb") as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        found = hashlib.sha256()
        while piece := file.read(1 << 22):
            found.update(piece)
    return found.hexdigest()
