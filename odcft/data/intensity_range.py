"""Which values of images with more than 8 bits a channel are shown as black and white."""

import math
from contextlib import suppress

import numpy as np

from odcft.data.image_decoding import image_size, read_deep
from odcft.data.sources import Images


def usual_side(images: Images, sample: int = 32) -> int:
    """The median shorter side, in pixels, of a few images spread over the set; 0 if none can be read."""
    sides = []
    for index in range(0, len(images), max(1, len(images) // sample)):
        try:
            sides.append(min(image_size(images.path(index))))
        except Exception:  # it will be reported when it is its turn
            continue
    return int(np.median(sides)) if sides else 0


def own_range(images: Images, full: bool = False, sample: int = 256) -> tuple[tuple[float, float] | None, str]:
    """Which values of images with more than 8 bits a channel to show as black and white, where nobody has said.

    Cameras of 12 bits write files of 16: their own range is taken where it is less than half of what the type could
    hold, and for floating point also where it is beyond 0..1. Up to a pixel in a thousand of an image and one image in
    fifty may lie beyond it at either end: hot pixels, frames gone wrong.

    Args:
        images: those to show.
        full: take the type's limits, whatever use is made of them.
        sample: how many of them at most, spread over the set, are looked at; fewer, but 16, where they are of more than
            a million pixels. Only those of more than 8 bits are decoded.

    Returns:
        (low, high), the type's own limits where the images make use of it; None for images of 8 bits, and of several
        types that are all made use of. And what to tell of it, "" where nothing is changed.
    """
    found: dict[tuple[str, tuple[float, float]], list[tuple[float, float]]] = {}
    sample = min(sample, max(16, (1 << 28) // max(1, usual_side(images) ** 2)))  # some seconds of decoding
    looked_at = range(0, len(images), max(1, -(-len(images) // sample)))
    for index in looked_at:
        with suppress(Exception):  # it will be reported when it is its turn
            deep = read_deep(images.path(index))
            if deep is not None and len(extremes := _extremes(deep.values)):
                found.setdefault((deep.kind, deep.full), []).append((extremes[0], extremes[1]))
    if full or all(_uses(ends, limits) for (_, limits), ends in found.items()):
        return (next(iter(found))[1] if len(found) == 1 else None), ""
    low, high = _ends([pair for pairs in found.values() for pair in pairs])
    count = f"{sum(map(len, found.values())):,} images of {' and of '.join(sorted({kind for kind, _ in found}))}"
    if len(looked_at) < len(images):
        count += f" (of {len(looked_at):,} looked at)"
    least, largest = next(iter(found))[1]
    inside = len(found) == 1 and least <= low < high <= largest
    use = f" use {100 * (high - low) / (largest - least):.2g} % of their range" if inside else ""
    return (low, high), f"{count}{use}: scaled by the set's own, {low:,.6g} is black and {high:,.6g} white."


def _extremes(values: np.ndarray, most: int = 1 << 18) -> list[float]:
    """The least and the largest value but for a thousandth at either end; [] where there is no number."""
    step = max(1, math.ceil(math.sqrt(values.size / most)))
    some = values[::step, ::step].ravel()
    if some.dtype.kind == "f":
        some = some[np.isfinite(some)]
    if not len(some):
        return []
    spare = len(some) // 1000
    some = np.partition(some, [spare, len(some) - 1 - spare])
    return [float(some[spare]), float(some[len(some) - 1 - spare])]


def _ends(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    spare = len(pairs) // 50
    return sorted(low for low, _ in pairs)[spare], sorted(high for _, high in pairs)[-1 - spare]


def _uses(pairs: list[tuple[float, float]], full: tuple[float, float]) -> bool:
    """Whether images make use of the range of their type, or there is nothing to tell apart in them."""
    low, high = _ends(pairs)
    return low >= high or (full[0] <= low and high <= full[1] and high - low >= (full[1] - full[0]) / 2)
