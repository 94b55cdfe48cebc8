"""An image of any number of bands that is cropped and resized like a Pillow image, which has at most four."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image


@dataclass
class BandStack:
    """The bands of an image as gray Pillow images of one size, each changed in the same way.

    It has the methods of a Pillow image that crops need; `np.array` of it is (H, W, C) uint8.
    """

    bands: list[Image.Image]

    @classmethod
    def of(cls, pixels: np.ndarray) -> "BandStack":
        """The bands of pixels (H, W, C) uint8."""
        return cls([Image.fromarray(np.ascontiguousarray(pixels[..., c])) for c in range(pixels.shape[2])])

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.bands[0].size

    def resize(self, *args: Any, **kwargs: Any) -> "BandStack":
        """As of a Pillow image."""
        return self._each(lambda band: band.resize(*args, **kwargs))

    def crop(self, box: tuple[int, int, int, int]) -> "BandStack":
        """As of a Pillow image."""
        return self._each(lambda band: band.crop(box))

    def transpose(self, method: Image.Transpose) -> "BandStack":
        """As of a Pillow image."""
        return self._each(lambda band: band.transpose(method))

    def _each(self, change: Callable[[Image.Image], Image.Image]) -> "BandStack":
        return BandStack([change(band) for band in self.bands])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.stack([np.asarray(band) for band in self.bands], 2).astype(dtype or np.uint8)
