"""`odcft clusters RUN --near-duplicates`, on a small run with copies of some of its images."""

import csv
import json

import pytest
from PIL import Image
from run_folders import finished_run

from odcft.backbone.load import load_backbone
from odcft.backbone.timm_folder import write_timm


@pytest.fixture
def run(tmp_path, make_images):
    """24 images, of which 3 have a copy re-encoded as BMP (a larger file) and one a copy of its bytes."""
    images = make_images(tmp_path / "images", 24)
    for name in ("000", "002", "004"):
        with Image.open(images / "a" / f"{name}.png") as image:
            image.save(images / "a" / f"{name} copy.bmp")
    (images / "b" / "бinary.png").write_bytes((images / "b" / "001.png").read_bytes())
    (images / "b" / "broken.png").write_bytes(b"no image")
    run = finished_run(tmp_path / "run", images)
    write_timm(load_backbone("scratch:test_resnet").backbone, run / "backbone", {})
    return run


def test_copies_are_found_and_the_largest_file_is_kept(run, tmp_path, odcft_command):
    out, sheets = tmp_path / "g.csv", tmp_path / "sheets"
    code, said, err = odcft_command(
        *("clusters", run, "--near-duplicates", "--threshold", 0.999, "--out", out, "--sheets", sheets, "--json")
    )
    values = json.loads(said)
    assert code == 0, err
    assert (values["images"], values["groups"], values["in_groups"], values["left"]) == (28, 4, 8, 24)
    assert list(values["unreadable"]) == ["b/broken.png"]
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    groups = [[row["path"] for row in rows if row["group"] == str(n)] for n in range(1, 5)]
    assert sorted(groups) == [
        ["a/000 copy.bmp", "a/000.png"],
        ["a/002 copy.bmp", "a/002.png"],
        ["a/004 copy.bmp", "a/004.png"],
        ["b/001.png", "b/бinary.png"],
    ]
    assert [row["similarity"] for row in rows][::2] == ["1"] * 4
    assert [path.name for path in sheets.iterdir()] == ["near_duplicates_01.png"]
    assert "Left        24 images if one of each group is kept, 4 fewer" in err
    code, _, err = odcft_command("clusters", run, "--near-duplicates", "--out", out)
    assert code == 2
    assert "--overwrite" in err


def test_no_group_is_said_and_leaves_neither_rows_nor_sheets(run, tmp_path, odcft_command):
    for name in ("a/000 copy.bmp", "a/002 copy.bmp", "a/004 copy.bmp", "b/бinary.png"):
        (tmp_path / "images" / name).unlink()
    out, sheets = tmp_path / "g.csv", tmp_path / "sheets"
    sheets.mkdir()
    (sheets / "near_duplicates_01.png").write_bytes(b"of an earlier search")
    words = ("clusters", run, "--near-duplicates", "--threshold", 1, "--out", out, "--sheets", sheets, "--overwrite")
    code, _, err = odcft_command(*words)
    assert code == 0, err
    assert "Look alike  none of 24 images in" in err
    assert "its header only" in err
    assert "no contact sheets: there is no group to draw" in err
    assert out.read_text().split() == ["group,path,similarity"]
    assert list(sheets.iterdir()) == []
