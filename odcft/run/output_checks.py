"""Checks before anything is written: nothing is replaced that odcft did not write, and nothing without --overwrite."""

import os
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors import safe_open

from odcft.distributed import dist
from odcft.errors import OdcftError
from odcft.files import UNFINISHED, create_unfinished, new_folder, remove
from odcft.run.folder import FILES_BEFORE_FIRST_STEP, LOCK, MAY_BE_LINKS, RUN_FILES, STEP, Layout

MAX_ONNX_BYTES = 1 << 31  # of a file that holds its tensors itself: protobuf allows no more
KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link"}
SPECIAL = "special file"  # a device, pipe or socket


def has_no_progress(out: Path) -> bool:
    """Whether starting a RUN folder over would lose nothing: it has no state and no step yet."""
    metrics = out / "metrics.jsonl"
    has_steps = any((out / "checkpoints").glob(f"*{STEP}")) or (metrics.exists() and metrics.stat().st_size > 0)
    return names_in(out, RUN_FILES) <= FILES_BEFORE_FIRST_STEP and not has_steps


def refuse_non_empty(out: Path, ours: Layout, overwrite: bool) -> None:
    """Refuse an output folder that is not empty (without `overwrite`), holds foreign files, or cannot be written."""
    refuse_invalid_path(out)
    if out.is_symlink() and not out.exists():
        raise OdcftError(f"{out} is a broken link. Create the folder it points to, or choose another --out.")
    if out.exists() and not out.is_dir():
        raise OdcftError(f"{out} is a file. Choose a folder for the output.")
    if names_in(out, ours) and not overwrite:
        resume = "--resume to continue it, " if "checkpoints" in ours else ""
        raise OdcftError(f"{out} is not empty. Pass {resume}--overwrite to replace it, or choose another --out.")
    refuse_foreign_files(out, ours)
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise OdcftError(f"{out} cannot be written: {existing} is not a folder you may write to. Choose another --out.")
    dist.barrier()  # no rank writes before every rank has checked


def refuse_invalid_path(path: Path) -> None:
    """Refuse an output that cannot even be looked up: its name is too long, or a folder above it has no access."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise OdcftError(f"{path} cannot be written: {error.strerror}. Choose another place.") from None


def refuse_unwritable(path: Path) -> None:
    """Refuse a file that rank 0 cannot write, before hours of computing its content; all ranks call this together."""
    refused = why_unwritable(path) if dist.rank() == 0 else ""
    refused = dist.gather_dict({0: refused} if refused else {}).get(0, "")
    if refused:
        raise OdcftError(refused)


def why_unwritable(path: Path) -> str:
    """Why this process cannot write a file, as a sentence, or ""; the trial leaves nothing behind."""
    try:
        with new_folder(path.parent):
            create_unfinished(path).unlink()
    except OSError as error:
        in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
        why = "something else is in the place of its folder" if in_the_way else error.strerror
        return f"{path} cannot be written: {why}. Choose another place."
    return ""


def refuse_foreign_file(path: Path) -> None:
    """Refuse to replace a file that odcft did not write, or a link."""
    if path.is_symlink():
        raise OdcftError(f"{path} is a link. Give the path it points to, or choose another.")
    if path.exists() and not path.is_file():
        raise OdcftError(f"{path} is not a file, and odcft replaces nothing else. Choose another place.")
    if path.exists() and not written_by_odcft(path):
        raise OdcftError(f"{path} was not written by odcft, so --overwrite will not touch it. Choose another place.")


def written_by_odcft(path: Path) -> bool:
    """Whether a file's own metadata says that `odcft pretext` or `odcft export` wrote it."""
    try:
        with path.open("rb") as file:
            start = file.read(10)
        if start.startswith(b"PK"):
            from odcft.backbone.checkpoint_containers import load_torch

            tree = load_torch(path)
            return {"task", "arch", "epoch", "optimizer"} <= set(tree) or "odcft" in getattr(tree, "_metadata", {})
        if start[8:9] == b"{":
            with safe_open(path, "pt") as tensors:
                keys = set(tensors.metadata() or {})
        elif path.stat().st_size < MAX_ONNX_BYTES:
            import onnx

            keys = {entry.key for entry in onnx.load(path, load_external_data=False).metadata_props}
        else:
            return False
        return {"architecture", "input"} <= keys
    except Exception:  # each reader raises errors of its own for other formats
        return False


