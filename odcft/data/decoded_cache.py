"""Small images kept decoded in memory, so that later epochs of a run neither read nor decode them (`data.cache`).

The loader processes of a rank and its training process share one file in memory, with a slot for each image of the
rank. Whoever decodes an image writes it to its slot. No lock is needed: a slot starts with a checksum of all that
follows, so one that is being written by another process counts as empty.

The file is not in /dev/shm, which is tiny in many containers: it has no name, and forked processes inherit it. It grows
as slots are written. It is read and written rather than mapped: a write that finds no memory is then an error, not the
end of the process, and takes half the time.
"""

import os
import struct
import sys
import weakref
import zlib
from contextlib import suppress
from typing import Any

import numpy as np

from odcft.data.host_memory import free_host_memory
from odcft.data.images import Images
from odcft.data.intensity_range import size_of_some
from odcft.data.view import View
from odcft.distributed import dist, ownership

SHARE = 0.25  # of the free memory that the caches of all ranks on a machine may take
# Images of this many times the training size or more are not kept. Then every crop is cut from the image at full size:
# of a larger JPEG, `jpeg_crops` may decode a smaller version. And large images would fill the memory.
LARGE = 2
_HEADERS = struct.Struct("=IQHHH")  # checksum, image, height, width, what is kept with them
_HEADER, _CHECKSUM = _HEADERS.size, 4  # bytes


class DecodedCache:
    """Decoded images of this rank, at most as large as a slot.

    Args:
        rows: how many images have a slot: those of the first rows of this rank.
        pixels: in a slot.
        side: an image is kept only if both its sides are smaller, in pixels.
        bands: channels of the images.

    Raises:
        OSError: the system does not give the memory.
    """

    def __init__(self, rows: int, pixels: int, side: int, bands: int = 3) -> None:
        self.rows, self.side, self.bands = rows, side, bands
        self._slot = _slot_size(pixels, bands)
        self._file = os.memfd_create("odcft-decoded")
        weakref.finalize(self, os.close, self._file)

    @property
    def nbytes(self) -> int:
        """The memory it takes when all slots are full."""
        return self.rows * self._slot

    def get(self, index: int) -> tuple[np.ndarray, int] | None:
        """A copy of the pixels (H, W, C) uint8 of an image, and what was kept with them; None if it is not kept."""
        row = ownership.row_of(index)
        if row >= self.rows:
            return None
        header = os.pread(self._file, _HEADER, row * self._slot)
        if len(header) < _HEADER:  # nothing was written here or further on
            return None
        checksum, image, height, width, orientation = _HEADERS.unpack(header)
        size = height * width * self.bands
        if image != index or not 0 < size <= self._slot - _HEADER:
            return None
        content = bytearray(size)
        os.preadv(self._file, [content], row * self._slot + _HEADER)
        if checksum != zlib.crc32(content, zlib.crc32(header[_CHECKSUM:])):
            return None
        return np.frombuffer(content, np.uint8).reshape(height, width, self.bands), orientation

    def put(self, index: int, pixels: np.ndarray, orientation: int = 0) -> None:
        """Keep the pixels (H, W, C) uint8 of an image, with a number below 65,536; does nothing if it is too large."""
        row, (height, width, bands) = ownership.row_of(index), pixels.shape
        if (
            row >= self.rows
            or bands != self.bands
            or max(height, width) >= self.side
            or pixels.size > self._slot - _HEADER
        ):
            return
        content = np.ascontiguousarray(pixels).data.cast("B")
        about = _HEADERS.pack(0, index, height, width, orientation)[_CHECKSUM:]
        checksum = zlib.crc32(content, zlib.crc32(about)).to_bytes(_CHECKSUM, sys.byteorder)
        with suppress(OSError):  # no memory is left: then the image is not kept
            os.pwritev(self._file, [checksum + about, content], row * self._slot)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as None: a process that is not forked does not have the file, and does without."""
        return type(None), ()


def _slot_size(pixels: int, bands: int) -> int:
    return _HEADER + pixels * bands


def make_cache(images: Images, view: View) -> DecodedCache | None:
    """A cache for the images that this rank trains on, or for as many as fit; None if it would not pay.

    It pays for images less than LARGE times as large as the training size. The slots have the size of the largest of
    them in a sample. Images that the user's own function reads are not kept: it may return something else every time.

    Args:
        images: of all ranks.
        view: how they are prepared; its size and bands matter.
    """
    side = LARGE * view.size
    if images.reader is not None or (free := free_host_memory()) is None:
        return None
    pixels = max((width * height for width, height in size_of_some(images) if max(width, height) < side), default=0)
    if not pixels:
        return None
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", dist.world_size()))
    most = int(SHARE * free / ranks_here) // _slot_size(pixels, view.bands)
    rows = min(len(ownership.my_images(len(images))), most)
    with suppress(OSError, AttributeError):  # AttributeError: not Linux
        return DecodedCache(rows, pixels, side, view.bands) if rows else None
    return None
