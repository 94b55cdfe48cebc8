"""Tar shards, read in place: an index says where in which shard each image is, and nothing is unpacked.

Samples are named as WebDataset does: the members of a sample share their path up to the first dot of the last part,
`0001.jpg`, `0001.cls`. Nothing in an archive is trusted: whatever is not a plain file is counted and left alone.
"""

import io
import os
import posixpath
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from odcft.data.image_files import ENDINGS, MAX_BYTES, is_url, open_file, read_range, skipped_ending
from odcft.data.index_cache import Index
from odcft.data.names import Names
from odcft.data.shared_arrays import SharesArrays
from odcft.data.stores.tar_headers import plain_files
from odcft.errors import OdcftError

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MAGIC = {b"\x1f\x8b": "gzip -d", b"BZh": "bzip2 -d", b"\xfd7zXZ": "xz -d", b"\x28\xb5\x2f\xfd": "zstd -d"}
MAX_LABEL = 4096  # bytes of a .cls member


class TarStore(SharesArrays):
    """Images in tar shards.

    Attributes:
        paths: of the shards.
        shard_N, offset_N, size_N: where each image is: number of the shard, first byte, number of bytes.
    """

    def __init__(self, paths: list[str], shard_N: np.ndarray, offset_N: np.ndarray, size_N: np.ndarray) -> None:
        self.paths, self.shard_N, self.offset_N, self.size_N = paths, shard_N, offset_N, size_N

    def read(self, row: int) -> bytes:
        """The bytes of an image."""
        return read_range(self.paths[self.shard_N[row]], int(self.offset_N[row]), int(self.size_N[row]))

    def take(self, rows: np.ndarray) -> "TarStore":
        """The store of these rows."""
        return TarStore(self.paths, self.shard_N[rows], self.offset_N[rows], self.size_N[rows])

    def sizes(self) -> np.ndarray:
        """The size of each image in bytes, int64 (N,)."""
        return self.size_N


@dataclass
class _Shard:
    """What one shard holds: `names`, `offsets` and `sizes` of images, labels by sample, and the rest, counted."""

    images: dict[str, tuple[int, int]] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)


def index_shards(
    root: str, shards: list[str], advance: Callable[..., None]
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Read the headers of all shards.

    Args:
        root: the folder that the names of shards are relative to.
        shards: their names, sorted.
        advance: called with 1 for each shard that is done.

    Returns:
        The arrays of an `Index`: names, ends, shard, offset, size, labels, labels_ends; and what was left out, counted.

    Raises:
        OdcftError: a shard is compressed, damaged or cut off.
    """
    names, labels, places = [], [], []
    skipped: Counter[str] = Counter()
    # Several at a time only where each header is waited for: parsing keeps one thread busy.
    with ThreadPoolExecutor(8 if is_url(root) else 1) as pool:
        read = pool.map(lambda name: read_shard(os.path.join(root, name)), shards)
        for number, (name, shard) in enumerate(zip(shards, read, strict=True)):
            skipped += shard.skipped
            order = sorted(shard.images)
            names.append([f"{name}/{member}" for member in order])
            places.append(np.array([(number, *shard.images[member]) for member in order], np.int64).reshape(-1, 3))
            folders = not shard.labels
            labels.append([posixpath.dirname(m) if folders else shard.labels.get(_sample(m), "") for m in order])
            advance(1)
    place = np.concatenate(places)
    all_names = Names(one for part in names for one in part)
    all_labels = Names(one for part in labels for one in part)
    arrays = {"names": all_names.bytes_B, "ends": all_names.ends}
    arrays |= {"shard": place[:, 0].astype(np.int32), "offset": place[:, 1].copy(), "size": place[:, 2].copy()}
    return {**arrays, "labels": all_labels.bytes_B, "labels_ends": all_labels.ends}, dict(skipped)


def store_of_index(index: Index, paths: list[str], sizes: np.ndarray) -> TarStore:
    """The store of an index, which may come from the cache.

    Args:
        index: as `index_shards` makes it.
        paths: of the shards.
        sizes: of the shards, in bytes.

    Raises:
        ValueError, KeyError: it does not match the shards.
    """
    shard, offset, size = (index.arrays[name] for name in ("shard", "offset", "size"))
    count = len(index.arrays["ends"]) - 1
    if shard.dtype != np.int32 or offset.dtype != np.int64 or size.dtype != np.int64:
        raise ValueError("arrays of the wrong types")
    if any(array.shape != (count,) for array in (shard, offset, size)):
        raise ValueError("arrays of different lengths")
    if count and not (shard.min() >= 0 and shard.max() < len(paths) and offset.min() >= 0 and size.min() >= 0):
        raise ValueError("places out of range")
    if count and (size > sizes[shard] - offset).any():
        raise ValueError("places beyond the end of a shard")
    return TarStore(paths, shard, offset, size)


def read_shard(path: str) -> _Shard:
    """Read the headers of a shard."""
    try:
        with open_file(path) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            start = file.read(8)
            file.seek(0)
            for magic, command in _MAGIC.items():
                if start.startswith(magic):
                    raise OdcftError(
                        f"{path} is compressed, so images cannot be read from its middle. "
                        f"Decompress it once ({command}), and give the .tar."
                    )
            return _members(path, file, size)
    except OSError as error:
        raise OdcftError(f"{path} cannot be read: {error.strerror or error}.") from None


def _members(path: str, file: Any, size: int) -> _Shard:
    shard = _Shard()
    for member in plain_files(path, file, size, shard.skipped):
        name = posixpath.normpath(member.name).lstrip("/")
        if ".." in name.split("/") or "\0" in name or name in ("", "."):
            shard.skipped["member with a name that leads outside"] += 1
        elif name.lower().endswith(ENDINGS):
            if any(part.startswith(".") for part in name.split("/")):
                shard.skipped["hidden image"] += 1
            elif member.size > MAX_BYTES:
                shard.skipped["image that is too large"] += 1
            else:
                shard.skipped["image that a later one of the same name replaces"] += name in shard.images
                shard.images[name] = (member.offset, member.size)
        elif name.lower().endswith(".cls") and member.size <= MAX_LABEL:
            file.seek(member.offset)
            shard.labels[_sample(name)] = file.read(member.size).decode("utf-8", "replace").strip("\0 \t\r\n")
        else:
            shard.skipped[skipped_ending(name)] += 1
    shard.skipped = +shard.skipped
    return shard


def _sample(name: str) -> str:
    """The key of the sample that a member belongs to: its path up to the first dot of the last part."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.split(".")[0])