def refuse_foreign_files(out: Path, ours: Layout, resumed: bool = False) -> None:
    """Refuse a folder in which writing or removing odcft's files would touch anything else.

    Somebody else's folder may hold files of theirs, or links to other places under the names that odcft uses.

    Args:
        out: the folder, which need not exist; it may itself be a link to one.
        ours: what odcft writes into it.
        resumed: accept other files beside odcft's, because nothing will be removed.
    """
    for path, problem in _foreign(out, ours, out) if out.is_dir() else ():
        if problem:
            raise OdcftError(f"{path} {problem}, or choose another output.")
        if not resumed:
            raise OdcftError(
                f"{out} holds files odcft did not write ({path.relative_to(out)}), so --overwrite will not touch it. "
                "Choose another --out."
            )


def _foreign(folder: Path, ours: Layout, out: Path) -> Iterator[tuple[Path, str]]:
    """Everything in a folder that is not as odcft writes it: (path, what is wrong and how to fix it).

    The second is "" where the name is not one that odcft uses.
    """
    for path in sorted(folder.iterdir()):
        name, unfinished = _final_name(path.name)
        pattern = next((pattern for pattern in ours if fnmatchcase(name, pattern)), "")
        if not pattern and name:
            yield path, ""
            continue
        inner = ours[pattern] if pattern else {}
        try:
            kind = KINDS.get(stat.S_IFMT(path.lstat().st_mode), SPECIAL)
        except FileNotFoundError:  # gone since it was listed, like the lock of a run that ends right now
            continue
        if kind == "link" and pattern in MAY_BE_LINKS and not unfinished:
            if problem := _wrong_target(path, inner, out):
                yield path, problem
        elif kind == "link":
            yield path, "is a link, and odcft does not write through links. Replace it with what it points to"
        elif unfinished and kind != SPECIAL:
            continue  # left by a killed process; it is removed as a whole
        elif kind != (expected := "file" if inner is None else "folder"):
            yield path, f"is a {kind}, but odcft writes a {expected} of this name. Move it away"
        elif inner is not None:
            yield from _foreign(path, inner, out)


def _final_name(name: str) -> tuple[str, bool]:
    """The name that an unfinished file will get ("" for a folder of several), and whether it is unfinished."""
    if not (name.startswith(".") and name.endswith(UNFINISHED)):
        return name, False
    return name.removesuffix(UNFINISHED)[1:], True


def _wrong_target(link: Path, ours: Layout, out: Path) -> str:
    """Why odcft may not write to the target of a link, and how to fix it; "" if it may."""
    try:
        target = link.resolve()
        owner = target.stat().st_uid
    except (OSError, RuntimeError):  # it does not exist, or links form a loop (RuntimeError before Python 3.13)
        return "is a broken link. Create the folder it points to"
    if not target.is_dir():
        return f"is a link to {target}, which is not a folder. Remove the link"
    if owner not in (os.geteuid(), out.stat().st_uid):
        return f"is a link to {target}, which belongs to somebody else. Remove the link"
    if (target.parent / "run.json").exists():
        return f"is a link to {target}, which belongs to another RUN. Remove the link"
    for path, problem in _foreign(target, ours, out):
        return f"is a link to {target}, where {path.name} {problem or 'was not written by odcft'}. Remove the link"
    return ""


def names_in(out: Path, ours: Layout) -> set[str]:
    """The names in a folder, which need not exist; without odcft's lock and what a killed process left unfinished."""
    if not out.is_dir():
        return set()
    found = {path.name: _final_name(path.name) for path in out.iterdir() if path.name != LOCK or LOCK not in ours}
    return {name for name, (final, unfinished) in found.items() if not unfinished or (final and final not in ours)}


def clear_folder(out: Path, ours: Layout) -> None:
    """Create the folder, or remove what odcft wrote there before.

    Raises:
        OdcftError: something else is there by now; then nothing has been removed.
    """
    out.mkdir(parents=True, exist_ok=True)
    refuse_foreign_files(out, ours)
    _clear(out, ours)


def _clear(folder: Path, ours: Layout) -> None:
    for path in list(folder.iterdir()):
        if path.is_symlink():
            _clear(path, ours[path.name])  # empty the folder, but keep it and the link: they are the user's
        elif path.name != LOCK:  # held by this process
            remove(path)
