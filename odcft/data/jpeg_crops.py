"""Random crops of JPEG files by libjpeg-turbo (simplejpeg): decoded at a fraction of their size if they are large.

Training sees a crop of 224 pixels of a photograph of thousands. A JPEG at 1/2, 1/4 or 1/8 of its size costs far less to
decode than the whole, because the inverse transform of a block then yields fewer pixels. The scale is chosen from the
crop, which never has fewer pixels than the network sees. At full size, pixels are those that Pillow decodes.

Only training crops are made this way: features and evaluation see what Pillow decodes.
"""

import io
import random
import struct
import threading
import warnings
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from odcft.data.augmentation import draw_crop
from odcft.recipe import AugmentRecipe

# Divisors of the size at which libjpeg-turbo is fast; the largest is taken that leaves enough pixels.
SCALES = (8, 4, 2)
KEPT_BYTES = 1 << 24  # of the buffer that each thread keeps
_kept = threading.local()
_START = b"\xff\xd8\xff"
_SCAN, _APP1 = 0xDA, 0xE1  # markers: the pixels begin; EXIF or XMP
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # those with the image's size
# EXIF orientation to what makes the stored pixels upright: mirror left to right, mirror top to bottom, then transpose
_UPRIGHT = {
    1: (False, False, False),
    2: (True, False, False),
    3: (True, True, False),
    4: (False, True, False),
    5: (False, False, True),
    6: (False, True, True),
    7: (True, True, True),
    8: (True, False, True),
}


def is_available() -> bool:
    """Whether simplejpeg can be used on this machine."""
    try:
        import simplejpeg  # noqa: F401
    except ImportError:
        return False
    return True


def jpeg_crop(
    data: bytes,
    size: int,
    recipe: AugmentRecipe,
    rng: random.Random,
    keep: Callable[[np.ndarray, int], None] | None = None,
) -> Tensor | None:
    """Decode a random crop of a JPEG: what `random_crop` makes of the decoded image, from the same draws.

    Args:
        data: the content of the file.
        size: of the crop, in pixels.
        recipe: ranges of area and aspect ratio; how often to flip.
        rng: for the draws.
        keep: called with what `crop_of_decoded` needs, if the JPEG was decoded at full size.

    Returns:
        (3, size, size) uint8; or None for anything but a sound JPEG of gray or colour, which Pillow then decodes or
        refuses with the reason.
    """
    if not data.startswith(_START) or (header := _plain_header(data) or _header(data)) is None:
        return None
    width, height, orientation = header
    if width * height > (Image.MAX_IMAGE_PIXELS or width * height):
        return None
    (left, top, right, bottom), flipped = _draw_stored(width, height, orientation, recipe, rng)
    scale = next((scale for scale in SCALES if min(right - left, bottom - top) >= scale * size), 1)
    pixels = _decode(data, width, height, scale)
    if pixels is None:
        return None
    if keep is not None and scale == 1:
        keep(pixels, orientation)
    return _upright(_resize(pixels, (left, top, right, bottom), scale, size), orientation, flipped)


def crop_of_decoded(
    pixels: np.ndarray, orientation: int, size: int, recipe: AugmentRecipe, rng: random.Random
) -> Tensor:
    """Make the same crop as `jpeg_crop`, from what it decoded at full size before.

    Args:
        pixels: (H, W, 3) uint8, as stored in the file.
        orientation: EXIF's, 1 to 8.
        size: of the crop, in pixels.
        recipe: ranges of area and aspect ratio; how often to flip.
        rng: for the draws.
    """
    height, width = pixels.shape[:2]
    box, flipped = _draw_stored(width, height, orientation, recipe, rng)
    return _upright(_resize(pixels, box, 1, size), orientation, flipped)


def jpeg_at_scale(data: bytes, side: int) -> Image.Image | None:
    """Decode a whole JPEG, upright, at the smallest scale whose longer side has at least `side` pixels.

    Returns:
        A Pillow image in RGB; or None for anything but a sound JPEG of gray or colour, which Pillow then decodes or
        refuses with the reason; also if simplejpeg is not installed.
    """
    if not data.startswith(_START) or not is_available():
        return None
    if (header := _plain_header(data) or _header(data)) is None:
        return None
    width, height, orientation = header
    if width * height > (Image.MAX_IMAGE_PIXELS or width * height):
        return None
    scale = next((scale for scale in SCALES if max(width, height) >= scale * side), 1)
    pixels = _decode(data, width, height, scale)
    if pixels is None:
        return None
    mirrored, upside_down, transposed = _UPRIGHT[orientation]
    upright = pixels[:: -1 if upside_down else 1, :: -1 if mirrored else 1]
    return Image.fromarray(np.ascontiguousarray(upright.transpose(1, 0, 2) if transposed else upright).copy())


