"""What a set of images consists of: read every image once, as training would, and count what is found."""

import io
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from PIL import Image

from odcft.data import shared_memory
from odcft.data.batches import Crops
from odcft.data.images import Images
from odcft.data.pillow_decoding import FORMATS
from odcft.data.pixel_statistics import PixelStatistics, is_gray
from odcft.data.view import View
from odcft.distributed import stop_signals
from odcft.errors import OdcftError

BATCH = 16  # images that a loader process examines at a time
FEW = 128  # images: fewer are examined by this process alone


@dataclass
class Survey:
    """What was found in a set of images.

    Attributes:
        examined: how many images.
        bytes: of their files.
        kinds: how many have which (format, bits a channel, bands).
        smallest, largest: (width, height) of the images with the fewest and the most pixels, as stored.
        sides: the shorter side of each readable image.
        gray: how many have no colour.
        broken: index to reason.
        statistics: of the pixels, as the network would see them.
        hashes, hashed: of the content of every file that could be read, and its index.
    """

    examined: int = 0
    bytes: int = 0
    kinds: Counter[tuple[str, int, int]] = field(default_factory=Counter)
    smallest: tuple[int, int] = (0, 0)
    largest: tuple[int, int] = (0, 0)
    sides: list[int] = field(default_factory=list)
    gray: int = 0
    broken: dict[int, str] = field(default_factory=dict)
    statistics: PixelStatistics = field(default_factory=PixelStatistics)
    hashes: list[int] = field(default_factory=list)
    hashed: list[int] = field(default_factory=list)

    @property
    def readable(self) -> int:
        """How many images can be read."""
        return self.examined - len(self.broken)

    @property
    def usual_side(self) -> int:
        """The median shorter side; 0 if none can be read."""
        return int(np.median(self.sides)) if self.sides else 0

    def merge(self, other: "Survey") -> None:
        """Add what was found in other images."""
        sizes = [size for size in (self.smallest, self.largest, other.smallest, other.largest) if size != (0, 0)]
        if sizes:
            self.smallest, self.largest = min(sizes, key=_pixels), max(sizes, key=_pixels)
        self.examined, self.bytes, self.gray = (
            self.examined + other.examined,
            self.bytes + other.bytes,
            self.gray + other.gray,
        )
        self.kinds += other.kinds
        self.sides += other.sides
        self.broken |= other.broken
        self.hashes += other.hashes
        self.hashed += other.hashed
        self.statistics.merge(other.statistics)

    def copies(self) -> list[list[int]]:
        """Groups of readable images with the same content: indices, ascending, in the order of their first."""
        hashes, hashed = np.array(self.hashes, np.uint64), np.array(self.hashed, np.int64)
        readable = ~np.isin(hashed, list(self.broken))
        hashes, hashed = hashes[readable], hashed[readable]
        order = np.lexsort((hashed, hashes))
        borders = np.flatnonzero(np.diff(hashes[order])) + 1
        groups = [group.tolist() for group in np.split(hashed[order], borders) if len(group) > 1]
        return sorted(groups)


def _pixels(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def survey(
    images: Images, indices: range, view: View, workers: int, advance: Callable[[int], object] = lambda count: None
) -> Survey:
    """Examine images.

    Args:
        images: the set.
        indices: which of them.
        view: how they would be prepared.
        workers: loader processes.
        advance: called with the number of images done, now and then.

    Raises:
        OdcftError: a loader process died.
    """
    batches = [indices[first : first + BATCH] for first in range(0, len(indices), BATCH)]
    loader: Iterable[Survey] = torch.utils.data.DataLoader(
        _Parts(images, view),
        batch_size=None,
        sampler=batches,  # type: ignore[arg-type]
        num_workers=shared_memory.usable_workers(workers if len(indices) > FEW else 0),
        collate_fn=_as_it_is,  # type: ignore[arg-type]
        worker_init_fn=_init_worker,
    )
    found = Survey()
    try:
        for part in loader:
            found.merge(part)
            advance(part.examined)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise OdcftError(
            f"A process that reads images died after {found.examined:,} of {len(indices):,} images "
            f"({str(error).strip().splitlines()[0]}). Usually the memory ran out: pass --set data.workers=1."
        ) from None
    return found


class _Parts(torch.utils.data.Dataset):
    """Maps a range of images to the survey of them."""

    def __init__(self, images: Images, view: View) -> None:
        self.images, self.view = images, view

    def __getitem__(self, indices: range) -> Survey:
        part = Survey()
        for index in indices:
            part.merge(examine(self.images, index, self.view))
        return part


def _as_it_is(part: Survey) -> Survey:
    return part


def _init_worker(worker: int) -> None:
    torch.set_num_threads(1)
    stop_signals.ignore_signals_in_worker()
    shared_memory.exit_instead_of_hanging()


def examine(images: Images, index: int, view: View) -> Survey:
    """The survey of a single image."""
    once: Any = _ReadOnce(images)
    pixels, _ = Crops(once, view)[0, index]
    found = Survey(examined=1)
    if once.content is not None:
        found.bytes = len(once.content)
        found.hashes = [int.from_bytes(blake2b(once.content, digest_size=8).digest(), "little")]
        found.hashed = [index]
    if isinstance(pixels, str):
        found.broken[index] = pixels
        return found
    kind, size = _describe(once.content, images.names[index])
    found.kinds[kind] += 1
    if size != (0, 0):
        found.smallest, found.largest, found.sides = size, size, [min(size)]
    found.gray = int(is_gray(pixels))
    found.statistics.add(pixels.numpy() / 255)
    return found


class _ReadOnce:
    """Images whose bytes are kept when they are read; for the rest, the images themselves."""

    def __init__(self, images: Images) -> None:
        self.images = images
        self.content: bytes | None = None

    def read(self, index: int) -> bytes:
        """The encoded bytes of image `index`."""
        self.content = None
        content = self.content = self.images.read(index)
        return content

    def __getattr__(self, name: str) -> Any:
        return getattr(self.images, name)


def _describe(content: bytes | None, name: str) -> tuple[tuple[str, int, int], tuple[int, int]]:
    """(Format, bits a channel, bands) and (width, height) of a readable image, from its header."""
    try:
        with Image.open(io.BytesIO(content or b""), formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            tags = image.tag_v2 if image.format == "TIFF" else {}  # type: ignore[attr-defined]
            bits = 32 if image.mode in ("I", "F") else 16 if image.mode.startswith("I;16") else 8
            if image.format == "PNG" and content:
                bits = content[24]  # of the IHDR chunk, which is always first
            bits = max(tags.get(258, (bits,)))
            format = {"MPO": "JPEG"}.get(str(image.format), str(image.format)).lower()
            return (format, int(bits), int(tags.get(277, len(image.getbands())))), image.size
    except Exception:  # read by another library than Pillow
        return (os.path.splitext(name)[1].lstrip(".").lower() or "other", 0, 0), (0, 0)
