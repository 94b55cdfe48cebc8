"""Thumbnails: whole images, small, upright, in order of importance, within their bytes; damaged ones are named."""

import io

import numpy as np
import pytest
from PIL import Image

from odcft.data.images import Images
from odcft.data.thumbnails import encoded, make_thumbnails, thumbnail
from odcft.data.view import View

VIEW = View(32)


def gradient(width, height):
    """Red grows to the right, green downwards."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None, :]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("size", [(1000, 600), (70, 50)])
def test_a_jpeg_is_shown_whole_upright_and_small(tmp_path, size, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    stored = gradient(*size)
    stored = stored if turned[orientation] is None else stored.transpose(turned[orientation])
    stored.save(tmp_path / "a.jpg", quality=95, exif=exif)
    small = np.array(thumbnail(Images(tmp_path, tmp_path, ["a.jpg"]), 0, VIEW, 48))
    assert max(small.shape) == 48
    assert small.shape[0] < small.shape[1]
    assert small[0, 0, 0] < 30
    assert small[0, 0, 1] < 30
    assert small[-1, -1, 0] > 220
    assert small[-1, -1, 1] > 220
    assert small[0, -1, 0] > 220
    assert small[0, -1, 1] < 30


def test_small_images_are_not_enlarged_and_long_ones_are_cropped(tmp_path):
    gradient(10, 8).save(tmp_path / "small.png")
    gradient(4000, 4).save(tmp_path / "long.png")
    images = Images(tmp_path, tmp_path, ["small.png", "long.png"])
    assert thumbnail(images, 0, VIEW, 48).size == (10, 8)
    assert thumbnail(images, 1, VIEW, 48).size == (32, 4)


def test_bytes_are_kept_to_and_damaged_images_are_named(tmp_path):
    names = [f"{i}.png" for i in range(30)]
    for name in names:
        gradient(40, 40).save(tmp_path / name)
    (tmp_path / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "2.png").unlink()
    images, done = Images(tmp_path, tmp_path, names), []
    one = len(encoded(thumbnail(images, 0, VIEW, 32)))
    order = [5, 1, 2, 7, 3, 4]
    options = {"side": 32, "threads": 2, "advance": done.append}
    made, unreadable = make_thumbnails(images, order, VIEW, most_bytes=2.5 * one, **options)
    assert list(made) == [5, 7]
    assert Image.open(io.BytesIO(made[5])).size == (32, 32)
    assert set(unreadable) == {1, 2}
    assert "No such file" in unreadable[2]
    assert sum(done) == 6
    assert make_thumbnails(images, order, VIEW, most_bytes=1e9, most_seconds=-1.0, **options) == ({}, {})


def test_bands_beyond_the_third_are_not_shown(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    bands = np.stack([np.full((20, 20), value, np.uint8) for value in (10, 90, 170, 250)], 2)
    tifffile.imwrite(tmp_path / "a.tif", bands, photometric="minisblack", planarconfig="contig")
    images = Images(tmp_path, tmp_path, ["a.tif"])
    small = thumbnail(images, 0, View(32, bands=4, intensity=(0, 255)), 16)
    assert small.mode == "RGB"
    assert small.getpixel((8, 8)) == (10, 90, 170)
