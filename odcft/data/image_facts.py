"""Size and format of every image, read from the first bytes of each, in parallel; kept in the cache of indices."""

import hashlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np

from odcft.data.image_decoding import image_size
from odcft.data.image_files import is_url
from odcft.data.images import Images
from odcft.data.index_cache import THREADS, Index, entry_of, read, stamps_of, write
from odcft.data.names import Names
from odcft.progress import Progress

FORMATS = ("unreadable", "other", "jpeg", "png", "webp", "tiff", "bmp", "gif", "pnm", "jpeg2000", "avif", "heic")
MAGIC = {
    "jpeg": [(0, b"\xff\xd8\xff")],
    "png": [(0, b"\x89PNG\r\n\x1a\n")],
    "webp": [(8, b"WEBP")],
    "tiff": [(0, b"II*\0"), (0, b"MM\0*"), (0, b"II+\0"), (0, b"MM\0+")],
    "bmp": [(0, b"BM")],
    "gif": [(0, b"GIF87a"), (0, b"GIF89a")],
    "jpeg2000": [(0, b"\0\0\0\x0cjP  "), (0, b"\xff\x4f\xff\x51")],
}
WORTH_KEEPING = 1000  # images; the headers of fewer are read again
HEAD = 1 << 16  # bytes that usually are enough
PIECE = 256  # images that a thread takes at a time
_one_tiff = threading.Lock()


@dataclass
class ImageFacts:
    """Facts about N images.

    Attributes:
        width, height: as stored in the file, before EXIF rotates it; int32 (N,), 0 if the image cannot be read.
        format: index into FORMATS, uint8 (N,).
        size: of the file or member in bytes, int64 (N,); -1 if there is none.
    """

    width: np.ndarray
    height: np.ndarray
    format: np.ndarray
    size: np.ndarray


def image_facts(images: Images, progress: Progress | None = None) -> ImageFacts:
    """The facts about all images. Only those of files that are new or have changed since the last time are read.

    Args:
        images: of any source.
        progress: where to show a bar.
    """
    paths = _files_of(images)
    entry = None if is_url(str(images.root)) else entry_of(("facts", os.path.abspath(images.root), str(len(paths))))
    index = Index({"facts": np.full((len(images), 4), -1, np.int64)}, {}, paths, clock=time.time_ns())
    index.stamps = stamps_of(paths) if entry is not None else np.zeros((len(paths), 5), np.int64)
    index.arrays["names"] = np.frombuffer(hashlib.sha256(images.names.bytes_B.tobytes()).digest(), np.uint8)
    known = read(entry, partial(_known_facts, index))
    facts = index.arrays["facts"] if known is None else known
    index.arrays["facts"] = facts
    missing = np.flatnonzero(facts[:, 3] == -1)
    pieces = [missing[start : start + PIECE] for start in range(0, len(missing), PIECE)]
    progress = progress or Progress(quiet=True)
    if pieces:
        with progress.phase("Headers", len(missing)) as advance, ThreadPoolExecutor(THREADS) as pool:
            found = pool.map(lambda rows: [_facts(images, row) for row in rows.tolist()], pieces)
            for rows, part in zip(pieces, found, strict=True):
                facts[rows] = part
                advance(len(rows))
        if len(missing) >= WORTH_KEEPING:
            write(entry, index)
    width, height, kind, size = facts.T
    return ImageFacts(width.astype(np.int32), height.astype(np.int32), kind.astype(np.uint8), size - 1)


def _files_of(images: Images) -> Names:
    """The files whose change may change a fact: one for each image, or the shards."""
    shards = getattr(images.store, "paths", None)
    if images.store is None:
        return Names(os.path.abspath(images.path(row)) for row in range(len(images)))
    return Names(shards or ())


def _known_facts(now: Index, then: Index) -> np.ndarray | None:
    """The facts that are still right: -1 for the others. None if they are of other images."""
    facts = then.arrays["facts"]
    if facts.dtype != np.int64 or facts.shape != now.arrays["facts"].shape or then.watched != now.watched:
        return None
    if not np.array_equal(then.arrays["names"], now.arrays["names"]) or not len(now.watched):
        return None
    if facts.size and (facts.min() < -1 or facts.max() > 1 << 40 or facts[:, 2].max() >= len(FORMATS)):
        return None
    same = then.unchanged(now.stamps)
    if len(same) != len(facts):  # shards: all or nothing
        same = np.full(len(facts), same.all())
    return np.where(same[:, None], facts, -1)


def _facts(images: Images, row: int) -> tuple[int, int, int, int]:
    """Width, height, format, and size + 1 (so that -1 is left for "not known yet")."""
    try:
        head, size = images.head(row, HEAD)
        try:
            width, height = _size(head)
        except Exception:  # some formats need more than the head
            if len(head) == size:
                raise
            head = images.read(row)
            size, (width, height) = len(head), _size(head)
        return width, height, format_of(head), size + 1
    except Exception:  # Pillow raises a dozen types for broken files
        return 0, 0, 0, 0


def _size(content: bytes) -> tuple[int, int]:
    """Width and height. One TIFF at a time: while it is opened, what libtiff prints is discarded for all threads."""
    with _one_tiff if FORMATS[format_of(content)] == "tiff" else nullcontext():
        return image_size(content)


def format_of(head: bytes) -> int:
    """The format that the first bytes of a file say, as an index into FORMATS."""
    if head[4:8] == b"ftyp":
        return FORMATS.index("avif" if head[8:12] in (b"avif", b"avis") else "heic")
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace():
        return FORMATS.index("pnm")
    fitting = (name for name, magics in MAGIC.items() for at, magic in magics if head[at:].startswith(magic))
    return FORMATS.index(next(fitting, "other"))
