"""Features that were extracted before, on disk, so that a second protocol and `before` cost nothing.

An entry is one layer of one network for one set of images. Its name is a hash of everything the features depend on:
the weights, the bytes of the images, how they are resized and cropped, the precision and the version of this format.
Where they are, and how large they may become, says odcft/cache_folder.py.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from odcft.backbone.network import Backbone
from odcft.cache_folder import cache_folder, cache_limit, is_ours, make_room
from odcft.data.images import Images
from odcft.data.view import View
from odcft.distributed import dist, ownership
from odcft.files import atomic_file, save_file
from odcft.progress import Progress

VERSION = 1  # of the format
THREADS, AT_ONCE = 8, 256  # that read images on a rank; images that each reads in a row
BETWEEN = 1 << 16  # images of all ranks between two exchanges: no rank waits long enough for another to give up
SUM = 20  # bytes
Entry = tuple[dict[str, np.ndarray], dict[int, str]]  # layers and unreadable images


def contents_of(images: Images, progress: Progress, alone: bool = False) -> bytes:
    """A checksum of the bytes of every image, for `key`; b"" if features of these images are not to be kept.

    All ranks call this together, and each reads its share; or one calls it `alone`. Features of images that the user's
    own function reads are not kept: nothing would tell that it has changed.
    """
    device, ranks = dist.this_device(), 1 if alone else dist.world_size()
    wanted = cache_folder("features") is not None and images.reader is None
    if not alone:  # rank 0 decides: the other ranks may have another disk
        wanted = bool(dist.all_sum(torch.tensor(float(wanted and dist.rank() == 0), device=device)))
    if not wanted:
        return b""
    found = []
    with ThreadPoolExecutor(THREADS) as pool, progress.waiting(f"Checksums of {len(images):,} images"):
        step = max(1, BETWEEN // ranks) * ranks  # a multiple: every piece starts with an image of the first rank
        for start in range(0, len(images), step):
            count = min(step, len(images) - start)
            mine = [start + row for row in (range(count) if alone else ownership.my_images(count))]
            pieces = [mine[first : first + AT_ONCE] for first in range(0, len(mine), AT_ONCE)]
            # Hashing lets other threads run.
            sums = b"".join(
                b"".join(one) for one in pool.map(lambda piece: [_content(images, i) for i in piece], pieces)
            )
            rows = torch.frombuffer(bytearray(sums), dtype=torch.uint8) if sums else torch.zeros(0, dtype=torch.uint8)
            rows_NS = rows.view(-1, SUM)
            if not alone:
                rows_NS = ownership.in_dataset_order(rows_NS.to(device), count)
            found.append(rows_NS.cpu().numpy().tobytes())
    return b"".join(found)


def key(backbone: Backbone, contents: bytes, view: View, precision: str) -> str:
    """What the features of all layers depend on, as a hash; "" if they are not to be kept.

    Args:
        backbone: the network.
        contents: what `contents_of` gave for the images.
        view: how they are resized and cropped.
        precision: that the network runs in.
    """
    if not contents:
        return ""
    about = [VERSION, backbone.arch, backbone.arch_args, vars(backbone.input), vars(view), precision]
    digest = hashlib.blake2b(json.dumps(about, default=str, sort_keys=True).encode(), digest_size=20)
    for name, tensor in backbone.net.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    digest.update(contents)
    return digest.hexdigest()


def _content(images: Images, index: int) -> bytes:
    """A hash of an image's bytes; of why it cannot be read, if it cannot."""
    try:
        return hashlib.blake2b(images.read(index), digest_size=SUM).digest()
    except Exception as error:  # reported when the image is read for its features
        return hashlib.blake2b(repr(error).encode(), digest_size=SUM, person=b"unreadable").digest()


def read(key: str, widths: Mapping[str, int], count: int) -> Entry | None:
    """The features (`count`, F) of layers, and the unreadable images; None if any is missing or damaged.

    Args:
        key: of the network and the images.
        widths: layer to F.
        count: of the images.
    """
    found: dict[str, np.ndarray] = {}
    unreadable: dict[int, str] = {}
    for layer, width in widths.items():
        path = _path(key, layer)
        try:
            if path is None or not is_ours(path.lstat()):
                return None
            with safe_open(path, framework="np") as file:
                found[layer] = file.get_tensor("features")
                about = file.metadata()
            unreadable = {int(i): str(why) for i, why in json.loads(about["unreadable"]).items()}
            whole = zlib.crc32(np.ascontiguousarray(found[layer]).data) == int(about["crc32"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
            return None
        if not whole or found[layer].shape != (count, width) or found[layer].dtype != np.float32:
            return None
        if any(not 0 <= index < count for index in unreadable):
            return None
        with suppress(OSError):
            os.utime(path)
    return found, unreadable


def write(key: str, layers: Mapping[str, Tensor], unreadable: Mapping[int, str]) -> None:
    """Keep features; do nothing where they cannot be written or would not fit."""
    if sum(tensor.nbytes for tensor in layers.values()) > cache_limit():
        return
    for layer, tensor in layers.items():
        path = _path(key, layer)
        if path is None:
            return
        with suppress(OSError), atomic_file(path) as unfinished:  # the cache only saves time
            about = {
                "unreadable": json.dumps(dict(unreadable)),
                "crc32": str(zlib.crc32(tensor.contiguous().numpy().data)),
            }
            save_file({"features": tensor.contiguous()}, unfinished, about)
            unfinished.chmod(0o600)
        with suppress(OSError):
            make_room(path.parent, keep=path)


def _path(key: str, layer: str) -> Path | None:
    folder = cache_folder("features")
    if not key or folder is None:
        return None
    return folder / f"{key}-{hashlib.blake2b(layer.encode(), digest_size=6).hexdigest()}.safetensors"
