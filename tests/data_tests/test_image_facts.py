"""Width, height and format of all images, from their headers; read again only where a file has changed."""

import os

import numpy as np
import pytest
from PIL import Image

from odcft.data import image_facts as module
from odcft.data import index_cache
from odcft.data.image_facts import FORMATS, image_facts
from odcft.data.images import Images
from odcft.data.sources import find_images


def write_all(folder):
    draw = np.random.default_rng(0)
    folder.mkdir()
    for i, ending in enumerate(["jpg", "png", "webp", "tif", "bmp", "gif", "ppm", "jp2"]):
        pixels = draw.integers(0, 255, (20 + i, 30, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.{ending}")
    Image.fromarray(draw.integers(0, 255, (400, 300, 3)).astype(np.uint8)).save(
        folder / "8.tif", compression="tiff_lzw"
    )
    (folder / "9.png").write_bytes(b"no image")
    (folder / "a.jpg").symlink_to(folder / "nowhere")
    return folder


def test_facts_of_all_formats(tmp_path):
    facts = image_facts(find_images(write_all(tmp_path / "set")))
    names = ["jpeg", "png", "webp", "tiff", "bmp", "gif", "pnm", "jpeg2000", "tiff", "unreadable", "unreadable"]
    assert [FORMATS[i] for i in facts.format] == names
    assert facts.width.tolist() == [30] * 8 + [300, 0, 0]
    assert facts.height.tolist() == [20, 21, 22, 23, 24, 25, 26, 27, 400, 0, 0]
    assert facts.size[0] == (tmp_path / "set/0.jpg").stat().st_size
    assert facts.size[-1] == -1


def test_only_changed_files_are_read_again(tmp_path, monkeypatch):
    monkeypatch.setenv("ODCFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "WORTH_KEEPING", 0)
    monkeypatch.setattr(index_cache, "SAME_TICK", -(10**18))
    data = write_all(tmp_path / "set")
    first = image_facts(find_images(data))
    asked, head = [], Images.head
    monkeypatch.setattr(Images, "head", lambda self, row, most: asked.append(row) or head(self, row, most))
    again = image_facts(find_images(data))
    assert asked == []
    for column in ("width", "height", "format", "size"):
        assert getattr(again, column).tolist() == getattr(first, column).tolist()
    Image.new("RGB", (5, 6)).save(data / "1.png")
    changed = image_facts(find_images(data))
    assert asked == [1]
    assert (changed.width[1], changed.height[1], changed.width[0]) == (5, 6, 30)
    os.rename(data / "2.webp", data / "22.webp")  # other names: all are read again
    assert image_facts(find_images(data)).height[2] == 22
    assert len(asked) == 12


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\xff\xd8\xff\xe0", "jpeg"),
        (b"P6 3 3", "pnm"),
        (b"P6x", "other"),
        (b"\0\0\0\x20ftypavif", "avif"),
        (b"\0\0\0\x20ftypheic", "heic"),
        (b"", "other"),
    ],
)
def test_formats_are_told_by_their_first_bytes(head, kind):
    assert FORMATS[module.format_of(head)] == kind
