"""A cache of indices: what was found in a folder or in shards, so that it need not be searched again.

An entry is one file: a line of JSON that describes the arrays behind it. It is mapped into memory, so all processes of
a machine share its pages. It is data like any other: what is damaged, or is not ours, is not used but built again.
Where it is, and how large it may become, says odcft/cache_folder.py.
"""

import hashlib
import json
import mmap
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from odcft.cache_folder import cache_folder, cache_limit, is_ours, make_room
from odcft.data.names import Names
from odcft.data.shared_arrays import drop_pages
from odcft.files import atomic_file

MAGIC = b"odcft index 1 "
WORTH_KEEPING = 0.2  # seconds; what is found faster is found again
SAME_TICK = 2_000_000_000  # ns; a change so soon after the last one may leave the same time (FAT counts 2 seconds)
MAX_HEADER = 64 << 20  # bytes of JSON
MAX_WAIT = 600  # seconds for another process that builds the same index
ALIGNMENT = 64
THREADS = 16  # they wait for a disk or a server, not for the processor

Result = TypeVar("Result")


@dataclass
class Index:
    """What was found.

    Attributes:
        arrays: name to array, of numbers.
        about: anything JSON can hold.
        watched: paths whose change makes the index wrong: folders, shards, list files.
        stamps: int64 (number of paths, 5), what `stamp` said of each before it was read.
        clock: the time (ns) when building began.
    """

    arrays: dict[str, np.ndarray]
    about: dict[str, Any] = field(default_factory=dict)
    watched: Names = field(default_factory=Names)
    stamps: np.ndarray = field(default_factory=lambda: np.zeros((0, 5), np.int64))
    clock: int = 0

    def unchanged(self, stamps: np.ndarray) -> np.ndarray:
        """Which of the watched paths are as they were, bool (number of paths,).

        Only paths that had not changed for a while when they were read: if one changes twice within a tick of its
        clock, the second change leaves no trace. The device is not compared; it differs between machines that share a
        folder.

        Args:
            stamps: of the watched paths now.
        """
        settled = self.stamps[:, 3:].max(1, initial=0) < self.clock - SAME_TICK
        return settled & (self.stamps[:, 1:] == stamps[:, 1:]).all(1)


