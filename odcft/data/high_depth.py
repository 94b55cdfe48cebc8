"""Images with more than 8 bits a channel: their values as they are in the file, and how those become 8 bits."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from odcft.data.band_stack import BandStack

WHITE = 255  # background of transparent pixels, as in most viewers and on paper


@dataclass
class HighDepthImage:
    """The values of an image with more than 8 bits a channel (or signed bytes), as they are in the file.

    Images of several bands, which Pillow cannot hold, are kept in this form even if they have 8 bits.

    Attributes:
        values: (H, W) or (H, W, C), of any real type.
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

    @property
    def is_8_bit(self) -> bool:
        """Whether its values are the 8-bit pixels already, so that no range applies to them."""
        return self.values.dtype == np.uint8


def limits_of(dtype: np.dtype, bits: int = 0) -> tuple[tuple[float, float], str]:
    """The smallest and largest value of a type, and its name for messages.

    Args:
        dtype: of integers, booleans or floating point.
        bits: how many bits of an integer type are used; 0 for all.
    """
    if dtype.kind == "f":
        return (0.0, 1.0), "floating point" if dtype.itemsize <= 4 else f"floating point of {8 * dtype.itemsize} bits"
    bits = bits or 8 * dtype.itemsize
    if dtype.kind == "b" or bits == 1:
        return (0.0, 1.0), "1 bit"
    if dtype.kind == "i":
        return (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1), f"{bits} signed bits"
    return (0.0, 2.0**bits - 1), f"{bits} bits"


def to_8_bits(image: HighDepthImage, intensity: tuple[float, float] | None) -> Image.Image | BandStack:
    """Scale values linearly to 8 bits; values beyond black and white are clipped, NaN becomes black.

    Args:
        image: what was decoded.
        intensity: the values that become black and white; None for the limits of the type.

    Returns:
        RGB for one or three channels, on white where the image is transparent; else its bands.
    """
    low, high = intensity if intensity and not image.is_8_bit else image.limits

    def scaled(values: np.ndarray) -> np.ndarray:
        exact = values.astype(np.float32 if values.dtype.kind == "f" and values.dtype.itemsize <= 4 else np.float64)
        with np.errstate(all="ignore"):  # NaN and infinity
            steps = np.clip((exact - low) * (255 / (high - low)), 0, 255)
            return np.nan_to_num(255 - steps if image.inverted else steps).round().astype(np.uint8)

    values = image.values
    if image.is_8_bit and not image.inverted:
        pixels = values
    elif values.dtype.kind == "u" and values.dtype.itemsize == 2 and values.size > 65536:
        pixels = scaled(np.arange(65536))[values]  # a lookup table: the same result, many times faster
    else:
        pixels = scaled(values)
    if image.alpha is not None:
        alpha = image.alpha if pixels.ndim == 2 else image.alpha[..., None]
        pixels = (WHITE + (pixels - np.float32(WHITE)) * alpha).round().astype(np.uint8)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim == 3 and pixels.shape[2] != 3:
        return BandStack.of(pixels)
    return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")
