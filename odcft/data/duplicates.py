"""Images that are byte-for-byte copies of each other."""

import hashlib
from contextlib import suppress

import numpy as np

from odcft.data.images import Images
from odcft.errors import OdcftError


def identical_files(images: Images) -> list[list[int]]:
    """Find groups of images whose bytes are the same.

    Only images that share their size with another are read, if sizes are known. Images that cannot be read are in no
    group.

    Returns:
        Groups of two or more image indices, ascending, in the order of their first images.
    """
    sizes = images.sizes()
    if sizes is None:
        candidates = np.arange(len(images))
    else:
        _, group_N, count_G = np.unique(sizes, return_inverse=True, return_counts=True)
        candidates = np.flatnonzero((sizes >= 0) & (count_G[group_N] > 1))
    groups: dict[bytes, list[int]] = {}
    for index in candidates.tolist():
        with suppress(OSError, OdcftError):
            groups.setdefault(hashlib.blake2b(images.read(index), digest_size=16).digest(), []).append(index)
    return [rows for rows in groups.values() if len(rows) > 1]
