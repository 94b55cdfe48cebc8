"""Which values become black and white, for images with more than 8 bits a channel; and how large images usually are."""

import math
from contextlib import suppress

import numpy as np

from odcft.data.image_reading import high_depth_values, size_of
from odcft.data.images import Images
from odcft.errors import OdcftError
from odcft.recipe import percentiles

_MOST_VALUES = 1 << 24  # that percentiles are taken of


def median_shorter_side(images: Images, sample: int = 32) -> int:
    """Return the median shorter side, in pixels, of a few images spread over the set; 0 if none can be read."""
    sides = [min(size) for size in size_of_some(images, sample)]
    return int(np.median(sides)) if sides else 0


def size_of_some(images: Images, sample: int = 32) -> list[tuple[int, int]]:
    """Return width and height, as stored, of a few images spread over the set, without those that cannot be read."""
    sizes = []
    for index in range(0, len(images), max(1, len(images) // sample)):
        with suppress(Exception):  # reported later, when the image is read for training
            sizes.append(size_of(images, index))
    return sizes


def choose_range(
    images: Images, rule: str = "auto", sample: int = 256, bands: int = 3
) -> tuple[tuple[float, float] | None, str]:
    """Choose the values that become black and white, for images with more than 8 bits a channel (data.range).

    12-bit cameras write 16-bit files. So `auto` chooses the range that the images actually use if it is less than half
    of what their type can hold, or, for floating point, if it goes beyond 0..1. To ignore hot pixels and bad frames, up
    to one pixel in a thousand of each image and one image in fifty may lie outside the range, at either end.

    Args:
        images: the images.
        rule: `auto`; `full`, the limits of the type; `set`, the smallest and largest value; or percentiles of all
            values, such as "1%..99%".
        bands: channels of the images, as in `View`.
        sample: how many images to examine at most, spread over the set; fewer (at least 16) if they are larger than a
            million pixels. Only those with more than 8 bits a channel are decoded, and of each at most 2^18 values.

    Returns:
        (low, high), or None for 8-bit images, and for images of several types that all use their type well. And a
        sentence to print about it, "" if it would say nothing: for 8-bit images, and `full` as asked.

    Raises:
        OdcftError: the values that the rule takes do not differ.
    """
    # (kind, limits) of a type to samples of the values of each image of that type
    found: dict[tuple[str, tuple[float, float]], list[np.ndarray]] = {}
    sample = min(sample, max(16, (1 << 28) // max(1, median_shorter_side(images) ** 2)))  # a few seconds of decoding
    examined = range(0, len(images), max(1, -(-len(images) // sample)))
    for index in examined:
        with suppress(Exception):  # reported later, when the image is read for training
            image = high_depth_values(images, index, bands)
            if image is not None and len(values := _finite_sample(image.values)):
                found.setdefault((image.kind, image.limits), []).append(values)
    if not found:
        needless = rule not in ("auto", "full")
        return None, f"data.range={rule} changes nothing: no image has more than 8 bits a channel." if needless else ""
    count = f"{sum(map(len, found.values())):,} images of {' and of '.join(sorted({kind for kind, _ in found}))}"
    if len(examined) < len(images):
        count += f" (of {len(examined):,} examined)"
    limits = next(iter(found))[1] if len(found) == 1 else None
    if rule == "full":
        return limits, ""
    if rule != "auto":
        return _range_by_rule([values for of_type in found.values() for values in of_type], rule, count)
    ranges = {kind: [_without_extremes(values) for values in of_type] for kind, of_type in found.items()}
    if all(_uses_its_type(of_type, limits) for (_, limits), of_type in ranges.items()):
        black = f": {limits[0]:,.6g} is black and {limits[1]:,.6g} is white" if limits else ""
        return limits, f"{count}: data.range=auto took full, the limits of their type{black}."
    low, high = _range_of_set([image_range for of_type in ranges.values() for image_range in of_type])
    use = ""
    if limits and limits[0] <= low < high <= limits[1]:
        use = f" use {100 * (high - low) / (limits[1] - limits[0]):.2g} % of their range"
    return (low, high), (
        f"{count}{use}: scaled to the range of the set, {low:,.6g} is black and {high:,.6g} is white (data.range=auto)."
    )


def _range_by_rule(samples: list[np.ndarray], rule: str, count: str) -> tuple[tuple[float, float], str]:
    """The range that `set` or percentiles give, and the sentence about it."""
    if rule == "set":
        low, high = float(min(values.min() for values in samples)), float(max(values.max() for values in samples))
        what = "smallest and largest value"
    else:
        each = max(1, _MOST_VALUES // len(samples))  # of every image alike, whatever its size
        pooled = np.concatenate([values[:: -(-len(values) // each)].astype(np.float64) for values in samples])
        low, high = map(float, np.percentile(pooled, percentiles(rule)))
        what = "percentiles"
    if not low < high:
        raise OdcftError(
            f"data.range={rule} cannot be used: in {count} black and white would both be {low:,.6g}. "
            "Give the two values, as data.range=[black, white]."
        )
    return (
        low,
        high,
    ), f"{count}: scaled by data.range={rule}, their {what}: {low:,.6g} is black, {high:,.6g} is white."


def _finite_sample(values: np.ndarray, most: int = 1 << 18) -> np.ndarray:
    """At most `most` of the finite values of an image (of each band), spread over it."""
    step = max(1, math.ceil(math.sqrt(values.shape[0] * values.shape[1] / most)))
    sample = values[::step, ::step].ravel()
    return sample[np.isfinite(sample)] if sample.dtype.kind == "f" else sample


def _without_extremes(sample: np.ndarray) -> tuple[float, float]:
    """Return the smallest and largest value after dropping a thousandth at either end."""
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
