"""Decode image files with Pillow. What it would silently get wrong is corrected here, or left to another module."""

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from odcft.data.decompression_bombs import refuse_large
from odcft.data.high_depth import WHITE, HighDepthImage
from odcft.errors import OdcftError

# Not all that Pillow can read: some formats start other programs (PostScript), and some accept any bytes.
AVIF_BRANDS = (b"avif", b"avis")
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs")
EITHER_BRANDS = (b"mif1", b"msf1")  # AVIF if that is among the compatible brands, which follow
FORMATS = ("JPEG", "MPO", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")

# Tags of TIFF 6.0
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_BITS, _PHOTOMETRIC, _SAMPLES, _PLANAR, _EXTRA, _SAMPLE_FORMAT = 258, 262, 277, 284, 338, 339
# Of 16-bit RGB, Pillow keeps only the upper byte of each value. With the byte order swapped, it keeps the lower byte.
_NATIVE = "L" if sys.byteorder == "little" else "B"
_SWAPPED_RAW_MODE = {
    f"{bands};16{order}": f"{bands};16{'L' if (_NATIVE if order == 'N' else order) == 'B' else 'B'}"
    for bands in ("RGB", "RGBA", "RGBX")
    for order in "LBN"
}

logging.getLogger("PIL").addHandler(logging.NullHandler())  # unreadable files are reported anyway, not also on stderr


@contextmanager
def open_image(data: bytes) -> Iterator[Any]:
    """Open an image with Pillow, silently; yield None for a TIFF that Pillow would not read in full.

    Raises:
        OdcftError: it is not an image of a format that odcft reads, or it is too large.
        OSError, ValueError, SyntaxError and others: raised by Pillow for a damaged file.
    """
    with warnings.catch_warnings(), io.BytesIO(data) as file:
        warnings.simplefilter("ignore")  # about damaged tags and palettes; real errors are raised
        try:
            image: Any = Image.open(file, formats=_formats_for(data))
        except (UnidentifiedImageError, KeyError):  # KeyError: a compression that Pillow does not know
            if not is_tiff(data):
                raise OdcftError("not an image of a format that odcft reads") from None
            image = None
        except Image.DecompressionBombError:  # Pillow looks at the size first, and names only the product
            raise OdcftError(f"more than twice Pillow's {Image.MAX_IMAGE_PIXELS:,} pixels") from None
        if image is None:
            yield None
            return
        with image, _stderr_silenced() if image.tile and image.tile[0][0] == "libtiff" else nullcontext():
            refuse_large(*image.size)
            if image.format == "TIFF":
                refuse_large(image.tag_v2.get(_TILE_WIDTH, 0), image.tag_v2.get(_TILE_LENGTH, 0))
            yield None if image.format == "TIFF" and _has_unsupported_bands(image.tag_v2) else image


def is_tiff(data: bytes) -> bool:
    """Whether a file begins as a TIFF or a BigTIFF does."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@contextmanager
def _stderr_silenced() -> Iterator[None]:
    """Send stderr to /dev/null: libtiff bypasses Python and writes there what Pillow raises as an error anyway."""
    with suppress(OSError):  # there may be no stderr
        sys.stderr.flush()
    try:
        stderr, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:
        yield
        return
    try:
        os.dup2(devnull, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)


def _formats_for(data: bytes) -> list[str]:
    """The formats that Pillow may try, as far as it has them."""
    if any(name not in Image.OPEN for name in FORMATS):
        Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]  # AVIF came with Pillow 11.3
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    if brand in EITHER_BRANDS:
        brand = AVIF_BRANDS[0] if any(avif in data[16:64] for avif in AVIF_BRANDS) else HEIC_BRANDS[0]
    if brand in AVIF_BRANDS and "AVIF" not in formats:
        raise OdcftError("an AVIF image, which Pillow reads from version 11.3 on")
    if brand in HEIC_BRANDS:
        try:
            import pillow_heif
        except ImportError:
            raise OdcftError('a HEIC image: install the package that reads them, pip install "odcft[heic]"') from None
        pillow_heif.register_heif_opener(thumbnails=False, decode_threads=1)  # data workers decode in parallel
        return ["HEIF"]
    return formats


def orientation(image: Any) -> int:
    """Return the EXIF orientation of a decoded image; 1 (upright) if EXIF is missing or damaged.

    Decode first: a PNG may store EXIF after the pixels, and Pillow makes a TIFF upright while decoding.
    """
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # of many types; the pixels are fine
        return 1


# ---------------------------------------------------------------- 8 bits a channel


def to_rgb(image: Any) -> Image.Image:
    """Convert an image with 8 bits a channel to RGB, on white if it is transparent."""
    if not _has_alpha(image):
        return image.convert("RGB")
    image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    background = Image.new("RGB", image.size, (WHITE, WHITE, WHITE))
    background.paste(image, mask=image.getchannel("A"))
    return background


def _has_alpha(image: Any) -> bool:
    if image.format == "TIFF" and image.mode == "RGBA":
        return bool(image.tag_v2.get(_EXTRA))  # else the fourth band may be anything, e.g. near infrared
    return image.mode in ("La", "LA", "PA", "RGBA") or "transparency" in image.info


# ---------------------------------------------------------------- more than 8 bits a channel


def high_depth(image: Any, data: bytes) -> HighDepthImage | None:
    """Decode an opened image with more than 8 bits a channel; return None for any other, without decoding it."""
    raw_mode = _raw_mode(image)
    if raw_mode == "LA;16B":
        return _gray_and_alpha(image)
    if raw_mode in _SWAPPED_RAW_MODE:
        return _rgb(image, data, raw_mode)
    return _gray(image)


def _gray_and_alpha(image: Any) -> HighDepthImage:
    """Decode a 16-bit PNG of gray and alpha. Pillow has no mode for it, so its four bytes are read as RGBA."""
    bytes_HW4 = _decode_as(image, "RGBA").astype(np.uint16)
    values, alpha = bytes_HW4[..., ::2].transpose(2, 0, 1) << 8 | bytes_HW4[..., 1::2].transpose(2, 0, 1)
    return HighDepthImage(values, (0, 65535), "16 bits", alpha / np.float32(65535))


def _rgb(image: Any, data: bytes, raw_mode: str) -> HighDepthImage:
    """Decode 16-bit RGB, with or without alpha, in two passes: one for the upper bytes, one for the lower."""
    with open_image(data) as again:
        lower = _decode_as(again, _SWAPPED_RAW_MODE[raw_mode])
    values = np.asarray(image).astype(np.uint16) << 8 | lower
    alpha: Any = values[..., 3] / np.float32(65535) if image.mode == "RGBA" and _has_alpha(image) else None
    if (key := image.info.get("transparency")) is not None:
        alpha = (values[..., :3] != np.array(key)).any(2).astype(np.float32)
    return HighDepthImage(values[..., :3], (0, 65535), "16 bits", alpha)


def _gray(image: Any) -> HighDepthImage | None:
    """Decode a gray image of signed bytes, 16 or 32 bits or floating point; return None for any other."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    bits, sample_format = max(tags.get(_BITS, (16,))), max(tags.get(_SAMPLE_FORMAT, (1,)))
    inverted = tags.get(_PHOTOMETRIC, 1) == 0
    if image.mode == "L" and sample_format == 2:
        return HighDepthImage(np.asarray(image).view(np.int8), (-128, 127), "8 signed bits", None, inverted)
    if image.mode == "F":
        return HighDepthImage(np.asarray(image), (0, 1), "floating point", None, inverted)
    if image.mode == "I" or image.mode.startswith("I;16"):
        values, signed = np.asarray(image), sample_format == 2
        if bits == 32 and sample_format == 1:
            values = values.view(np.uint32)
        limits = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if signed else (0.0, 2.0**bits - 1)
        key = image.info.get("transparency")
        alpha = None if key is None else (values != key).astype(np.float32)
        return HighDepthImage(values, limits, f"{bits} {'signed ' if signed else ''}bits", alpha, inverted)
    return None


def _raw_mode(image: Any) -> str:
    """Return Pillow's raw mode: how it will interpret the bytes of the file."""
    arguments = image.tile[0][3] if image.tile else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _decode_as(image: Any, raw_mode: str) -> np.ndarray:
    """Decode an image that has just been opened, its bytes interpreted in another raw mode than Pillow's choice."""
    name, box, offset, arguments = image.tile[0]
    tile = (name, box, offset, raw_mode if isinstance(arguments, str) else (raw_mode, *arguments[1:]))
    image.tile = [type(image.tile[0])(*tile) if type(image.tile[0]) is not tuple else tile, *image.tile[1:]]
    return np.asarray(image)


def _has_unsupported_bands(tags: Any) -> bool:
    """Whether Pillow would drop bands of a TIFF or confuse them."""
    bands = tags.get(_SAMPLES, 1)
    deep_planes = tags.get(_PLANAR, 1) == 2 and max(tags.get(_BITS, (1,))) > 8
    return bands > 4 or (bands == 2 and not {1, 2} & set(tags.get(_EXTRA, ()))) or (bands > 1 and deep_planes)
