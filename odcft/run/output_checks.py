"""What an output may replace: nothing that odcft did not write, and nothing unasked."""

import os
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors import safe_open

from odcft.distributed import dist
from odcft.errors import OdcftError
from odcft.files import UNFINISHED, _new, made, remove
from odcft.run.folder import BEGUN, LINKED, LOCK, RUN_FILES, STEP, Layout


def only_begun(out: Path) -> bool:
    """Whether a RUN folder holds nothing yet that would be lost by beginning again: no state, no step."""
    metrics = out / "metrics.jsonl"
    stepped = any((out / "checkpoints").glob(f"*{STEP}")) or (metrics.exists() and metrics.stat().st_size > 0)
    return contents(out, RUN_FILES) <= BEGUN and not stepped


ONNX = 1 << 31  # bytes; one that holds its tensors is smaller
KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link"}


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
            from odcft.backbone.checkpoint_files import load_torch

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
