"""The folders odcft writes: never over anything it did not write, never two runs in one, whole files only."""

import csv
import errno
import fcntl
import hashlib
import os
import re
import shutil
import socket
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from odcft import dist
from odcft.data import Images
from odcft.errors import OdcftError

# What odcft writes into its folders, and all that --overwrite may remove: None for a file, for a folder what is in it.
Layout = dict[str, Any]
LOCK = "lock"
BACKBONE_FILES: Layout = {"config.json": None, "model.safetensors": None, "README.md": None}
BACKBONES = ("backbone", *(f"backbone_{member}" for member in range(2, 10)))  # of codc's members, in their order
MEMORY_FILES: Layout = dict.fromkeys(
    ("memory.safetensors", "neck.safetensors", "memory.json", "images.csv", "quarantine.csv", LOCK)
)
STEP = "step-" + 9 * "[0-9]"
STATE_FILES: Layout = {"same.safetensors": None, "rank-*-of-*.safetensors": None, "state.json": None}
RUN_FILES: Layout = {
    **dict.fromkeys(("recipe.yaml", "run.json", "metrics.jsonl", "images.csv", "quarantine.csv", LOCK)),
    **dict.fromkeys(("clusters.parquet", "report.html")),
    **dict.fromkeys(BACKBONES, BACKBONE_FILES),
    "checkpoints": {STEP: STATE_FILES, f"damaged-{STEP}": STATE_FILES},
    "tensorboard": {"events.out.tfevents.*": None},
}
BEGUN = {"recipe.yaml", "run.json", "images.csv", "quarantine.csv", "checkpoints", "metrics.jsonl", "tensorboard"}
LINKED = ("checkpoints", "tensorboard")  # may be links to folders of the user's, on another disk
ONNX = 1 << 31  # bytes; one that holds its tensors is smaller
UNFINISHED = ".unfinished"  # being written: .NAME.unfinished a file, .unfinished what a folder will hold
KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link"}


# A file system's names are bytes: those that are no UTF-8 come out of Python, and into a table, as the same bytes.
NAMES: Any = {"encoding": "utf-8", "errors": "surrogateescape"}


# ---------------------------------------------------------------- what may be written to


def refuse_full(out: Path, ours: Layout, overwrite: bool) -> None:
    """Refuse an output that would be written over, or through which other places would be."""
    refuse_unreachable(out)
    if out.is_symlink() and not out.exists():
        raise OdcftError(f"{out} is a link that leads nowhere. Make the folder it leads to, or choose another --out.")
    if out.exists() and not out.is_dir():
        raise OdcftError(f"{out} is a file. Choose a folder for the output.")
    if contents(out, ours) and not overwrite:
        resume = "--resume to go on with it, " if "checkpoints" in ours else ""
        raise OdcftError(f"{out} is not empty. Pass {resume}--overwrite to replace it, or choose another --out.")
    refuse_strange(out, ours)
    standing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not (standing.is_dir() and os.access(standing, os.W_OK | os.X_OK)):
        raise OdcftError(f"{out} cannot be written: {standing} is not a folder you may write to. Choose another --out.")
    dist.barrier()  # every rank has looked before one writes


