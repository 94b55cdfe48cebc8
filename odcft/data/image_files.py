"""Read image files whole; never a pipe, a device or a socket that happens to have an image's name."""

import os
import stat

from odcft.errors import OdcftError

MAX_BYTES = 1 << 31  # of a file; no image that odcft decodes needs more


def read_file(path: str) -> bytes:
    """Return the content of a file.

    Raises:
        OdcftError: the path is not a regular file, or the file is larger than MAX_BYTES.
        OSError: it cannot be opened or read.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OdcftError(f"a {special_kind(status.st_mode)}, not a file")
    if status.st_size > MAX_BYTES:
        raise OdcftError(f"{status.st_size:,} bytes are more than the {MAX_BYTES:,} that odcft reads")
    with open(path, "rb") as file:
        return file.read(status.st_size + 1)  # not MAX_BYTES: Python reserves what it is asked for


def special_kind(mode: int) -> str:
    """Return "folder", "pipe", "socket" or "device" for the mode of such a path; "" for a regular file."""
    if stat.S_ISREG(mode):
        return ""
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")
