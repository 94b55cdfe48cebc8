"""Mean and standard deviation of pixels."""

import numpy as np
import pytest
import torch
from image_files import write_tiff
from PIL import Image

from odcft.data.pixel_statistics import PixelStatistics, all_gray, in_color, measure
from odcft.data.sources import find_images
from odcft.data.view import View


def test_the_same_as_numpy_in_any_division():
    draw = np.random.default_rng(0)
    images = [draw.random((3, 5, size)) for size in (4, 7, 9)]
    whole, parts = PixelStatistics(), [PixelStatistics(), PixelStatistics(), PixelStatistics()]
    for image, part in zip(images, [parts[0], parts[0], parts[1]], strict=True):
        whole.add(image)
        part.add(image)
    merged = parts.pop()
    for part in parts:
        merged.merge(part)
    pixels = np.concatenate([image.reshape(3, -1) for image in images], 1)
    for found in (whole, merged):
        mean, std = found.mean_and_std()
        assert mean == pytest.approx(pixels.mean(1), abs=6e-5)
        assert std == pytest.approx(pixels.std(1), abs=6e-5)
        assert found.images == 3


def test_images_with_another_number_of_channels_are_left_out():
    found = PixelStatistics()
    found.add(np.full((3, 2, 2), 0.5))
    found.add(np.full((1, 2, 2), 1.0))
    assert found.mean_and_std() == ([0.5] * 3, [0.001] * 3)
    assert found.images == 1


def test_the_colours_of_a_network():
    pixels = torch.tensor([255, 0, 51], dtype=torch.uint8).view(3, 1, 1)
    assert in_color(pixels, "rgb").ravel().tolist() == [1, 0, 0.2]
    assert in_color(pixels, "bgr").ravel().tolist() == [0.2, 0, 1]
    assert in_color(pixels, "gray").ravel() == pytest.approx([0.299 + 0.2 * 0.114])


def test_unreadable_images_are_left_out(tmp_path, make_images):
    make_images(tmp_path, 12)
    for i in range(40):
        (tmp_path / f"{i:02d}.png").write_bytes(b"no image")
    found = measure(find_images(tmp_path), View(32), "rgb", 0)
    assert found.images == 12
    assert measure(find_images(tmp_path), View(32), "rgb", 0, sample=26).images == 6


def test_a_set_is_gray_if_no_image_that_can_be_read_has_colour(tmp_path):
    for i in range(4):
        Image.new("L", (16, 16), 50 * i).save(tmp_path / f"{i}.jpg", quality=60)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    assert all_gray(find_images(tmp_path), View(8))
    Image.new("RGB", (16, 16), (100, 104, 100)).save(tmp_path / "tinted.png")
    assert not all_gray(find_images(tmp_path), View(8))
    for path in tmp_path.iterdir():
        path.write_bytes(b"no image")
    assert not all_gray(find_images(tmp_path), View(8))


def test_bands_in_the_range_of_the_set(tmp_path):
    write_tiff(tmp_path / "x.tif", np.full((8, 8, 5), [0, 1000, 2000, 3000, 4000], np.uint16), 1, [0] * 4)
    found = measure(find_images(tmp_path), View(8, 1.0, intensity=(0, 4000), bands=5), "bands", 0)
    assert found.mean_and_std()[0] == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.003)
    assert not all_gray(find_images(tmp_path), View(8, 1.0, intensity=(0, 4000), bands=5))