def refuse_unreachable(path: Path) -> None:
    """Refuse an output that may not even be looked at: its name is too long, or a folder above it is closed."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise OdcftError(f"{path} cannot be written: {error.strerror}. Choose another place.") from None


def refuse_unwritable(path: Path) -> None:
    """Refuse a file that cannot be written, before hours are spent on what goes into it; nothing stays of the trial."""
    refused = ""
    if dist.rank() == 0:
        try:
            with made(path.parent):
                _new(path).unlink()
        except OSError as error:
            in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
            why = "something else is where its folder would be" if in_the_way else error.strerror
            refused = f"{path} cannot be written: {why}. Choose another place."
    refused = dist.gather_dict({0: refused} if refused else {}).get(0, "")
    if refused:
        raise OdcftError(refused)


def refuse_file_of_others(path: Path) -> None:
    """Refuse to replace a file that odcft did not write, or a link."""
    if path.is_symlink():
        raise OdcftError(f"{path} is a link. Give the place that it leads to, or choose another.")
    if path.exists() and not path.is_file():
        raise OdcftError(f"{path} is no file, and odcft replaces nothing else. Choose another place.")
    if path.exists() and not written_by_odcft(path):
        raise OdcftError(f"{path} was not written by odcft, so --overwrite will not touch it. Choose another place.")


def written_by_odcft(path: Path) -> bool:
    """Whether a file is of `odcft pretext` or `odcft export`, as it says itself."""
    try:
        with path.open("rb") as file:
            start = file.read(10)
        if start.startswith(b"PK"):
            from odcft.checkpoint import load_torch

            tree = load_torch(path)
            return {"task", "arch", "epoch", "optimizer"} <= set(tree) or "odcft" in getattr(tree, "_metadata", {})
        if start[8:9] == b"{":
            with safe_open(path, "pt") as tensors:
                words = set(tensors.metadata() or {})
        elif path.stat().st_size < ONNX:
            import onnx

            words = {word.key for word in onnx.load(path, load_external_data=False).metadata_props}
        else:
            return False
        return {"architecture", "input"} <= words
    except Exception:  # each reader has its own kinds for a file that is not of its kind
        return False


def require_parquet() -> None:
    """Refuse to begin a run whose clusters.parquet could not be written when all its steps are done."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise OdcftError(f"clusters.parquet needs pyarrow ({error}): pip install pyarrow.") from None


def refuse_strange(out: Path, ours: Layout, resumed: bool = False) -> None:
    """Refuse a folder in which writing or removing what is ours would reach anything else.

    One that somebody else made may hold links that lead elsewhere under our names, or files of that person's.

    Args:
        out: the folder, if it is there; it may itself be a link to one.
        ours: what odcft writes into it.
        resumed: leave alone what is not ours beside it; nothing will be removed.
    """
    for path, trouble in _strange(out, ours, out) if out.is_dir() else ():
        if trouble:
            raise OdcftError(f"{path} {trouble}, or choose another output.")
        if not resumed:
            raise OdcftError(
                f"{out} holds files odcft did not write ({path.relative_to(out)}), so --overwrite will not touch it. "
                "Choose another --out."
            )


def _strange(folder: Path, ours: Layout, out: Path) -> Iterator[tuple[Path, str]]:
    """What is not as odcft makes it: where, and what is wrong and to be done; "" where it is none of ours."""
    for path in sorted(folder.iterdir()):
        name, unfinished = _finished(path.name)
        pattern = next((pattern for pattern in ours if fnmatchcase(name, pattern)), "")
        if not pattern and name:
            yield path, ""
            continue
        inner = ours[pattern] if pattern else {}
        kind = KINDS.get(stat.S_IFMT(path.lstat().st_mode), "device")
        if kind == "link" and pattern in LINKED and not unfinished:
            if trouble := _wrong_target(path, inner, out):
                yield path, trouble
        elif kind == "link":
            yield path, "is a link, and odcft writes through none. Put in its place what it leads to"
        elif unfinished and kind != "device":
            continue  # what a killed process left: removed whole
        elif kind != ("file" if inner is None else "folder"):
            yield path, f"is a {kind}, where odcft writes another kind. Move it away"
        elif inner is not None:
            yield from _strange(path, inner, out)


def _finished(name: str) -> tuple[str, bool]:
    """What something will be called once it is whole ("" what a folder will hold), and whether it still is not."""
    if not (name.startswith(".") and name.endswith(UNFINISHED)):
        return name, False
    return name.removesuffix(UNFINISHED)[1:], True