def _draw_stored(
    width: int, height: int, orientation: int, recipe: AugmentRecipe, rng: random.Random
) -> tuple[tuple[int, int, int, int], bool]:
    """Draw a crop of the upright image: its box in the image as stored, and whether the crop is flipped."""
    mirrored, upside_down, transposed = _UPRIGHT[orientation]
    crop = draw_crop(*((height, width) if transposed else (width, height)), recipe, rng)
    left, top, right, bottom = crop.box  # in the upright image; below, in the stored one
    if transposed:
        left, top, right, bottom = top, left, bottom, right
    if mirrored:
        left, right = width - right, width - left
    if upside_down:
        top, bottom = height - bottom, height - top
    return (left, top, right, bottom), crop.flipped


def _upright(resized: Tensor, orientation: int, flipped: bool) -> Tensor:
    """Turn a crop (3, size, size) of the image as stored upright; then perhaps flip it left to right."""
    mirrored, upside_down, transposed = _UPRIGHT[orientation]
    if upside_down or mirrored:
        resized = resized.flip([axis for axis, backwards in ((1, upside_down), (2, mirrored)) if backwards])
    resized = resized.transpose(1, 2) if transposed else resized
    return resized.flip(2) if flipped else resized


def _plain_header(data: bytes) -> tuple[int, int, int] | None:
    """What `_header` returns, for a file without EXIF and XMP; None for any other. Pillow takes ten times as long."""
    size, at = None, 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == _SCAN:
            return size
        if marker == _APP1 or length < 2:
            return None
        if marker in _FRAMES:
            bits, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
            if size is not None or bits != 8 or channels not in (1, 3) or not width * height:
                return None
            size = width, height, 1
        at += 2 + length
    return None


def _header(data: bytes) -> tuple[int, int, int] | None:
    """Width, height and orientation of a JPEG in gray or colour; None for any other file."""
    try:
        with warnings.catch_warnings(), io.BytesIO(data) as file:
            warnings.simplefilter("ignore")
            with Image.open(file, formats=("JPEG", "MPO")) as image:
                width, height = image.size
                if image.mode not in ("RGB", "L"):
                    return None
                orientation = image.getexif().get(0x0112, 1)
                return width, height, orientation if orientation in _UPRIGHT else 1
    except Exception:  # of many types; Pillow decodes the file again, and says what is wrong
        return None


def _decode(data: bytes, width: int, height: int, scale: int) -> np.ndarray | None:
    """The pixels (ceil(height / scale), ceil(width / scale), 3); None if the file is damaged in any way.

    They are valid until the next call in the same thread.
    """
    import simplejpeg

    shape = (-(-height // scale), -(-width // scale), 3)
    # Room for what Pillow saw in the header. If libjpeg-turbo sees more (a damaged file may have two), it refuses.
    room = _buffer(shape[0] * shape[1] * 3)
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, min_height=shape[0], min_width=shape[1], buffer=room)
    except ValueError:  # also for what Pillow only warns of
        return None
    return pixels if pixels.shape == shape else None


def _buffer(count: int) -> np.ndarray:
    """Uninitialised bytes, those of the call before unless there are many: new ones cost a tenth of the decoding."""
    if count > KEPT_BYTES:
        return np.empty(count, np.uint8)
    if not hasattr(_kept, "buffer"):
        _kept.buffer = np.empty(KEPT_BYTES, np.uint8)
    kept: np.ndarray = _kept.buffer
    return kept[:count]


def _resize(pixels: np.ndarray, box: tuple[int, int, int, int], scale: int, size: int) -> Tensor:
    """Cut a box, given at full size, from pixels (H, W, 3) at a scale, and resize it: (3, size, size)."""
    left, top, right, bottom = box
    first_x, first_y = left // scale, top // scale
    cut = pixels[first_y : -(-bottom // scale), first_x : -(-right // scale)]
    if scale == 1:
        chosen = torch.from_numpy(cut).permute(2, 0, 1).unsqueeze(0)
        # As Pillow in a third of the time, and as torchvision without a look at the pixels around the crop
        return F.interpolate(chosen, (size, size), mode="bilinear", antialias=True)[0]
    # The box may begin and end between two pixels, which only Pillow allows.
    part = (left / scale - first_x, top / scale - first_y, right / scale - first_x, bottom / scale - first_y)
    image = Image.fromarray(np.ascontiguousarray(cut)).resize((size, size), Image.Resampling.BILINEAR, box=part)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
