"""`odcft check-data`: what a set of images is."""

import json
import os
import shutil

import numpy as np
import pytest
from folders import tree
from image_files import write_tiff
from PIL import Image

from odcft.check_data import check_data, describe
from odcft.errors import OdcftError


@pytest.fixture
def images(tmp_path, make_images):
    """12 colour images, one of them three times; 2 gray ones, 1 of 12 bits, 3 broken ones and 1 that is not read."""
    folder = make_images(tmp_path / "images")
    for name in ("x.png", "y.png"):
        shutil.copy(folder / "a" / "000.png", folder / name)
    for i in range(2):
        Image.fromarray(np.full((40 + i, 60), 100 + i, np.uint8)).save(folder / f"gray{i}.jpg")
    write_tiff(folder / "deep.tif", np.arange(64 * 64, dtype=np.uint16).reshape(64, 64))
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes((folder / "x.png").read_bytes()[:-60])
    (folder / "text.jpg").write_text("no image")
    (folder / "notes.xml").write_text("")
    return folder


def test_files_that_cannot_be_read_are_no_copies_of_each_other(images):
    for name in ("one.png", "two.png"):
        (images / name).write_bytes(b"")
    assert check_data(str(images))["copies"] == [["a/000.png", "x.png", "y.png"]]


def test_what_is_found(images):
    before = tree(images)
    found = check_data(str(images))
    assert tree(images) == before
    assert (found["images"], found["examined"], found["gray"], found["usable"]) == (20, 20, 3, True)
    assert {(k["format"], k["bits"], k["bands"], k["count"]) for k in found["formats"]} == {
        *(("png", 8, 3, 14), ("jpeg", 8, 1, 2), ("tiff", 16, 1, 1)),
    }
    assert found["copies"] == [["a/000.png", "x.png", "y.png"]]
    assert list(found["broken"]) == ["cut.png", "empty.png", "text.jpg"]
    assert (found["smallest"], found["largest"], found["usual_side"]) == ((32, 32), (64, 64), 32)
    assert found["size"] == 32
    assert found["range"] == pytest.approx((4, 4091), abs=1)
    assert found["clusters"] == 2
    assert found["bytes"] == sum(path.stat().st_size for path in images.rglob("*.*") if path.suffix != ".xml")
    lines = "\n".join(describe(found, list_copies=True))
    assert "20 images in" in lines
    assert "tiff (16 bit, 1 band) 1" in lines
    assert "look alike  2 copies of 1 image\n              a/000.png = x.png = y.png" in lines
    assert "unreadable  3: cut.png (" in lines
    assert "not read    1 .xml" in lines
    assert "Few for ODC: K = 2 by --clusters auto." in lines


def test_mean_and_std_are_those_of_the_pixels(tmp_path):
    for i, value in enumerate((51, 153)):
        for j in range(3):
            Image.new("RGB", (32, 32), (value, 102, 0)).save(tmp_path / f"{i}{j}.png")
    found = check_data(str(tmp_path))
    assert (found["mean"], found["std"]) == ([0.4, 0.4, 0.0], [0.2, 0.001, 0.001])


def test_loader_processes_find_the_same(images, monkeypatch):
    from odcft.data import survey

    alone = check_data(str(images), overrides=["data.workers=0"])
    monkeypatch.setattr(survey, "FEW", 0)
    assert check_data(str(images), overrides=["data.workers=2"]) == alone


def test_a_sample(images):
    found = check_data(str(images), sample=5)
    assert found["examined"] == 5
    assert "  examined    5 of them" in "\n".join(describe(found))


def test_all_gray_images_suggest_the_preset(tmp_path):
    for i in range(8):
        Image.new("L", (32, 32), 30 * i).save(tmp_path / f"{i}.png")
    assert any("--preset gray" in line for line in describe(check_data(str(tmp_path))))


def test_the_command(odcft_command, images):
    code, out, told = odcft_command("check-data", images, "--json", "--duplicates")
    assert code == 0
    assert json.loads(out)["copies"] == [["a/000.png", "x.png", "y.png"]]
    assert f"Next:       odcft finetune CKPT {images} --out RUN --recipe small --dry-run" in told


@pytest.mark.parametrize("kept", [0, 3])
def test_too_few_images_exit_with_2(odcft_command, images, kept):
    good = sorted(path for path in images.rglob("*.*") if path.parent != images)
    for path in [*images.glob("*.*"), *good[kept:]]:
        if path.name != "text.jpg":
            os.unlink(path)
    code, out, told = odcft_command("check-data", images, "--json")
    assert code == 2
    assert json.loads(out)["usable"] is False
    assert ("3 images are too few to cluster" if kept else "Not usable: none of the images can be read.") in told


def test_mistakes(tmp_path, images):
    with pytest.raises(OdcftError, match="does not exist"):
        check_data(str(tmp_path / "nothing"))
    with pytest.raises(OdcftError, match="no such recipe"):
        check_data(str(images), recipe="smal")
