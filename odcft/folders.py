"""The folders odcft writes: never over anything it did not write, never two runs in one, whole files only."""

import csv
import errno
import fcntl
import hashlib
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from odcft import dist
from odcft.data import Images
from odcft.errors import OdcftError

# What odcft writes into its folders, and all that --overwrite may remove.
MEMORY_FILES = ("memory.safetensors", "neck.safetensors", "memory.json", "images.csv", "quarantine.csv")
BACKBONES = ("backbone", *(f"backbone_{member}" for member in range(2, 10)))  # of codc's members, in their order
RUN_FILES = (
    *("recipe.yaml", "run.json", "metrics.jsonl", "checkpoints", *BACKBONES, "clusters.parquet", "tensorboard"),
    *("report.html", "images.csv", "quarantine.csv"),
)
BEGUN = {"recipe.yaml", "run.json", "images.csv", "quarantine.csv", "checkpoints", "metrics.jsonl", "tensorboard"}
LOCK = "lock"


# A file system's names are bytes: those that are no UTF-8 come out of Python, and into a table, as the same bytes.
NAMES: Any = {"encoding": "utf-8", "errors": "surrogateescape"}


def refuse_full(out: Path, ours: tuple[str, ...], overwrite: bool) -> None:
    """Refuse an output that would be written over."""
    if out.exists() and not out.is_dir():
        raise OdcftError(f"{out} is a file. Choose a folder for the output.")
    there = contents(out)
    if there and not overwrite:
        resume = "--resume to go on with it, " if "checkpoints" in ours else ""
        raise OdcftError(f"{out} is not empty. Pass {resume}--overwrite to replace it, or choose another --out.")
    foreign = sorted(there - set(ours))
    if foreign:
        raise OdcftError(
            f"{out} holds files odcft did not write ({foreign[0]}), so --overwrite will not touch it. "
            "Choose another --out."
        )
    standing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not (standing.is_dir() and os.access(standing, os.W_OK)):
        raise OdcftError(f"{out} cannot be written: {standing} is not a folder you may write to. Choose another --out.")
    dist.barrier()  # every rank has looked before one writes


def contents(out: Path) -> set[str]:
    """The names in a folder that may not be there, but for our lock and what a killed process left half-written."""
    if not out.is_dir():
        return set()
    return {path.name for path in out.iterdir() if path.name != LOCK and not path.name.endswith(".unfinished")}


def clear(out: Path, ours: tuple[str, ...]) -> None:
    """Make the folder, and remove what odcft wrote there before."""
    out.mkdir(parents=True, exist_ok=True)
    for path in [*(out / name for name in ours), *out.glob(".*.unfinished")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def locked(out: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Keep every other run out of a folder for as long as this one works in it; rank 0 does it for all.

    The lock is the kernel's, on the file `lock`: it ends with the process, however that ends. It is of the POSIX kind,
    which forked data workers do not inherit (they outlive a killed run by seconds) and NFS servers keep too.

    Args:
        out: made, where there is none; and removed, where it is still empty at the end.
        say: told where a file system cannot lock.

    Raises:
        OdcftError: another run works there, or the folder cannot be written.
    """
    file: TextIO | None = None
    new, refused, note = not out.exists(), "", ""
    if dist.rank() == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            file = (out / LOCK).open("a+", encoding="utf-8")
            file, note = _lock(file, out / LOCK)
        except BlockingIOError:
            refused = f"Another run is writing to {out} ({_holder(out / LOCK)}). Wait for it, or choose another --out."
        except OSError as error:
            refused = f"{out} cannot be written: {error.strerror}. Choose another --out."
    refused = dist.gather_dict({0: refused} if refused else {}).get(0, "")
    if refused:
        raise OdcftError(refused)
    if note:
        say(f"Note        {note}")
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):
                (out / LOCK).unlink(missing_ok=True)  # while it is held
                if new and not any(out.iterdir()):
                    out.rmdir()
            file.close()


def _lock(file: TextIO, path: Path) -> tuple[TextIO, str]:
    """Lock an open file that may have been removed by its last holder meanwhile; say who holds it."""
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError from None
            return file, f"{path.parent} cannot be locked ({error.strerror}): let no other run write to it."
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            break
        file = path.open("a+", encoding="utf-8")
    file.truncate(0)
    with suppress(OSError):  # a full disk
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    return file, ""


def _holder(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def only_begun(out: Path) -> bool:
    """Whether a RUN folder holds nothing yet that would be lost by beginning again: no state, no step."""
    metrics = out / "metrics.jsonl"
    stepped = any((out / "checkpoints").glob("*step-?????????")) or (metrics.exists() and metrics.stat().st_size > 0)
    return contents(out) <= BEGUN and not stepped


def about(ckpts: list[str], archs: list[str], data: str, images: Images) -> dict[str, Any]:
    """Where a folder came from, by which it is recognised again: of one checkpoint, or lists of several."""
    several = {"checkpoint": ckpts, "sha256": [sha256(ckpt) for ckpt in ckpts], "arch": archs}
    return {
        **(several if len(ckpts) > 1 else {name: values[0] for name, values in several.items()}),
        "data": str(data),
        "images": len(images),
    }


def sample(images: Images, count: int = 64) -> dict[str, str]:
    """Checksums of a few images spread over the set, by which changed contents are noticed: name to SHA-256."""
    names = images.names[:: max(1, len(images) // count)]
    return {name: digest(images.root / name) for name in names if (images.root / name).is_file()}


def write_image_lists(images: Images, unreadable: dict[str, str], out: Path) -> None:
    """images.csv, and quarantine.csv where an image could not be read (name: reason); names byte by byte."""
    with (out / "images.csv").open("w", newline="", **NAMES) as file:
        table = csv.writer(file)
        table.writerow(["row", "path"])
        table.writerows(enumerate(images.names))
    sync(out / "images.csv")
    if unreadable:
        with (out / "quarantine.csv").open("w", newline="", **NAMES) as file:
            table = csv.writer(file)
            table.writerow(["path", "reason"])
            table.writerows(unreadable.items())
        sync(out / "quarantine.csv")


def read_column(path: Path, column: str) -> list[str]:
    """One column of a .csv of ours."""
    with path.open(newline="", **NAMES) as file:
        return [row[column] for row in csv.DictReader(file)]


def write_whole(path: Path, text: str) -> None:
    """A text file that appears whole or not at all, and stays through a power failure."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    sync(path.parent)


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
