"""Image files with the same bytes."""

import hashlib
import os
import stat
from contextlib import suppress

from odcft.data.sources import Images


def same_content(images: Images) -> list[list[int]]:
    """Images whose files are the same, byte by byte.

    Only files of one size are read. Those that cannot be are in no group.

    Returns:
        The numbers of two and more images each, ascending; groups by their first image.
    """
    sizes: dict[int, list[int]] = {}
    for index in range(len(images)):
        with suppress(OSError):
            about = os.stat(images.path(index))
            if stat.S_ISREG(about.st_mode):
                sizes.setdefault(about.st_size, []).append(index)
    groups: dict[bytes, list[int]] = {}
    for index in sorted(i for rows in sizes.values() if len(rows) > 1 for i in rows):
        with suppress(OSError), open(images.path(index), "rb") as file:
            found = hashlib.blake2b(digest_size=16)
            while piece := file.read(1 << 20):
                found.update(piece)
            groups.setdefault(found.digest(), []).append(index)
    return [rows for rows in groups.values() if len(rows) > 1]
