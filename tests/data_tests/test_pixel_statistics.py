"""Mean and standard deviation of a set, against arrays worked out by hand."""

import numpy as np
import pytest
from image_files import write_tiff
from PIL import Image

from odcft.data.pixel_statistics import SMALLEST_STD, mean_and_std
from odcft.data.sources import find_images
from odcft.data.view import View
from odcft.errors import OdcftError


def test_every_channel_has_its_own(tmp_path):
    values = np.zeros((8, 8, 3), np.uint8)
    values[:4, :, 0], values[..., 1] = 255, 51
    for i in range(5):
        Image.fromarray(values).save(tmp_path / f"{i}.png")
    (tmp_path / "x.png").write_text("broken")
    mean, std, count = mean_and_std(find_images(tmp_path), View(8, 1.0))
    assert mean == pytest.approx([0.5, 0.2, 0])
    assert std == pytest.approx([0.5, SMALLEST_STD, SMALLEST_STD], abs=1e-6)
    assert count == 5


def test_bands_in_the_range_of_the_set(tmp_path):
    write_tiff(tmp_path / "x.tif", np.full((8, 8, 5), [0, 1000, 2000, 3000, 4000], np.uint16), 1, [0] * 4)
    mean, _, _ = mean_and_std(find_images(tmp_path), View(8, 1.0, intensity=(0, 4000), bands=5))
    assert mean == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.002)


def test_a_sample_spread_over_the_set_is_read(tmp_path):
    for i in range(20):
        Image.new("L", (8, 8), 10 * i).save(tmp_path / f"{i:02d}.png")
    assert mean_and_std(find_images(tmp_path), View(8, 1.0), sample=5)[2] == 5


def test_a_set_that_cannot_be_read_is_refused_with_a_reason(tmp_path):
    (tmp_path / "x.png").write_text("broken")
    with pytest.raises(OdcftError, match=r"None of the images .*, for example x\.png: not an image of a format"):
        mean_and_std(find_images(tmp_path), View(8))