def stamp(path: str) -> tuple[int, int, int, int, int]:
    """Device, inode, size, and the times (ns) of the last change of content and of anything; zeros if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return (0, 0, 0, 0, 0)
    return stamp_of(found)


def stamp_of(found: os.stat_result) -> tuple[int, int, int, int, int]:
    """The same, of a path that was already asked for its status."""
    inode = found.st_ino & 0x7FFF_FFFF_FFFF_FFFF  # some file systems use all 64 bits
    return (found.st_dev & 0x7FFF_FFFF, inode, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def stamps_of(paths: Iterable[str], stamp: Callable[[str], tuple[int, ...]] = stamp) -> np.ndarray:
    """The stamps (number of paths, 5) of many paths, asked for by several threads."""
    paths = list(paths)
    pieces = [paths[i : i + 256] for i in range(0, len(paths), 256)]
    with ThreadPoolExecutor(THREADS) as pool:
        found = [one for piece in pool.map(lambda piece: [stamp(path) for path in piece], pieces) for one in piece]
    return np.array(found, np.int64).reshape(-1, 5)


def cached(
    key: Iterable[str],
    build: Callable[[], Index],
    use: Callable[[Index], Result],
    stamps: Callable[[Iterable[str]], np.ndarray] = stamps_of,
) -> Result:
    """Use an index from the cache if nothing that it watches has changed; otherwise build it, and keep it.

    Several processes that need the same index wait for the one that builds it.

    Args:
        key: what is indexed, and how.
        build: makes the index.
        use: makes of an index what is wanted; raises a ValueError, KeyError or TypeError if it cannot be right.
        stamps: the stamps of paths as they are now.

    Returns:
        What `use` made.
    """
    entry = entry_of(key)

    def unchanged(index: Index) -> Result | None:
        return use(index) if index.unchanged(stamps(index.watched)).all() else None

    if (result := read(entry, unchanged)) is not None:
        return result
    with _lock(entry):
        if (result := read(entry, unchanged)) is not None:
            return result
        clock, began = time.time_ns(), time.monotonic()
        index = build()
        index.clock = clock
        if time.monotonic() - began >= WORTH_KEEPING:
            write(entry, index)
            # From here on this process shares the pages of the entry with all others that read it.
            if (result := read(entry, use)) is not None:
                return result
    return use(index)


def entry_of(key: Iterable[str]) -> Path | None:
    """The path of an entry; None if there is no cache."""
    place = cache_folder("index")
    name = hashlib.sha256("\0".join(key).encode("utf-8", "surrogatepass")).hexdigest()[:40]
    return None if place is None else place / f"{name}.index"


def read(entry: Path | None, use: Callable[[Index], Result | None]) -> Result | None:
    """What `use` makes of an entry of the cache; None if it does not exist, is damaged, or `use` refuses it.

    `use` may raise a ValueError, KeyError or TypeError.
    """
    if entry is None:
        return None
    try:
        descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | getattr(os, "O_CLOEXEC", 0))
        with os.fdopen(descriptor, "rb"):
            if not is_ours(os.fstat(descriptor)):
                return None
            memory = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        result = use(_parse(memory))
        if result is not None:
            drop_pages(memory)
            with suppress(OSError):
                os.utime(entry)  # for `make_room`
        return result
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, AttributeError):
        return None


def write(entry: Path | None, index: Index) -> None:
    """Write an entry, completely or not at all, if there is a cache and room in it."""
    if entry is not None:
        with suppress(OSError):  # the cache only saves time
            _write(entry, index)
            make_room(entry.parent, keep=entry)


@contextmanager
def _lock(entry: Path | None) -> Iterator[None]:
    """Wait until no other process of this machine is building an entry; but not for ever."""
    if entry is None:
        yield
        return
    try:
        import fcntl

        path = entry.with_name(f"lock-{entry.name[:2]}")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except (ImportError, OSError):
        yield
        return
    try:
        deadline = time.monotonic() + MAX_WAIT
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(descriptor)


def _write(path: Path, index: Index) -> None:
    own = {"watched": index.watched.bytes_B, "watched_ends": index.watched.ends, "stamps": index.stamps}
    arrays = {**{f"data/{name}": array for name, array in index.arrays.items()}, **own}
    described, offset = {}, 0
    for name, array in arrays.items():
        described[name] = [array.dtype.str, list(array.shape), offset, zlib.crc32(_as_bytes(array))]
        offset += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    header = json.dumps({"arrays": described, "about": index.about, "clock": index.clock, "bytes": offset}).encode()
    if offset + len(header) > cache_limit() or len(header) > MAX_HEADER:
        return
    start = _start_of_arrays(len(header))
    with atomic_file(path) as unfinished:
        unfinished.chmod(0o600)
        with unfinished.open("wb") as file:
            file.write(_first_line(header) + header)
            for name, array in arrays.items():
                file.seek(start + described[name][2])
                file.write(_as_bytes(array))
            file.truncate(start + offset)


def _as_bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _first_line(header: bytes) -> bytes:
    return MAGIC + b"%10d %10d\n" % (len(header), zlib.crc32(header))


def _start_of_arrays(header: int) -> int:
    return -(-(len(MAGIC) + 22 + header) // ALIGNMENT) * ALIGNMENT


def _parse(memory: mmap.mmap) -> Index:
    """The index in a mapped entry. Raises an error that `read` knows if it is damaged."""
    length = int(memory[len(MAGIC) : len(MAGIC) + 10])
    if not 0 < length <= MAX_HEADER:
        raise ValueError("no header")
    text = memory[len(MAGIC) + 22 : len(MAGIC) + 22 + length]
    if memory[: len(MAGIC) + 22] != _first_line(text):
        raise ValueError("another file, or a damaged header")
    header = json.loads(text)
    start, arrays = _start_of_arrays(length), {}
    if len(memory) != start + header["bytes"] or not isinstance(header["clock"], int):
        raise ValueError("cut off")
    for name, (kind, shape, offset, checksum) in header["arrays"].items():
        dtype = np.dtype(kind)
        if dtype.kind not in "iu" or offset % ALIGNMENT or offset < 0 or min(shape, default=0) < 0:
            raise ValueError("not an array of numbers")
        count = int(np.prod(shape, dtype=object))
        array: np.ndarray = np.frombuffer(memory, dtype, count, start + offset) if count else np.zeros(0, dtype)
        if zlib.crc32(_as_bytes(array)) != checksum:
            raise ValueError("a damaged array")
        arrays[name] = array.reshape(shape)
    watched = Names.of_arrays(arrays.pop("watched"), arrays.pop("watched_ends"))
    stamps = arrays.pop("stamps")
    if stamps.dtype != np.int64 or stamps.shape != (len(watched), 5):
        raise ValueError("stamps of other paths")
    named = {name.removeprefix("data/"): array for name, array in arrays.items()}
    return Index(named, header["about"], watched, stamps, header["clock"])


def checked_counts(counts: Any) -> dict[str, int]:
    """Counts by name from an entry of the cache. Raises a ValueError if they are something else."""
    if not isinstance(counts, Mapping) or not all(isinstance(n, int) and n >= 0 for n in counts.values()):
        raise ValueError("not counts")
    return dict(counts)
