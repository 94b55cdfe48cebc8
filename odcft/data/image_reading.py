"""Read image i of a set: with the function that the user gave (`--reader`), or else by the decoders of odcft."""

from typing import Any

import numpy as np
from PIL import Image

from odcft.data.band_stack import BandStack
from odcft.data.high_depth import HighDepthImage, to_8_bits
from odcft.data.image_decoding import image_size, read_high_depth, read_image
from odcft.data.images import Images
from odcft.data.view import View


def pixels_of(images: Images, index: int, view: View, data: bytes | None = None) -> Any:
    """Image `index` in 8 bits, as a Pillow image in RGB or a BandStack; from its bytes, if they have been read.

    Raises:
        OdcftError: it cannot be read; says why.
        Exception: of many types, raised by decoders for damaged files, or by the user's function.
    """
    if images.reader is not None:
        return to_8_bits(images.reader.values(images, index, view.bands), view.intensity)
    return read_image(images.read(index) if data is None else data, view.intensity, view.bands)


def image_of(pixels: np.ndarray) -> Any:
    """The Pillow image in RGB, or the BandStack, with these pixels (H, W, C) uint8: the inverse of `np.array`."""
    return Image.fromarray(pixels) if pixels.shape[2] == 3 else BandStack.of(pixels)


def high_depth_values(images: Images, index: int, bands: int = 3) -> HighDepthImage | None:
    """The values of image `index` if it has more than 8 bits a channel; None for any other. Raises as `pixels_of`."""
    if images.reader is not None:
        values = images.reader.values(images, index, bands)
        return None if values.is_8_bit else values
    return read_high_depth(images.read(index), bands)


def size_of(images: Images, index: int) -> tuple[int, int]:
    """Width and height of image `index`. Raises as `pixels_of`."""
    if images.reader is not None:
        height, width = images.reader.values(images, index, None).values.shape[:2]
        return width, height
    return image_size(images.read(index))
