"""One image file as RGB pixels of 8 bits: the right way up, on white where it is transparent, its own values scaled.

Pillow decodes. What it would get wrong without a word is put right here, or refused by name.
"""

import logging
import os
import stat
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from odcft.errors import OdcftError

# Not all that Pillow knows: for some formats it starts other programs (PostScript), and some take any bytes for theirs.
FORMATS = ("JPEG", "MPO", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")
WHITE = 255  # what stands behind transparent pixels: what most viewers and printed pages show

# Tags of TIFF 6.0
_WIDTH, _BITS, _PHOTOMETRIC, _SAMPLES, _PLANAR, _EXTRA, _SAMPLE_FORMAT = 256, 258, 262, 277, 284, 338, 339
_TURNS = {  # EXIF's orientation to what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow keeps the upper byte of colours of 16 bits. Told that the bytes come the other way round, it keeps the lower.
_NATIVE = "L" if sys.byteorder == "little" else "B"
_OTHER_BYTE = {
    f"{bands};16{order}": f"{bands};16{'L' if (_NATIVE if order == 'N' else order) == 'B' else 'B'}"
    for bands in ("RGB", "RGBA", "RGBX")
    for order in "LBN"
}

logging.getLogger("PIL").addHandler(logging.NullHandler())  # it would speak on stderr of files that are told of anyway


@dataclass
class Deep:
    """The values of an image with more than 8 bits a channel (or signed ones), as they are in the file.

    Attributes:
        values: (H, W) or (H, W, 3), of any type.
        full: the least and the largest of their type.
        kind: the type in words: "16 bits".
        opaque: (H, W) in 0..1, where the image has transparency.
        inverted: whether the least value is white.
    """

    values: np.ndarray
    full: tuple[float, float]
    kind: str
    opaque: np.ndarray | None = None
    inverted: bool = False


def read_image(path: str, intensity: tuple[float, float] | None = None) -> Image.Image:
    """One image (of an animation or a stack the first) as RGB.

    Args:
        path: the file.
        intensity: of images with more than 8 bits a channel, the values that become black and white; None for the least
            and the largest of their type (of floating point: 0 and 1).

    Raises:
        OdcftError: it is no regular file, or an image of a kind that is not read; says which.
        OSError, ValueError, SyntaxError and others of PIL's, for a file that is no complete image.
    """
    with _opened(path) as image:
        deep = _deep(image, path)
        shown = _flat(image) if deep is None else _scaled(deep, intensity)
        turn = _TURNS.get(_orientation(image))
    return shown if turn is None else shown.transpose(turn)


def read_deep(path: str) -> Deep | None:
    """The values of an image with more than 8 bits a channel; None for any other, which is not decoded."""
    with _opened(path) as image:
        return _deep(image, path)


def image_size(path: str) -> tuple[int, int]:
    """Width and height, as they are in the file; it is not decoded."""
    with _opened(path) as image:
        return image.size


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise OdcftError(f"a {special(mode)}, no file")
    # By its name Pillow would map the file into memory, and a TIFF that is to be turned with wrong lines (13.0).
    with warnings.catch_warnings(), open(path, "rb") as file:
        warnings.simplefilter("ignore")  # of damaged tags and palettes; what matters is raised
        try:
            image: Any = Image.open(file, formats=_formats())
        except UnidentifiedImageError:
            if words := _tiff_in_words(path):
                raise OdcftError(words) from None
            raise OdcftError("not an image of a format that is read") from None
        with image, _hushed() if image.tile and image.tile[0][0] == "libtiff" else nullcontext():
            width, height = image.size
            if width * height > (Image.MAX_IMAGE_PIXELS or width * height):
                raise OdcftError(f"{width:,} x {height:,} pixels are more than Pillow's {Image.MAX_IMAGE_PIXELS:,}")
            if image.format == "TIFF":
                _refuse_other_bands(image.tag_v2)
            yield image


@contextmanager
def _hushed() -> Iterator[None]:
    """Within, nothing comes out on stderr: libtiff writes there, past Python, what Pillow raises as an error too."""
    with suppress(OSError):  # where there is no stderr
        sys.stderr.flush()
    try:
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:
        yield
        return
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _formats() -> list[str]:
    if any(name not in Image.OPEN for name in FORMATS):
        Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # AVIF came with Pillow 11.3


def special(mode: int) -> str:
    """What a file is that is no regular one, by its mode; "" for a regular one."""
    if stat.S_ISREG(mode):
        return ""
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")


def _orientation(image: Any) -> int:
    """EXIF's, of a decoded image (a PNG may tell it at its end; a TIFF is upright by then); 1 where it is damaged."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # of many kinds; the pixels are there
        return 1


# ---------------------------------------------------------------- 8 bits a channel


def _flat(image: Any) -> Image.Image:
    """An image of 8 bits a channel as RGB."""
    if not _has_alpha(image):
        return image.convert("RGB")
    image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    page = Image.new("RGB", image.size, (WHITE, WHITE, WHITE))
    page.paste(image, mask=image.getchannel("A"))
    return page


def _has_alpha(image: Any) -> bool:
    if image.format == "TIFF" and image.mode == "RGBA":
        return bool(image.tag_v2.get(_EXTRA))  # or it is a fourth band of no stated meaning: near infrared, say
    return image.mode in ("La", "LA", "PA", "RGBA") or "transparency" in image.info


# ---------------------------------------------------------------- more than 8 bits a channel


def _deep(image: Any, path: str) -> Deep | None:
    """The values of an opened image; None for one of 8 unsigned bits a channel, which is not decoded."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    bits, kind = max(tags.get(_BITS, (16,))), max(tags.get(_SAMPLE_FORMAT, (1,)))
    raw = _raw(image)
    if raw == "LA;16B":  # gray and alpha of a PNG: Pillow has a place for four bytes, and no name for them
        bytes_HW4 = _decoded(image, "RGBA").astype(np.uint16)
        values, alpha = bytes_HW4[..., ::2].transpose(2, 0, 1) << 8 | bytes_HW4[..., 1::2].transpose(2, 0, 1)
        return Deep(values, (0, 65535), "16 bits", alpha / np.float32(65535))
    if raw in _OTHER_BYTE:
        with _opened(path) as again:
            lower = _decoded(again, _OTHER_BYTE[raw])
        values = np.asarray(image).astype(np.uint16) << 8 | lower
        opaque: Any = values[..., 3] / np.float32(65535) if image.mode == "RGBA" and _has_alpha(image) else None
        if (key := image.info.get("transparency")) is not None:
            opaque = (values[..., :3] != np.array(key)).any(2).astype(np.float32)
        return Deep(values[..., :3], (0, 65535), "16 bits", opaque)
    inverted = tags.get(_PHOTOMETRIC, 1) == 0
    if image.mode == "L" and kind == 2:
        return Deep(np.asarray(image).view(np.int8), (-128, 127), "8 signed bits", None, inverted)
    if image.mode == "F":
        return Deep(np.asarray(image), (0, 1), "floating point", None, inverted)
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if bits == 32 and kind == 1:
            values = values.view(np.uint32)
        full = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if kind == 2 else (0.0, 2.0**bits - 1)
        key = image.info.get("transparency")
        opaque = None if key is None else (values != key).astype(np.float32)
        return Deep(values, full, f"{bits} {'signed ' if kind == 2 else ''}bits", opaque, inverted)
    return None


def _raw(image: Any) -> str:
    """How Pillow is going to take the bytes of the file."""
    arguments = image.tile[0][3] if image.tile else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _decoded(image: Any, raw: str) -> np.ndarray:
    """The pixels of an image that has just been opened, its bytes taken another way than Pillow would."""
    name, box, offset, arguments = image.tile[0]
    tile = (name, box, offset, raw if isinstance(arguments, str) else (raw, *arguments[1:]))
    image.tile = [type(image.tile[0])(*tile) if type(image.tile[0]) is not tuple else tile, *image.tile[1:]]
    return np.asarray(image)


def _scaled(deep: Deep, intensity: tuple[float, float] | None) -> Image.Image:
    """As RGB: values from black to white in 255 steps, those beyond clipped, what is no number black."""
    low, high = intensity or deep.full

    def scaled(values: np.ndarray) -> np.ndarray:
        exact = values.astype(np.float32 if values.dtype.kind == "f" else np.float64)
        steps = np.clip((exact - low) * (255 / (high - low)), 0, 255)
        return np.nan_to_num(255 - steps if deep.inverted else steps).round().astype(np.uint8)

    values = deep.values
    if values.dtype.kind == "u" and values.dtype.itemsize == 2 and values.size > 65536:
        shown = scaled(np.arange(65536))[values]  # the same, and many times faster
    else:
        shown = scaled(values)
    if deep.opaque is not None:
        opaque = deep.opaque if shown.ndim == 2 else deep.opaque[..., None]
        shown = (WHITE + (shown - np.float32(WHITE)) * opaque).round().astype(np.uint8)
    return Image.fromarray(shown).convert("RGB")


# ---------------------------------------------------------------- what is not read


def _refuse_other_bands(tags: Any) -> None:
    """Refuse a TIFF of which Pillow would leave bands out, or take them for others."""
    bands, apart = tags.get(_SAMPLES, 1), tags.get(_PLANAR, 1) == 2 and max(tags.get(_BITS, (1,))) > 8
    if bands > 4 or (bands == 2 and not {1, 2} & set(tags.get(_EXTRA, ()))) or (bands > 1 and apart):
        raise OdcftError(_in_words(tags))


def _tiff_in_words(path: str) -> str:
    """What kind of TIFF this is and what odcft reads; "" for anything else."""
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            if start[:2] not in (b"II", b"MM"):
                return ""
            tags = TiffImagePlugin.ImageFileDirectory_v2(start + (file.read(8) if 43 in start[2:4] else b""))
            file.seek(tags.next)
            tags.load(file)
        return _in_words(tags) if _WIDTH in tags else ""
    except Exception:  # damaged, or something else
        return ""


def _in_words(tags: Any) -> str:
    bands, bits = tags.get(_SAMPLES, 1), "/".join(map(str, dict.fromkeys(tags.get(_BITS, (1,)))))
    kind = {1: "bits", 2: "signed bits", 3: "bits (floating point)"}.get(max(tags.get(_SAMPLE_FORMAT, (1,))), "bits")
    words = f"a TIFF of {bands} band{'s' if bands > 1 else ''} of {bits} {kind}"
    if bands > 1:
        colours = {2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "Lab"}.get(tags.get(_PHOTOMETRIC), "gray")
        order = ", one after the other" if tags.get(_PLANAR, 1) == 2 else ""
        words += f" ({colours} and {len(tags.get(_EXTRA, ()))} besides{order})"
    return f"{words}; odcft reads 1 (gray, up to 32 bits), 2 (gray, alpha), 3 (RGB) or 4 (RGB, alpha; CMYK)"
