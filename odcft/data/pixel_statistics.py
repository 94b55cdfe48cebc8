"""Mean and standard deviation of the pixels of images, as the network would see them."""

import numpy as np
import torch
from torch import Tensor

from odcft.data.batches import Crops, make_loader
from odcft.data.images import Images
from odcft.data.view import View

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601
COLOURLESS = 2  # of 255: channels that differ no more are gray, as JPEG rounds


def is_gray(pixels: Tensor) -> bool:
    """Whether an image (C, H, W) uint8 has no colour. One of several bands has."""
    return len(pixels) == 1 or (len(pixels) == 3 and int((pixels.amax(0) - pixels.amin(0)).max()) <= COLOURLESS)


def all_gray(images: Images, view: View, sample: int = 32) -> bool:
    """Whether none of a few images, spread over the set, has colour; stops at the first that has."""
    crops, seen = Crops(images, view), 0
    for index in range(0, len(images), max(1, -(-len(images) // sample))):
        pixels, _ = crops[0, index]
        if isinstance(pixels, Tensor):
            seen += 1
            if not is_gray(pixels):
                return False
    return seen > 0


class PixelStatistics:
    """Adds up pixels, channel by channel."""

    def __init__(self) -> None:
        self.images = self.pixels = 0
        self.sum_C = self.squares_C = np.zeros(0)

    def add(self, image: np.ndarray) -> None:
        """Add an image (C, H, W), in 0..1; one with another number of channels than the first is left out."""
        flat_CP = image.reshape(len(image), -1).astype(np.float64)
        if not self.images:
            self.sum_C, self.squares_C = np.zeros(len(flat_CP)), np.zeros(len(flat_CP))
        if len(flat_CP) == len(self.sum_C):
            self.images, self.pixels = self.images + 1, self.pixels + flat_CP.shape[1]
            self.sum_C = self.sum_C + flat_CP.sum(1)
            self.squares_C = self.squares_C + np.square(flat_CP).sum(1)

    def merge(self, other: "PixelStatistics") -> None:
        """Add what another one has added up."""
        if not self.images:
            self.sum_C, self.squares_C = np.zeros_like(other.sum_C), np.zeros_like(other.squares_C)
        if len(other.sum_C) == len(self.sum_C):
            self.images, self.pixels = self.images + other.images, self.pixels + other.pixels
            self.sum_C, self.squares_C = self.sum_C + other.sum_C, self.squares_C + other.squares_C

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Of each channel, rounded to 4 digits, as people write them; the std is at least 0.001."""
        mean_C = self.sum_C / max(1, self.pixels)
        std_C = np.sqrt(np.clip(self.squares_C / max(1, self.pixels) - mean_C**2, 0, None))
        return [round(float(m), 4) for m in mean_C], [round(max(float(s), 1e-3), 4) for s in std_C]


def in_color(pixels: Tensor, color: str) -> np.ndarray:
    """Pixels (3, H, W) uint8 RGB, or of n bands, in the colours of a network, as (C, H, W) in 0..1."""
    image = pixels.numpy().astype(np.float64) / 255
    if color == "gray":
        return np.tensordot(LUMA, image, 1)[None]
    return image[::-1] if color == "bgr" else image


def measure(images: Images, view: View, color: str, workers: int, sample: int = 512) -> PixelStatistics:
    """Measure some images, spread over the set, as they are without augmentation; unreadable ones are left out.

    Args:
        images: the images.
        view: size, crop and intensity range.
        color: of the network.
        workers: data workers.
        sample: how many images at most.
    """
    found = PixelStatistics()
    chosen = range(0, len(images), max(1, -(-len(images) // sample)))
    batches = [[(0, i) for i in chosen[start : start + 32]] for start in range(0, len(chosen), 32)]
    for batch in make_loader(Crops(images, view), batches, workers if len(batches) > 1 else 0, torch.device("cpu")):
        for pixels in batch.pixels:
            if len(batch.index_B):
                found.add(in_color(pixels, color))
    return found
