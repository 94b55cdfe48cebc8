"""Which files are images, and reading them whole; never a pipe, a device or a socket with an image's name."""

import importlib.util
import os
import stat

from odcft.errors import OdcftError

# Endings of the images that some package reads, which need not be installed: the package, and what installs it.
OPTIONAL = {
    **dict.fromkeys((".heic", ".heif", ".hif"), ("pillow_heif", "odcft[heic]")),
    **dict.fromkeys((".dcm", ".dicom"), ("pydicom", "odcft[dicom]")),
    ".avif": ("PIL._avif", "pillow>=11.3"),
}
MISSING = {ending: extra for ending, (package, extra) in OPTIONAL.items() if importlib.util.find_spec(package) is None}
ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".mpo"),
    *(ending for ending in OPTIONAL if ending not in MISSING),
)

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
        return file.read(MAX_BYTES)


def special_kind(mode: int) -> str:
    """Return "folder", "pipe", "socket" or "device" for the mode of such a path; "" for a regular file."""
    if stat.S_ISREG(mode):
        return ""
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")


def skipped_ending(name: str) -> str:
    """How a file that is not read is counted: ".xml", or, where a package would read it, what installs that."""
    ending = os.path.splitext(name)[1].lower()
    if ending in MISSING:
        return f'{ending} (pip install "{MISSING[ending]}" reads them)'
    return ending or "file without an extension"
