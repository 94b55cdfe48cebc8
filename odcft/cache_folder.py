"""Where odcft keeps what only saves time: indices of data sets, and features.

Environment:
    ODCFT_CACHE: the folder to use instead of XDG_CACHE_HOME/odcft (~/.cache/odcft); "off" to do without.
    ODCFT_CACHE_GB: the size that the entries of each kind may have together, 4 by default; those unused for longest are
        removed.
"""

import os
import re
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ENTRY = re.compile(r"[0-9a-f]{40}(\.index|-[0-9a-f]{12}\.safetensors)")  # how all entries are called


def cache_folder(kind: str) -> Path | None:
    """The folder of the entries of a kind, which nobody else can write to; None if it is off or cannot be made."""
    place = os.environ.get("ODCFT_CACHE")
    if place is not None and place.strip().lower() in ("", "0", "no", "off"):
        return None
    try:
        if place is None:
            base = os.environ.get("XDG_CACHE_HOME", "")
            place = os.path.join(base if os.path.isabs(base) else os.path.expanduser("~/.cache"), "odcft")
        folder = Path(os.path.abspath(place)) / kind
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        return folder if is_ours(folder.lstat(), stat.S_ISDIR) else None
    except (OSError, ValueError):
        return None


def is_ours(found: os.stat_result, kind: Callable[[int], bool] = stat.S_ISREG) -> bool:
    """Whether it is of this kind (stat.S_ISREG or S_ISDIR), this user's, and nobody else can write to it."""
    user = os.geteuid() if hasattr(os, "geteuid") else found.st_uid
    return kind(found.st_mode) and found.st_uid == user and not found.st_mode & 0o022


def cache_limit() -> float:
    """How many bytes the entries of a kind may have together."""
    try:
        return float(os.environ.get("ODCFT_CACHE_GB", "4")) * 1e9
    except ValueError:
        return 4e9


def make_room(folder: Path, keep: Path) -> None:
    """Remove the entries that were not used for longest, until all together keep the limit; `keep` stays.

    Files under other names are left alone: ODCFT_CACHE may name a folder that holds something else.
    """
    with os.scandir(folder) as listing:
        found = [(entry.stat(follow_symlinks=False), entry) for entry in listing if ENTRY.fullmatch(entry.name)]
    left = sum(status.st_size for status, _ in found)
    for status, entry in sorted(found, key=lambda one: one[0].st_mtime_ns):
        if left <= cache_limit():
            break
        if entry.name != keep.name and entry.is_file(follow_symlinks=False):
            os.unlink(entry.path)
            left -= status.st_size
