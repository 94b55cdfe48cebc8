"""Snapshots: the state of a run on disk, enough to continue as if it had never stopped. Safetensors and JSON only.

    RUN/checkpoints/step-000001200/
        same.safetensors          what is the same on every rank; rank 0 writes it
        rank-0-of-2.safetensors   what one rank has of its own; each writes its own, nothing is gathered
        state.json                step, recipe, versions, SHA-256 of the files and of itself

The place of a row in the samples memory tells which image it belongs to (distributed/ownership.py), so a run may
continue on another number of ranks. Random numbers depend on the seed and the step alone (seeds.py): no generator is
saved.
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
from odcft.files import file_sha256, fsync, remove, save_file, write_text_atomically
from odcft.run.folder import STEP
from odcft.state import Snapshot, under

KEPT = 2  # newest states
PIECE = 65536  # rows read at a time


def save(run: Path, snapshot: Snapshot) -> str:
    """Write `checkpoints/step-N`, whole or not at all; older states but one go once it has been read back.

    Args:
        run: the RUN folder.
        snapshot: its `about` has `step`, how many are done, and `images`, N.

    Returns:
        Why it could not be written, on every rank, or "". What was there before is there still, then.
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
            write_text_atomically(unfinished / "state.json", json.dumps({"sha256": _sum_of(text), "state": text}))
            if folder.exists():  # left by an earlier attempt, which got further than the state this one resumed from
                remove(folder)
            unfinished.rename(folder)
            fsync(folder.parent)

    failed = together(begin) or together(write)
    all_sums = {} if failed else dist.gather_dict(sums)
    failed = failed or together(finish)
    if failed and dist.rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
    failed = failed or _keep_newest(run, folder)
    dist.barrier()
    return failed


def _keep_newest(run: Path, folder: Path) -> str:
    """Read the state that was just written back, and remove older ones but one; why it is damaged, or ""."""
    states = _states(run)
    newest_two = [path for path in states if path <= folder][-KEPT:]
    found = [damage(path, from_disk=path == folder) for path in newest_two]
    if dist.rank() == 0 and not any(found):
        for other in set(states) - set(newest_two):
            shutil.rmtree(other, ignore_errors=True)
    elif dist.rank() == 0 and found[-1]:
        shutil.rmtree(folder, ignore_errors=True)
    return found[-1]


def exists(run: Path) -> bool:
    """Whether a RUN has a state, in whatever condition."""
    return any((run / "checkpoints").glob(STEP))


def newest(run: Path, say: Callable[[str], None]) -> Path:
    """The newest state of a RUN that is as it was written.

    Damaged ones are said and set aside as `damaged-step-N`: they are not the newest any more.

    Raises:
        OdcftError: there is none.
    """
    states = _states(run)
    for folder in reversed(states):
        reason = damage(folder)
        if not reason:
            return folder
        say(f"Warning     {folder} is damaged ({reason}); set aside, the state before it is tried.")
        if dist.rank() == 0:
            aside = folder.with_name(f"damaged-{folder.name}")
            remove(aside)
            folder.rename(aside)
    what = "none of its states is intact" if states else "it has no state"
    raise OdcftError(f"{run} cannot be resumed: {what}. Start anew with --overwrite, or with another --out.")


def damage(folder: Path, from_disk: bool = True) -> str:
    """What is wrong with a state on disk, or "": the same on every rank, each having read its part of the files.

    Args:
        folder: `checkpoints/step-N`.
        from_disk: do not be content with what memory still holds of the files.
    """

    def check() -> None:
        names = sorted(_about(folder)["files"].items())
        for name, expected in names[dist.rank() :: dist.world_size()]:
            if file_sha256(folder / name, from_disk) != expected:
                raise OSError(f"{name} is not what was written")

    return together(check)


def load(folder: Path) -> Snapshot:
    """A state in host memory: this rank's rows, whatever the number of ranks that wrote them.

    Of `own`, a rank gets back its own where the ranks are as many as they were, else the mean over those that wrote.
    """
    about = _about(folder)
    before, now = about["ranks"], dist.world_size()
    same = load_file(folder / "same.safetensors")
    if before == now:
        mine = load_file(folder / _shard(dist.rank(), now))
        return Snapshot(same, under("rows.", mine), under("own.", mine), about)
    rows: dict[str, Tensor] = {}
    means: dict[str, Tensor] = {}
    for rank in range(before):
        with safe_open(folder / _shard(rank, before), "pt") as shard:
            for name in shard.keys():  # noqa: SIM118, it is no dict
                part = shard.get_slice(name)
                if name.startswith("own."):
                    means[name[4:]] = means.get(name[4:], 0) + shard.get_tensor(name) / before
                elif (rank - dist.rank()) % math.gcd(before, now) == 0:  # else they have no image in common
                    _take_rows(rows, name[5:], part, rank, before, about["images"])
    return Snapshot(same, rows, means, about)


def _take_rows(rows: dict[str, Tensor], name: str, part: Any, rank: int, before: int, images: int) -> None:
    """Put those rows of another rank's share that are this rank's now where they belong."""
    for start in range(0, part.get_shape()[0], PIECE):
        piece = part[start : start + PIECE]
        image = ownership.image_of(torch.arange(start, start + len(piece)), rank, before)
        mine = ownership.is_mine(image)
        if name not in rows:
            rows[name] = torch.empty(len(ownership.my_images(images)), *piece.shape[1:], dtype=piece.dtype)
        rows[name][ownership.row_of(image[mine])] = piece[mine]


def _states(run: Path) -> list[Path]:
    """The states of a RUN, oldest first, as rank 0 sees them: on a network disk others may see yesterday's folder."""
    names = [path.name for path in sorted((run / "checkpoints").glob(STEP))] if dist.rank() == 0 else []
    return [run / "checkpoints" / name for name in dist.gather_dict({0: names} if dist.rank() == 0 else {})[0]]


def _about(folder: Path) -> dict[str, Any]:
    try:
        sealed = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if _sum_of(sealed["state"]) != sealed["sha256"]:
            raise ValueError
        about = json.loads(sealed["state"])
        if not _is_ours(about):
            raise ValueError
        return about
    except (ValueError, KeyError, TypeError, RecursionError):
        raise OSError("state.json is not what was written") from None


def _is_ours(about: Any) -> bool:
    """Whether the words of a state are such as `save` writes: above all, of no files but its own."""
    if not isinstance(about, dict):
        return False
    ranks, files = about.get("ranks"), about.get("files")
    if not (isinstance(ranks, int) and isinstance(files, dict) and 1 <= ranks == len(files) - 1):
        return False
    if set(files) != {"same.safetensors", *(_shard(rank, ranks) for rank in range(ranks))}:
        return False
    return all(isinstance(about.get(name), int) and about[name] >= 0 for name in ("step", "images"))


def together(work: Callable[[], None]) -> str:
    """Let every rank do its part of something; why some rank could not do its part, or "": the same on every rank."""
    reason = ""
    try:
        work()
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    reasons = dist.gather_dict({dist.rank(): reason} if reason else {})
    return reasons[min(reasons)] if reasons else ""


def _sum_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _shard(rank: int, ranks: int) -> str:
    return f"rank-{rank}-of-{ranks}.safetensors"


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}
