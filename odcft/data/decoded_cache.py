"""Small images kept decoded in memory, so that later epochs of a run neither read nor decode them (`data.cache`).

The loader processes of a rank and its training process share one block of memory, with a slot for each image of the
rank. Whoever decodes an image writes it to its slot. No lock is needed: a slot starts with a checksum of all that
follows, so one that is being written by another process counts as empty.

The block is not in /dev/shm, which is tiny in many containers, but in memory that forked processes inherit. It is taken
page by page as slots are written.
"""

import mmap
import os
import struct
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
_CHECKSUM = struct.Struct("=I")
_ABOUT = struct.Struct("=QHHH")  # image, height, width, EXIF orientation of the pixels
_HEADER = _CHECKSUM.size + _ABOUT.size


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
        self._block = memoryview(mmap.mmap(-1, rows * self._slot))

    @property
    def nbytes(self) -> int:
        """The memory it takes when all slots are full."""
        return len(self._block)

    def get(self, index: int) -> tuple[np.ndarray, int] | None:
        """A copy of the pixels (H, W, C) uint8 of an image, and what was kept with them; None if it is not kept."""
        slot = self._slot_of(index)
        if slot is None:
            return None
        image, height, width, orientation = _ABOUT.unpack_from(slot, _CHECKSUM.size)
        end = _HEADER + height * width * self.bands
        if image != index or not height or end > len(slot):
            return None
        content = bytearray(slot[:end])  # copied before the checksum is compared: nothing can change it afterwards
        (checksum,) = _CHECKSUM.unpack_from(content)
        if checksum != zlib.crc32(memoryview(content)[_CHECKSUM.size :]):
            return None
        if _ABOUT.unpack_from(content, _CHECKSUM.size) != (image, height, width, orientation):
            return None
        return np.frombuffer(content, np.uint8, offset=_HEADER).reshape(height, width, self.bands), orientation

    def put(self, index: int, pixels: np.ndarray, orientation: int = 0) -> None:
        """Keep the pixels (H, W, C) uint8 of an image, with a number below 65,536; does nothing if it is too large."""
        slot, (height, width, bands) = self._slot_of(index), pixels.shape
        end = _HEADER + pixels.size
        if slot is None or bands != self.bands or max(height, width) >= self.side or end > len(slot):
            return
        content = _ABOUT.pack(index, height, width, orientation) + pixels.tobytes()
        slot[:end] = _CHECKSUM.pack(zlib.crc32(content)) + content

    def _slot_of(self, index: int) -> memoryview | None:
        row = ownership.row_of(index)
        return self._block[row * self._slot : (row + 1) * self._slot] if row < self.rows else None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as None: a process that is not forked does not have the block, and does without."""
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
    with suppress(OSError, OverflowError):
        return DecodedCache(rows, pixels, side, view.bands) if rows else None
    return None
