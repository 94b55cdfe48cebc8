"""Read image files, whole or in part; never a pipe, a device or a socket that happens to have an image's name."""

import importlib.util
import os
import re
import stat
from functools import lru_cache
from typing import Any

from odcft.errors import OdcftError

# Endings of the images that some package reads, which need not be installed: the package, and what installs it.
OPTIONAL = {
    **dict.fromkeys((".heic", ".heif", ".hif"), ("pillow_heif", "odcft[heic]")),
    **dict.fromkeys((".dcm", ".dicom"), ("pydicom", "odcft[dicom]")),
    ".avif": ("PIL._avif", "pillow>=11.3"),
}
MISSING = {ending: extra for ending, (package, extra) in OPTIONAL.items() if importlib.util.find_spec(package) is None}
# What a folder is searched for. A file with another ending can still be named in a list.
ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".mpo"),
    *(ending for ending in OPTIONAL if ending not in MISSING),
)
MAX_BYTES = 1 << 31  # of a file; no image that odcft decodes needs more
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+(::[A-Za-z0-9+.\-]+)*://")


def is_url(path: str) -> bool:
    """Whether a path is for fsspec: `s3://…`, `memory://…`; not `C:\\…` or a file of this machine."""
    return _URL.match(path) is not None


def read_file(path: str) -> bytes:
    """Return the content of a file.

    Raises:
        OdcftError: the path is not a regular file, or the file is larger than MAX_BYTES.
        OSError: it cannot be opened or read.
    """
    if is_url(path):
        from odcft.data.stores import remote

        return remote.read_file(path, MAX_BYTES)
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OdcftError(f"a {special_kind(status.st_mode)}, not a file")
    if status.st_size > MAX_BYTES:
        raise OdcftError(f"{status.st_size:,} bytes are more than the {MAX_BYTES:,} that odcft reads")
    with open(path, "rb") as file:
        return file.read(status.st_size + 1)  # not MAX_BYTES: Python reserves what it is asked for


def read_range(path: str, offset: int, size: int) -> bytes:
    """Return `size` bytes of a file from an offset on. Local files stay open for the next call.

    Raises:
        OdcftError: there are fewer bytes, or more than odcft reads.
        OSError: it cannot be opened or read.
    """
    if size > MAX_BYTES:
        raise OdcftError(f"{size:,} bytes are more than the {MAX_BYTES:,} that odcft reads")
    if is_url(path):
        from odcft.data.stores import remote

        content = remote.read_range(path, offset, size)
    else:
        file = _kept_open(path)
        if hasattr(os, "pread"):  # leaves the position alone, which forked processes share
            content = os.pread(file.fileno(), size, offset)
            while 0 < len(content) < size and (
                more := os.pread(file.fileno(), size - len(content), offset + len(content))
            ):
                content += more
        else:
            file.seek(offset)
            content = file.read(size)
    if len(content) != size:
        raise OdcftError(f"{os.path.basename(path)} has become shorter")
    return content


def open_file(path: str) -> Any:
    """Open a file, here or behind a URL, for reading as bytes. Raises an OSError or an OdcftError."""
    if is_url(path):
        from odcft.data.stores import remote

        return remote.open_file(path)
    return open(path, "rb")


@lru_cache(maxsize=64)
def _kept_open(path: str) -> Any:
    return open(path, "rb", buffering=0)


def file_size(path: str) -> int:
    """The size of a regular file in bytes; -1 if there is none, or it cannot be told."""
    try:
        if is_url(path):
            from odcft.data.stores import remote

            return remote.file_size(path)
        status = os.stat(path)
    except (OSError, OdcftError):
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


def skipped_ending(name: str) -> str:
    """How a file that is not read is counted: ".xml", or, where a package would read it, what installs that."""
    ending = os.path.splitext(name)[1].lower()
    if ending in MISSING:
        return f'{ending} (pip install "{MISSING[ending]}" reads them)'
    return ending or "file without an extension"


def special_kind(mode: int) -> str:
    """Return "folder", "pipe", "socket" or "device" for the mode of such a path; "" for a regular file."""
    if stat.S_ISREG(mode):
        return ""
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")
