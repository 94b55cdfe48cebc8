"""Features that were extracted before, on disk, so that a second protocol and `before` cost nothing.

An entry is one layer of one network for one set of images. Its name is a hash of everything the features depend on:
the weights, the bytes of the images, how they are resized and cropped, the precision and the version of this format.

The environment decides where the entries are:
    ODCFT_CACHE: the folder to use instead of XDG_CACHE_HOME/odcft (~/.cache/odcft); "off" to do without.
    ODCFT_CACHE_GB: the size that the features together may have; those not used for longest are removed. 4 by default.
"""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from odcft.backbone.network import Backbone
from odcft.data.images import Images
from odcft.data.view import View
from odcft.files import atomic_file, save_file

VERSION = 1
Entry = tuple[dict[str, np.ndarray], dict[int, str]]  # layers and unreadable images


def key(backbone: Backbone, images: Images, view: View, precision: str) -> str:
    """What the features of all layers depend on, as a hash; "" if there is no cache."""
    if _folder() is None:
        return ""
    reader = None if images.reader is None else images.reader.name
    about = [VERSION, backbone.arch, backbone.arch_args, vars(backbone.input), vars(view), precision, reader]
    digest = hashlib.blake2b(json.dumps(about, default=str, sort_keys=True).encode(), digest_size=20)
    for name, tensor in backbone.net.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    for index in range(len(images)):
        digest.update(_content(images, index))
    return digest.hexdigest()


def _content(images: Images, index: int) -> bytes:
    """A hash of an image's bytes; of why it cannot be read, if it cannot."""
    try:
        return hashlib.blake2b(images.read(index), digest_size=20).digest()
    except Exception as error:  # reported when the image is read for its features
        return hashlib.blake2b(repr(error).encode(), digest_size=20, person=b"unreadable").digest()


def read(key: str, layers: list[str], count: int) -> Entry | None:
    """The features (`count`, F) of these layers, and the unreadable images; None if any is missing or damaged."""
    found: dict[str, np.ndarray] = {}
    unreadable: dict[int, str] = {}
    for layer in layers:
        path = _path(key, layer)
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, framework="np") as file:
                found[layer] = file.get_tensor("features")
                unreadable = {int(i): str(why) for i, why in json.loads(file.metadata()["unreadable"]).items()}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError):
            return None
        features = found[layer]
        if features.ndim != 2 or len(features) != count or features.dtype != np.float32:
            return None
        if any(not 0 <= index < count for index in unreadable):
            return None
        with suppress(OSError):
            os.utime(path)
    return found, unreadable


def write(key: str, layers: Mapping[str, Tensor], unreadable: Mapping[int, str]) -> None:
    """Keep features; do nothing where they cannot be written or would not fit."""
    if sum(tensor.nbytes for tensor in layers.values()) > _limit():
        return
    for layer, tensor in layers.items():
        path = _path(key, layer)
        if path is None:
            return
        with suppress(OSError), atomic_file(path) as unfinished:  # the cache only saves time
            save_file({"features": tensor.contiguous()}, unfinished, {"unreadable": json.dumps(dict(unreadable))})
            unfinished.chmod(0o600)
    _evict()


def _path(key: str, layer: str) -> Path | None:
    folder = _folder()
    if not key or folder is None:
        return None
    return folder / f"{key}-{hashlib.blake2b(layer.encode(), digest_size=6).hexdigest()}.safetensors"


def _folder() -> Path | None:
    """The folder of the entries, which nobody else can write to; None if there is none and none can be made."""
    place = os.environ.get("ODCFT_CACHE")
    if place is not None and place.strip().lower() in ("", "0", "no", "off"):
        return None
    try:
        if place is None:
            base = os.environ.get("XDG_CACHE_HOME", "")
            place = os.path.join(base if os.path.isabs(base) else os.path.expanduser("~/.cache"), "odcft")
        folder = Path(os.path.abspath(place)) / "features"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except (OSError, ValueError):
        return None
    mine = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
    return folder if stat.S_ISDIR(status.st_mode) and mine and not status.st_mode & 0o022 else None


def _limit() -> float:
    try:
        return float(os.environ.get("ODCFT_CACHE_GB", "4")) * 1e9
    except ValueError:
        return 4e9


def _evict() -> None:
    """Remove the entries that were not used for longest, until the others keep the limit."""
    folder = _folder()
    if folder is None:
        return
    with suppress(OSError):
        entries = sorted((path.stat().st_mtime_ns, path.stat().st_size, path) for path in folder.glob("*.safetensors"))
        left = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if left <= _limit():
                break
            path.unlink()
            left -= size
