"""Small pictures of images, for pages and sheets that people look at: read by odcft's own decoders."""

import io
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image, features

from odcft.data.band_stack import BandStack
from odcft.data.image_reading import pixels_of
from odcft.data.images import Images
from odcft.data.jpeg_crops import jpeg_at_scale
from odcft.data.view import View
from odcft.errors import OdcftError
from odcft.text import printable

QUALITY = 55  # of WebP and JPEG
PIECE = 64  # thumbnails made between two looks at how many bytes there are
MAX_ASPECT_RATIO = 8  # longer images are cropped to this first


def thumbnail(images: Images, index: int, view: View, side: int) -> Any:
    """Image `index`, whole, as a Pillow image in RGB whose longer side has at most `side` pixels; never enlarged.

    Of images of other bands than RGB, the first three are shown. Raises as `pixels_of`.
    """
    data = None if images.reader is not None else images.read(index)
    picture = None
    if data is not None and view.bands == 3:
        picture = jpeg_at_scale(data, side)
    if picture is None:
        picture = pixels_of(images, index, view, data)
    if isinstance(picture, BandStack):
        bands = picture.bands[:3] if len(picture.bands) > 2 else picture.bands[:1] * 3
        picture = Image.merge("RGB", bands)
    width, height = picture.size
    longest = MAX_ASPECT_RATIO * min(width, height)
    if max(width, height) > longest:
        left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
        picture = picture.crop((left, top, min(width, left + longest), min(height, top + longest)))
    picture.thumbnail((side, side), reducing_gap=2.0)
    return picture


def encoded(picture: Any) -> bytes:
    """A thumbnail as WebP, or as JPEG where Pillow cannot write WebP."""
    content = io.BytesIO()
    if features.check("webp"):
        picture.save(content, "WEBP", quality=QUALITY, method=2)
    else:
        picture.save(content, "JPEG", quality=QUALITY + 10, optimize=True)
    return content.getvalue()


def media_type() -> str:
    """The media type of what `encoded` returns."""
    return "image/webp" if features.check("webp") else "image/jpeg"


def make_thumbnails(
    images: Images,
    indices: Sequence[int] | np.ndarray,
    view: View,
    *,
    side: int,
    most_bytes: float,
    threads: int,
    most_seconds: float = math.inf,
    advance: Callable[[int], object] = lambda count: None,
) -> tuple[dict[int, bytes], dict[int, str]]:
    """Encoded thumbnails of images, in the order given, until they have `most_bytes` together.

    Args:
        images: the images.
        indices: of those wanted, the most important first.
        view: says how high bit depths become 8 bits, and how many bands there are.
        side: of the longer side, in pixels, at most.
        most_bytes: of all together.
        threads: that decode; a reader of the user's runs in one only.
        most_seconds: after which no more are begun.
        advance: called with how many of `indices` are done.

    Returns:
        Index to thumbnail, and index to why it cannot be read; fewer than `indices` if bytes or time were used up.
    """

    def one(index: int) -> bytes | str:
        try:
            return encoded(thumbnail(images, index, view, side))
        except OdcftError as error:
            return printable(error)
        except Exception as error:  # decoders raise a dozen types for broken files
            said = error.strerror if isinstance(error, OSError) else None
            return printable(said or f"{type(error).__name__}: {error}")

    made: dict[int, bytes] = {}
    unreadable: dict[int, str] = {}
    total, left, began = 0, iter(np.asarray(indices).tolist()), time.monotonic()
    with ThreadPoolExecutor(1 if images.reader is not None else max(1, threads)) as pool:
        while total < most_bytes and time.monotonic() - began < most_seconds and (piece := list(islice(left, PIECE))):
            for index, found in zip(piece, pool.map(one, piece), strict=True):
                if isinstance(found, str):
                    unreadable[index] = found
                elif total + len(found) <= most_bytes:
                    made[index] = found
                    total += len(found)
                else:
                    total = int(most_bytes) + 1
            advance(len(piece))
    return made, unreadable
