"""Refuse small files that would take much memory or time to decode, before any of it is spent."""

import re
from collections.abc import Iterator

from PIL import Image

from odcft.errors import OdcftError

MAX_BYTES = 1 << 30  # of decoded values: 89 million pixels of 16-bit RGB take half of it
MAX_SCANS = 200  # of one JPEG; each goes over all pixels, and a damaged or hostile file may have a million
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # the end of a scan's data: neither a stuffed zero nor a restart


def refuse_large(width: int, height: int, bands: int = 1, bytes_per_value: int = 1) -> None:
    """Refuse an image with more pixels than Pillow allows, or with more bytes of values than MAX_BYTES.

    Raises:
        OdcftError: says which.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise OdcftError(f"{width:,} x {height:,} pixels are more than Pillow's {limit:,}")
    if (size := width * height * bands * bytes_per_value) > MAX_BYTES:
        raise OdcftError(
            f"{width:,} x {height:,} pixels of {bands:,} band{'s' if bands > 1 else ''} would take {size:,} bytes, "
            f"more than {MAX_BYTES:,}"
        )


def refuse_bombs(data: bytes) -> None:
    """Refuse a WebP that is too large (Pillow allocates its canvas when it opens it), and a JPEG of very many scans.

    Raises:
        OdcftError: says which.
    """
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        refuse_large(*_size_of_webp(data))
    elif data[:2] == b"\xff\xd8" and data.count(b"\xff\xda") > MAX_SCANS:  # quick; may also count other bytes
        scans = 0
        for scans, _ in enumerate(_scans_of_jpeg(data), 1):
            if scans > MAX_SCANS:
                raise OdcftError(f"a JPEG of more than {MAX_SCANS} scans, which would take very long to decode")


def _size_of_webp(data: bytes) -> tuple[int, int]:
    """Width and height according to the first chunk of a WebP; 0, 0 for a damaged one."""
    kind, body = data[12:16], data[20:30]
    if len(body) < 10:
        return 0, 0
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF


def _scans_of_jpeg(data: bytes) -> Iterator[int]:
    """The positions where the scans of the first image of a JPEG file start."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xD9:  # end of image
            return
        if marker in (0xFF, 0x01, 0xD8):  # padding, or a marker without a length
            position += 1 if marker == 0xFF else 2
            continue
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xDA:
            yield position
            following = _MARKER.search(data, position)
            if following is None:
                return
            position = following.start()
