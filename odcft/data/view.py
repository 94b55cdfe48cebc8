"""How an image file becomes the square of pixels that a network sees without augmentation."""

import math
from dataclasses import dataclass

from PIL import Image

INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


@dataclass(frozen=True)
class View:
    """How an image file becomes the square of pixels that a network sees without augmentation.

    As the field does it: the shorter side is resized to size / crop_fraction, and the middle is cut out.

    Attributes:
        size: pixels of the square's side.
        crop_fraction: of the resized image's shorter side that is kept (timm: crop_pct).
        interpolation: one of INTERPOLATIONS.
        intensity: of images with more than 8 bits a channel, the values that become black and white; None where these
            are the least and the largest of their type.
    """

    size: int
    crop_fraction: float = 0.875
    interpolation: str = "bilinear"
    intensity: tuple[float, float] | None = None


def seen_as(view: View) -> str:
    """A view in words, for a line that says how images are shown."""
    resized = math.floor(view.size / view.crop_fraction)
    crop = "shorter side resized to that" if resized == view.size else f"shorter side resized to {resized}"
    seen = f"seen at {view.size} pixels ({crop}, {view.interpolation}, then the centre)"
    return seen if view.intensity is None else f"{seen}, {view.intensity[0]:,.6g} black, {view.intensity[1]:,.6g} white"


LONGEST = 16  # times the square's side: longer images are cut before they are resized


def centre_crop(image: Image.Image, view: View) -> Image.Image:
    """The middle of an image as a square of pixels: no augmentation.

    To the last bit what torchvision's Resize and CenterCrop make of it, and so what timm's `create_transform` does for
    evaluation.
    """
    width, height = image.size
    short, size = math.floor(view.size / view.crop_fraction), view.size
    if max(width, height) > LONGEST * min(width, height):
        side = LONGEST * min(width, height)
        left, top = max(0, (width - side) // 2), max(0, (height - side) // 2)
        image = image.crop((left, top, min(width, left + side), min(height, top + side)))
        width, height = image.size
    long = int(short * max(width, height) / min(width, height))
    resized = (short, long) if width <= height else (long, short)
    image = image.resize(resized, Image.Resampling[view.interpolation.upper()])
    left, top = (round((side - size) / 2) for side in resized)
    return image.crop((left, top, left + size, top + size))
