"""Image files that are byte-for-byte copies of each other."""

import hashlib
import os
import stat
from contextlib import suppress

from odcft.data.sources import Images


def identical_files(images: Images) -> list[list[int]]:
    """Find groups of images whose files are byte-for-byte the same.

    Only files that share their size with another are read. Files that cannot be read are in no group.

    Returns:
        Groups of two or more image indices, ascending, in the order of their first images.
    """
    sizes: dict[int, list[int]] = {}
    for index in range(len(images)):
        with suppress(OSError):
            status = os.stat(images.path(index))
            if stat.S_ISREG(status.st_mode):
                sizes.setdefault(status.st_size, []).append(index)
    groups: dict[bytes, list[int]] = {}
    for index in sorted(i for rows in sizes.values() if len(rows) > 1 for i in rows):
        with suppress(OSError), open(images.path(index), "rb") as file:
            digest = hashlib.blake2b(digest_size=16)
            while chunk := file.read(1 << 20):
                digest.update(chunk)
            groups.setdefault(digest.digest(), []).append(index)
    return [rows for rows in groups.values() if len(rows) > 1]
