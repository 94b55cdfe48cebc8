"""The resize and centre crop that prepare an image for the network when there is no augmentation."""

import math
from dataclasses import dataclass

from PIL import Image

CROPS = ("centre", "squash")
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
MAX_ASPECT_RATIO = 16  # longer images are cropped to this before they are resized


@dataclass(frozen=True)
class View:
    """How images are prepared for the network when there is no augmentation.

    This is the usual evaluation transform: resize the shorter side to size / crop_fraction, then crop the centre.

    Attributes:
        size: side of the square crop, in pixels.
        crop_fraction: the share of the resized image's shorter side that the crop keeps (timm: crop_pct).
        interpolation: one of INTERPOLATIONS.
        crop: one of CROPS: "centre" crops; "squash" then resizes the whole image to a square instead.
        intensity: for images with more than 8 bits a channel, the values that become black and white; None for the
            smallest and largest value of their type.
        bands: channels of the image: 3 for RGB; any other number for images of that many bands.
    """

    size: int
    crop_fraction: float = 0.875
    interpolation: str = "bilinear"
    intensity: tuple[float, float] | None = None
    bands: int = 3
    crop: str = "centre"


def describe_view(view: View) -> str:
    """Describe a view in a phrase, for messages that say how images are prepared."""
    resized = math.floor(view.size / view.crop_fraction)
    bands = f"{view.bands} bands " if view.bands != 3 else ""
    crop = "centre crop" if view.crop == "centre" else "then squashed into a square"
    seen = f"{bands}seen at {view.size} pixels (shorter side resized to {resized}, {view.interpolation}, {crop})"
    if view.intensity is None:
        return seen
    return f"{seen}, {view.intensity[0]:,.6g} is black, {view.intensity[1]:,.6g} is white"


def centre_crop(image: Image.Image, view: View) -> Image.Image:
    """Resize an image and crop its centre to a square (or squash it into one, if the view says so).

    Equal, to the bit, to torchvision's Resize and CenterCrop, and so to timm's `create_transform` for evaluation; but
    images with an aspect ratio over MAX_ASPECT_RATIO are cropped first.
    """
    width, height = image.size
    short, size = math.floor(view.size / view.crop_fraction), view.size
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        side = MAX_ASPECT_RATIO * min(width, height)
        left, top = max(0, (width - side) // 2), max(0, (height - side) // 2)
        image = image.crop((left, top, min(width, left + side), min(height, top + side)))
        width, height = image.size
    long = int(short * max(width, height) / min(width, height))
    resized = (short, long) if width <= height else (long, short)
    image = image.resize(resized, Image.Resampling[view.interpolation.upper()])
    if view.crop == "squash":  # in two steps, as the published scripts do
        return image.resize((size, size), Image.Resampling[view.interpolation.upper()])
    left, top = (round((side - size) / 2) for side in resized)
    return image.crop((left, top, left + size, top + size))
