"""Decode an image file to 8-bit RGB: upright, on a white background, with higher bit depths scaled to 8 bits.

Pillow decodes. What it would silently get wrong is corrected here, or refused with the reason.
"""

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from odcft.errors import OdcftError

# Not all that Pillow can read: some formats start other programs (PostScript), and some accept any bytes.
FORMATS = ("JPEG", "MPO", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")
WHITE = 255  # background of transparent pixels, as in most viewers and on paper

# Tags of TIFF 6.0
_WIDTH, _BITS, _PHOTOMETRIC, _SAMPLES, _PLANAR, _EXTRA, _SAMPLE_FORMAT = 256, 258, 262, 277, 284, 338, 339
_UNDO_ORIENTATION = {  # EXIF orientation to the transpose that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Of 16-bit RGB, Pillow keeps only the upper byte of each value. With the byte order swapped, it keeps the lower byte.
_NATIVE = "L" if sys.byteorder == "little" else "B"
_SWAPPED_RAW_MODE = {
    f"{bands};16{order}": f"{bands};16{'L' if (_NATIVE if order == 'N' else order) == 'B' else 'B'}"
    for bands in ("RGB", "RGBA", "RGBX")
    for order in "LBN"
}

logging.getLogger("PIL").addHandler(logging.NullHandler())  # unreadable files are reported anyway, not also on stderr


@dataclass
class HighDepthImage:
    """The values of an image with more than 8 bits a channel (or signed bytes), as they are in the file.

    Attributes:
        values: (H, W) or (H, W, 3), of any type.
        limits: the smallest and largest value of the type; 0 and 1 for floating point.
        kind: the type, for messages: "16 bits".
        alpha: opacity (H, W) in 0..1, if the image has transparency.
        inverted: whether the smallest value is white.
    """

    values: np.ndarray
    limits: tuple[float, float]
    kind: str
    alpha: np.ndarray | None = None
    inverted: bool = False


def read_image(data: bytes, intensity: tuple[float, float] | None = None) -> Image.Image:
    """Read an image (the first frame of an animation or a stack) as RGB.

    Args:
        data: the content of the file.
        intensity: for images with more than 8 bits a channel, the values that become black and white; None for the
            smallest and largest value of their type (for floating point, 0 and 1).

    Raises:
        OdcftError: the image is of a kind that odcft does not read; says which.
        OSError, ValueError, SyntaxError and others: raised by Pillow for a file that is not a complete image.
    """
    with _open(data) as image:
        high_depth = _high_depth(image, data)
        rgb = _to_rgb(image) if high_depth is None else _scale_to_8_bits(high_depth, intensity)
        transpose = _UNDO_ORIENTATION.get(_orientation(image))
    return rgb if transpose is None else rgb.transpose(transpose)


def read_high_depth(data: bytes) -> HighDepthImage | None:
    """Read the values of an image with more than 8 bits a channel; return None for any other, without decoding it."""
    with _open(data) as image:
        return _high_depth(image, data)


def image_size(data: bytes) -> tuple[int, int]:
    """Return width and height as stored in the file, without decoding it."""
    with _open(data) as image:
        return image.size


@contextmanager
def _open(data: bytes) -> Iterator[Any]:
    """Open an image with Pillow, silently; refuse what odcft does not read."""
    with warnings.catch_warnings(), io.BytesIO(data) as file:
        warnings.simplefilter("ignore")  # about damaged tags and palettes; real errors are raised
        try:
            image: Any = Image.open(file, formats=_available_formats())
        except UnidentifiedImageError:
            if description := _describe_tiff_file(data):
                raise OdcftError(description) from None
            raise OdcftError("not an image of a format that odcft reads") from None
        with image, _stderr_silenced() if image.tile and image.tile[0][0] == "libtiff" else nullcontext():
            width, height = image.size
            if width * height > (Image.MAX_IMAGE_PIXELS or width * height):
                raise OdcftError(f"{width:,} x {height:,} pixels are more than Pillow's {Image.MAX_IMAGE_PIXELS:,}")
            if image.format == "TIFF":
                _refuse_unsupported_bands(image.tag_v2)
            yield image


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


def _available_formats() -> list[str]:
    if any(name not in Image.OPEN for name in FORMATS):
        Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # AVIF came with Pillow 11.3


def _orientation(image: Any) -> int:
    """Return the EXIF orientation of a decoded image; 1 (upright) if EXIF is missing or damaged.

    Decode first: a PNG may store EXIF after the pixels, and Pillow makes a TIFF upright while decoding.
    """
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # of many types; the pixels are fine
        return 1


# ---------------------------------------------------------------- 8 bits a channel


def _to_rgb(image: Any) -> Image.Image:
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


def _high_depth(image: Any, data: bytes) -> HighDepthImage | None:
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
    with _open(data) as again:
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


def _scale_to_8_bits(image: HighDepthImage, intensity: tuple[float, float] | None) -> Image.Image:
    """Scale values linearly to 8-bit RGB; values beyond black and white are clipped, NaN becomes black."""
    low, high = intensity or image.limits

    def scaled(values: np.ndarray) -> np.ndarray:
        exact = values.astype(np.float32 if values.dtype.kind == "f" else np.float64)
        steps = np.clip((exact - low) * (255 / (high - low)), 0, 255)
        return np.nan_to_num(255 - steps if image.inverted else steps).round().astype(np.uint8)

    values = image.values
    if values.dtype.kind == "u" and values.dtype.itemsize == 2 and values.size > 65536:
        pixels = scaled(np.arange(65536))[values]  # a lookup table: the same result, many times faster
    else:
        pixels = scaled(values)
    if image.alpha is not None:
        alpha = image.alpha if pixels.ndim == 2 else image.alpha[..., None]
        pixels = (WHITE + (pixels - np.float32(WHITE)) * alpha).round().astype(np.uint8)
    return Image.fromarray(pixels).convert("RGB")


# ---------------------------------------------------------------- what odcft refuses


def _refuse_unsupported_bands(tags: Any) -> None:
    """Refuse a TIFF of which Pillow would drop bands or confuse them."""
    bands = tags.get(_SAMPLES, 1)
    deep_planes = tags.get(_PLANAR, 1) == 2 and max(tags.get(_BITS, (1,))) > 8
    if bands > 4 or (bands == 2 and not {1, 2} & set(tags.get(_EXTRA, ()))) or (bands > 1 and deep_planes):
        raise OdcftError(_describe_tiff(tags))


def _describe_tiff_file(data: bytes) -> str:
    """Describe a TIFF that Pillow does not recognise; "" for any other file."""
    try:
        if data[:2] not in (b"II", b"MM"):
            return ""
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if 43 in data[2:4] else 8])
        with io.BytesIO(data) as file:
            file.seek(tags.next)
            tags.load(file)
        return _describe_tiff(tags) if _WIDTH in tags else ""
    except Exception:  # damaged, or not a TIFF
        return ""


def _describe_tiff(tags: Any) -> str:
    """Say what kind of TIFF this is, and which kinds odcft reads."""
    bands, bits = tags.get(_SAMPLES, 1), "/".join(map(str, dict.fromkeys(tags.get(_BITS, (1,)))))
    kind = {1: "bits", 2: "signed bits", 3: "bits (floating point)"}.get(max(tags.get(_SAMPLE_FORMAT, (1,))), "bits")
    description = f"a TIFF of {bands} band{'s' if bands > 1 else ''} of {bits} {kind}"
    if bands > 1:
        colours = {2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "Lab"}.get(tags.get(_PHOTOMETRIC), "gray")
        layout = ", in separate planes" if tags.get(_PLANAR, 1) == 2 else ""
        description += f" ({colours} plus {len(tags.get(_EXTRA, ()))} more{layout})"
    read = "1 band (gray, up to 32 bits), 2 (gray and alpha), 3 (RGB) or 4 (RGB and alpha, or CMYK)"
    return f"{description}; odcft reads {read}"
