"""Lab values equal scikit-image's, and every colour is near a bin."""

import pytest
import torch

from odcft.data.lab_colors import ab_bins, nearest_bin, rgb_to_lab


@pytest.mark.parametrize(
    ("rgb", "expected"),  # scikit-image 0.25, rgb2lab
    [
        ((1.0, 0.0, 0.0), (53.2405, 80.0923, 67.2028)),
        ((0.0, 1.0, 0.0), (87.7351, -86.1813, 83.1775)),
        ((0.0, 0.0, 1.0), (32.2957, 79.1870, -107.8617)),
        ((1.0, 1.0, 1.0), (100.0, 0.0, 0.0)),
        ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
        ((0.2, 0.4, 0.6), (42.0099, -0.1500, -32.8458)),
    ],
)
def test_lab_values_equal_those_of_scikit_image(rgb, expected):
    assert rgb_to_lab(torch.tensor(rgb).view(1, 3, 1, 1)).flatten().tolist() == pytest.approx(expected, abs=0.01)


def test_lab_is_the_same_under_autocast():
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        inside = rgb_to_lab(images)
    assert torch.equal(inside, rgb_to_lab(images))


def test_every_srgb_colour_is_near_its_bin():
    bins = ab_bins()
    ab = rgb_to_lab(torch.rand(1000, 3, 1, 1, generator=torch.Generator().manual_seed(0)))[:, 1:].flatten(1)
    assert (ab - bins[nearest_bin(ab, bins)]).abs().max() <= 10
    assert nearest_bin(torch.tensor([[[1.0, -2.0]]]), bins).shape == (1, 1)