def _wrong_target(link: Path, ours: Layout, out: Path) -> str:
    """Why what a link leads to may not be written to, or ""."""
    try:
        target = link.resolve()
        owner = target.stat().st_uid
    except (OSError, RuntimeError):  # nowhere, or in circles (RuntimeError before Python 3.13)
        return "is a link that leads nowhere. Make the folder it leads to"
    if not target.is_dir():
        return f"is a link to {target}, which is no folder. Remove the link"
    if owner not in (os.geteuid(), out.stat().st_uid):
        return f"is a link to {target}, which belongs to somebody else. Remove the link"
    if (target.parent / "run.json").exists():
        return f"is a link to {target}, which belongs to another RUN. Remove the link"
    for path, trouble in _strange(target, ours, out):
        return f"is a link to {target}, where {path.name} {trouble or 'is not what odcft writes'}. Remove the link"
    return ""


def contents(out: Path, ours: Layout) -> set[str]:
    """The names in a folder that may not be there, but for our lock and what a killed process left half-written."""
    if not out.is_dir():
        return set()
    there = {path.name: _finished(path.name) for path in out.iterdir() if path.name != LOCK or LOCK not in ours}
    return {name for name, (whole, unfinished) in there.items() if not unfinished or (whole and whole not in ours)}


def clear(out: Path, ours: Layout) -> None:
    """Make the folder, and remove what odcft wrote there before.

    Raises:
        OdcftError: something else has come to be there; nothing has been removed by then.
    """
    out.mkdir(parents=True, exist_ok=True)
    refuse_strange(out, ours)
    _clear(out, ours)


def _clear(folder: Path, ours: Layout) -> None:
    for path in list(folder.iterdir()):
        if path.is_symlink():
            _clear(path, ours[path.name])  # the user's own folder on another disk stays
        elif path.name != LOCK:  # which this very process holds
            remove(path)


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


# ---------------------------------------------------------------- one run at a time


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
    file: BinaryIO | None = None
    refused, note = "", ""
    with ExitStack() as stack:
        if dist.rank() == 0:
            try:
                stack.enter_context(made(out))
                file, note = _lock(out / LOCK)
            except FileExistsError:
                refused = f"{out / LOCK} is not a lock that odcft wrote. Move it away, or choose another --out."
            except BlockingIOError:
                refused = (
                    f"Another run is writing to {out} ({_holder(out / LOCK)}). Wait for it, or choose another --out."
                )
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
                file.close()


def _lock(path: Path) -> tuple[BinaryIO, str]:
    """Make and lock the file that says who works here.

    Its last holder may remove it while we wait for the lock, and it may have a second name, under which somebody
    keeps it: what we write into is there under this name alone.

    Returns:
        The file, held as long as it is open, and what to say where the file system cannot lock.

    Raises:
        BlockingIOError: another process holds it.
        FileExistsError: what has its name is not ours.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        file = os.fdopen(descriptor, "r+b", buffering=0)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FileExistsError
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError from None
            return file, f"{path.parent} cannot be locked ({error.strerror}): let no other run write to it."
        found = os.fstat(descriptor)
        if not b"process ".startswith(file.read(8)):
            raise FileExistsError
        if found.st_nlink > 1:
            path.unlink()
        elif found.st_nlink and path.lstat().st_ino == found.st_ino:
            break
    file.seek(0)
    file.truncate()
    with suppress(OSError):  # a full disk
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    return file, ""


def _holder(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def only_begun(out: Path) -> bool:
    """Whether a RUN folder holds nothing yet that would be lost by beginning again: no state, no step."""
    metrics = out / "metrics.jsonl"
    stepped = any((out / "checkpoints").glob(f"*{STEP}")) or (metrics.exists() and metrics.stat().st_size > 0)
    return contents(out, RUN_FILES) <= BEGUN and not stepped


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
    _write_table(out / "images.csv", ["row", "path"], enumerate(images.names))
    if unreadable:
        _write_table(out / "quarantine.csv", ["path", "reason"], unreadable.items())


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
