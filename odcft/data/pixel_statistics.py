"""Mean and standard deviation of the pixels of a set, for networks whose checkpoint does not say how to normalise."""

import math

import numpy as np

from odcft.data.image_reading import pixels_of
from odcft.data.images import Images
from odcft.data.view import View, centre_crop
from odcft.errors import OdcftError
from odcft.text import printable

SMALLEST_STD = 1 / 255  # of a constant band


def mean_and_std(images: Images, view: View, sample: int = 256) -> tuple[list[float], list[float], int]:
    """Measure the mean and standard deviation of each channel, in 0..1, over a sample spread over the set.

    Args:
        images: the images.
        view: how they are cropped and resized.
        sample: how many to read at most.

    Returns:
        Means, standard deviations (at least one level of gray), and how many images were read.

    Raises:
        OdcftError: none of them can be read.
    """
    sums_C, squares_C = np.zeros(view.bands), np.zeros(view.bands)
    pixels, count, reason = 0, 0, "there are none"
    for index in range(0, len(images), max(1, -(-len(images) // sample))):
        try:
            values = np.array(centre_crop(pixels_of(images, index, view), view)).reshape(-1, view.bands) / 255
            sums_C += values.sum(0)
            squares_C += (values**2).sum(0)
            pixels, count = pixels + len(values), count + 1
        except Exception as error:  # of many types; reported for each image when it is read for training
            reason = f"{images.names[index]}: {printable(str(error))}"
    if not count:
        raise OdcftError(f"None of the images examined in {images.source} can be read, for example {reason}.")
    mean_C = sums_C / pixels
    std_C = [max(SMALLEST_STD, math.sqrt(max(0.0, value))) for value in squares_C / pixels - mean_C**2]
    return [round(float(m), 6) for m in mean_C], [round(s, 6) for s in std_C], count
