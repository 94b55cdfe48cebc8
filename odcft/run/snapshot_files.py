"""Snapshots: the state of a run on disk, enough to resume as if it had never stopped. Safetensors and JSON only.

    RUN/checkpoints/step-000001200/
        same.safetensors          what is the same on every rank; rank 0 writes it
        rank-0-of-2.safetensors   what one rank alone has; every rank writes its own, nothing is gathered
        state.json                step, recipe, versions, SHA-256 of the files and of itself

The position of a row in the samples memory determines which image it belongs to (distributed/ownership.py), so a run
can resume on another number of ranks. Random numbers depend only on the seed and the step (seeds.py), so no generator
is saved.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from odcft.distributed import dist, ownership
from odcft.errors import OdcftError
from odcft.files import file_sha256, fsync, read_json, remove, save_file, write_text_atomically
from odcft.run.folder import STEP
from odcft.state import Snapshot, under

KEPT = 2  # newest states that stay on disk
ROWS_AT_A_TIME = 65536  # read from the file of another rank


def save(run: Path, snapshot: Snapshot) -> str:
    """Write `checkpoints/step-N`, completely or not at all; after reading it back, remove all older states but one.

    Args:
        run: the RUN folder.
        snapshot: its `about` has `step`, the number of steps done, and `images`, N.

    Returns:
        Why it could not be written, or "", the same on every rank. If it could not, earlier states are kept.
    """
    ranks = dist.world_size()
    folder = run / "checkpoints" / f"step-{snapshot.about['step']:09d}"
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    sums: dict[str, str] = {}

    def begin() -> None:
        if dist.rank() == 0:
            for leftover in folder.parent.glob(f".{STEP}.unfinished"):
                remove(leftover)
            unfinished.mkdir(parents=True)

    def write() -> None:
        files = {_shard(dist.rank(), ranks): {**_prefixed("rows", snapshot.rows), **_prefixed("own", snapshot.own)}}
        if dist.rank() == 0:
            files["same.safetensors"] = snapshot.same
        for name, tensors in files.items():
            save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, unfinished / name)
            fsync(unfinished / name)
            sums[name] = file_sha256(unfinished / name)

    def finish() -> None:
        if dist.rank() == 0:
            text = json.dumps({**snapshot.about, "ranks": ranks, "files": all_sums})
            write_text_atomically(unfinished / "state.json", json.dumps({"sha256": _sha256(text), "state": text}))
            if folder.exists():  # left by an earlier attempt that got further than the state this one resumed from
                remove(folder)
            unfinished.rename(folder)
            fsync(folder.parent)

    failed = try_on_all_ranks(begin) or try_on_all_ranks(write)
    all_sums = {} if failed else dist.gather_dict(sums)
    failed = failed or try_on_all_ranks(finish)
    if failed and dist.rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
    failed = failed or _keep_newest(run, folder)
    dist.barrier()
    return failed


def _keep_newest(run: Path, folder: Path) -> str:
    """Read back the new state, and if it is intact remove all older ones but one; return why it is damaged, or ""."""
    states = _states(run)
    newest_two = [path for path in states if path <= folder][-KEPT:]
    reasons = [damage(path, from_disk=path == folder) for path in newest_two]
    if dist.rank() == 0 and not any(reasons):
        for other in set(states) - set(newest_two):
            shutil.rmtree(other, ignore_errors=True)
    elif dist.rank() == 0 and reasons[-1]:
        shutil.rmtree(folder, ignore_errors=True)
    return reasons[-1]


def exists(run: Path) -> bool:
    """Whether a RUN has a state, intact or not."""
    return any((run / "checkpoints").glob(STEP))


def newest(run: Path, say: Callable[[str], None]) -> Path:
    """The newest intact state of a RUN.

    Damaged ones that are newer are reported and renamed to `damaged-step-N`, so that they are not tried again.

    Raises:
        OdcftError: no state is intact.
    """
    states = _states(run)
    for folder in reversed(states):
        reason = damage(folder)
        if not reason:
            return folder
        say(f"Warning     {folder} is damaged ({reason}). It is set aside, and the state before it is tried.")
        if dist.rank() == 0:
            aside = folder.with_name(f"damaged-{folder.name}")
            remove(aside)
            folder.rename(aside)
    what = "none of its states is intact" if states else "it has no state"
    raise OdcftError(f"{run} cannot be resumed: {what}. Start again with --overwrite, or with another --out.")


def newest_to_look_at(run: Path) -> Path | None:
    """The newest intact state of a RUN that may be training right now, or None: nothing is said or renamed."""
    return next((folder for folder in reversed(_states(run)) if not damage(folder, from_disk=False)), None)


def damage(folder: Path, from_disk: bool = True) -> str:
    """What is wrong with a state on disk, or "": the ranks share the reading, and all get the same answer.

    Args:
        folder: `checkpoints/step-N`.
        from_disk: read the disk itself, not the operating system's cache of the files.
    """

    def check() -> None:
        names = sorted(_read_about(folder)["files"].items())
        for name, expected in names[dist.rank() :: dist.world_size()]:
            if not (folder / name).is_file():  # a pipe would be waited for
                raise OSError(f"{name} is {'not a file' if (folder / name).exists() else 'missing'}")
            if file_sha256(folder / name, from_disk) != expected:
                raise OSError(f"{name} is not what was written")

    return try_on_all_ranks(check)


def load(folder: Path) -> Snapshot:
    """Read a state into host memory, with the rows of this rank, however many ranks wrote it.

    If the number of ranks is the same, each gets back its `own` tensors; if not, their mean over the ranks that wrote.
    """
    about = _read_about(folder)
    before, now = about["ranks"], dist.world_size()
    same = load_file(folder / "same.safetensors")
    if before == now:
        mine = load_file(folder / _shard(dist.rank(), now))
        return Snapshot(same, under("rows.", mine), under("own.", mine), about)
    rows: dict[str, Tensor] = {}
    means: dict[str, Tensor] = {}
    for rank in range(before):
        with safe_open(folder / _shard(rank, before), "pt") as shard:
            for name in shard.keys():  # noqa: SIM118, not a dict
                part = shard.get_slice(name)
                if name.startswith("own."):
                    means[name[4:]] = means.get(name[4:], 0) + shard.get_tensor(name) / before
                elif (rank - dist.rank()) % math.gcd(before, now) == 0:  # otherwise the two ranks share no image
                    _take_rows(rows, name[5:], part, rank, before, about["images"])
    return Snapshot(same, rows, means, about)


def _take_rows(rows: dict[str, Tensor], name: str, part: Any, rank: int, before: int, images: int) -> None:
    """Copy those rows of a file that belong to this rank now to their new positions."""
    for start in range(0, part.get_shape()[0], ROWS_AT_A_TIME):
        piece = part[start : start + ROWS_AT_A_TIME]
        image = ownership.image_of(torch.arange(start, start + len(piece)), rank, before)
        mine = ownership.is_mine(image)
        if name not in rows:
            rows[name] = torch.empty(len(ownership.my_images(images)), *piece.shape[1:], dtype=piece.dtype)
        rows[name][ownership.row_of(image[mine])] = piece[mine]


def _states(run: Path) -> list[Path]:
    """The states of a RUN, oldest first, as rank 0 sees them: others may see an outdated folder on a network disk."""
    names = [path.name for path in sorted((run / "checkpoints").glob(STEP))] if dist.rank() == 0 else []
    return [run / "checkpoints" / name for name in dist.gather_dict({0: names} if dist.rank() == 0 else {})[0]]


def _read_about(folder: Path) -> dict[str, Any]:
    """The contents of state.json; an OSError if they are not what `save` wrote."""
    try:
        sealed = read_json(folder / "state.json")
        if _sha256(sealed["state"]) != sealed["sha256"]:
            raise ValueError
        about = json.loads(sealed["state"])
        if not _is_valid(about):
            raise ValueError
        return about
    except (OdcftError, ValueError, KeyError, TypeError, RecursionError):
        raise OSError("state.json is not what was written") from None


def _is_valid(about: Any) -> bool:
    """Whether state.json has the form that `save` writes; above all, whether it names no files but those of a state."""
    if not isinstance(about, dict):
        return False
    ranks, files = about.get("ranks"), about.get("files")
    if not (isinstance(ranks, int) and isinstance(files, dict) and 1 <= ranks == len(files) - 1):
        return False
    if set(files) != {"same.safetensors", *(_shard(rank, ranks) for rank in range(ranks))}:
        return False
    return all(isinstance(about.get(name), int) and about[name] >= 0 for name in ("step", "images"))


def try_on_all_ranks(work: Callable[[], None]) -> str:
    """Let every rank do its part of some work; return why a rank failed, or "", the same on every rank."""
    reason = ""
    try:
        work()
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    reasons = dist.gather_dict({dist.rank(): reason} if reason else {})
    return reasons[min(reasons)] if reasons else ""


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _shard(rank: int, ranks: int) -> str:
    return f"rank-{rank}-of-{ranks}.safetensors"


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}
