"""The centre crop is timm's, whatever the shape of the image."""

import numpy as np
import pytest
from PIL import Image

from odcft.data.view import View, centre_crop, describe_view


def test_centre_crop():
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 4:12] = 200
    assert np.array(centre_crop(Image.fromarray(pixels), View(8, 1.0))).min() == 200


@pytest.mark.parametrize("size", [(8, 16), (16, 8), (37, 50), (224, 224), (500, 333), (31, 33)])
@pytest.mark.parametrize("view", [View(32), View(32, 1.0), View(40, 0.95, "bicubic"), View(33, 0.9, "nearest")])
def test_centre_crop_is_what_timm_does_for_evaluation(size, view):
    from timm.data.transforms_factory import create_transform

    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)
    theirs = create_transform(view.size, crop_pct=view.crop_fraction, interpolation=view.interpolation, normalize=False)
    image = Image.fromarray(pixels)
    assert np.array_equal(np.array(centre_crop(image, view)), np.array(theirs(image).permute(1, 2, 0)))


def test_a_very_long_image_takes_no_more_memory_than_a_long_one():
    assert centre_crop(Image.new("RGB", (200_000, 10)), View(64)).size == (64, 64)


@pytest.mark.parametrize("size", [(400, 10), (10, 401), (163, 10), (10, 177)])
def test_a_very_long_image_is_cropped_to_its_middle_before_it_is_resized(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3)).astype(np.uint8))
    left, top = (max(0, (side - 160) // 2) for side in size)
    middle = image.crop((left, top, min(size[0], left + 160), min(size[1], top + 160)))
    assert max(middle.size) == 160
    for view in (View(20, 1.0), View(24, 0.8, "nearest")):
        assert np.array_equal(np.array(centre_crop(image, view)), np.array(centre_crop(middle, view)))


@pytest.mark.parametrize("size", [(160, 10), (10, 155)])
def test_an_image_within_the_aspect_ratio_is_resized_whole(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3)).astype(np.uint8))
    scale = 40 / 10
    whole = image.resize([int(scale * side) for side in size], Image.Resampling.BILINEAR)
    left, top = (round((side - 40) / 2) for side in whole.size)
    assert np.array_equal(
        np.array(centre_crop(image, View(40, 1.0))), np.array(whole.crop((left, top, left + 40, top + 40)))
    )


@pytest.mark.parametrize("size", [(50, 37), (40, 400), (224, 224)])
def test_squash_is_two_resizes_as_in_the_published_scripts(size):
    from torchvision.transforms import Resize

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3)).astype(np.uint8))
    expected = Resize((28, 28))(Resize(32)(image))
    view = View(28, crop="squash")
    assert np.array_equal(np.array(centre_crop(image, view)), np.array(expected))
    assert "shorter side resized to 32, bilinear, then squashed into a square" in describe_view(view)
