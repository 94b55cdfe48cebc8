"""Which values become black and white, for images with more than 8 bits a channel; and how large images usually are."""

import math
from contextlib import suppress

import numpy as np

from odcft.data.image_decoding import image_size, read_high_depth
from odcft.data.images import Images


def median_shorter_side(images: Images, sample: int = 32) -> int:
    """Return the median shorter side, in pixels, of a few images spread over the set; 0 if none can be read."""
    sides = []
    for index in range(0, len(images), max(1, len(images) // sample)):
        try:
            sides.append(min(image_size(images.read(index))))
        except Exception:  # reported later, when the image is read for training
            continue
    return int(np.median(sides)) if sides else 0


def choose_range(images: Images, full: bool = False, sample: int = 256) -> tuple[tuple[float, float] | None, str]:
    """Choose the values that become black and white, for images with more than 8 bits a channel (data.range=auto).

    12-bit cameras write 16-bit files. So the range that the images actually use is chosen if it is less than half of
    what their type can hold, or, for floating point, if it goes beyond 0..1. To ignore hot pixels and bad frames, up to
    one pixel in a thousand of each image and one image in fifty may lie outside the range, at either end.

    Args:
        images: the images.
        full: return the limits of the type, however little of it the images use.
        sample: how many images to examine at most, spread over the set; fewer (at least 16) if they are larger than a
            million pixels. Only those with more than 8 bits a channel are decoded.

    Returns:
        (low, high): the range of the images, or the limits of their type if they use it well; None for 8-bit images,
        and for images of several types that all use their type well. And a sentence to print about it, "" if values
        are not rescaled.
    """
    # (kind, limits) of a type to the range of each image of that type
    found: dict[tuple[str, tuple[float, float]], list[tuple[float, float]]] = {}
    sample = min(sample, max(16, (1 << 28) // max(1, median_shorter_side(images) ** 2)))  # a few seconds of decoding
    examined = range(0, len(images), max(1, -(-len(images) // sample)))
    for index in examined:
        with suppress(Exception):  # reported later, when the image is read for training
            image = read_high_depth(images.read(index))
            if image is not None and (image_range := _range_of_image(image.values)):
                found.setdefault((image.kind, image.limits), []).append(image_range)
    if full or all(_uses_its_type(ranges, limits) for (_, limits), ranges in found.items()):
        return (next(iter(found))[1] if len(found) == 1 else None), ""
    low, high = _range_of_set([image_range for ranges in found.values() for image_range in ranges])
    count = f"{sum(map(len, found.values())):,} images of {' and of '.join(sorted({kind for kind, _ in found}))}"
    if len(examined) < len(images):
        count += f" (of {len(examined):,} examined)"
    smallest, largest = next(iter(found))[1]
    comparable = len(found) == 1 and smallest <= low < high <= largest
    use = f" use {100 * (high - low) / (largest - smallest):.2g} % of their range" if comparable else ""
    return (low, high), f"{count}{use}: scaled to the range of the set, {low:,.6g} is black and {high:,.6g} is white."


def _range_of_image(values: np.ndarray, most: int = 1 << 18) -> tuple[float, float] | None:
    """Return the smallest and largest value after dropping a thousandth at either end; None if no value is finite."""
    step = max(1, math.ceil(math.sqrt(values.size / most)))
    sample = values[::step, ::step].ravel()
    if sample.dtype.kind == "f":
        sample = sample[np.isfinite(sample)]
    if not len(sample):
        return None
    dropped = len(sample) // 1000
    sample = np.partition(sample, [dropped, len(sample) - 1 - dropped])
    return float(sample[dropped]), float(sample[len(sample) - 1 - dropped])


def _range_of_set(ranges: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the smallest low and largest high end after dropping a fiftieth of either."""
    dropped = len(ranges) // 50
    return sorted(low for low, _ in ranges)[dropped], sorted(high for _, high in ranges)[-1 - dropped]


def _uses_its_type(ranges: list[tuple[float, float]], limits: tuple[float, float]) -> bool:
    """Whether images span at least half of what their type can hold (or are constant, so that no range would help)."""
    low, high = _range_of_set(ranges)
    return low >= high or (limits[0] <= low and high <= limits[1] and high - low >= (limits[1] - limits[0]) / 2)
