"""Sheets of clusters, and which images to label first."""

import csv

import numpy as np
import pytest
from folders import tree
from PIL import Image
from run_folders import finished_run

from odcft.cluster_listing import clusters
from odcft.data.sources import find_images
from odcft.errors import OdcftError
from odcft.reports.cluster_sheets import choose_rows


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("count", [1, 8, 9, 16, 17, 24, 25, 100])
def test_no_image_is_twice_on_a_sheet(count):
    rows = choose_rows(np.arange(count), cluster=3)
    shown = np.concatenate(list(rows.values()))
    assert len(set(shown.tolist())) == len(shown) == min(count, 24)
    assert rows["nearest to the centroid"][0] == 0
    if count > 8:
        assert rows["farthest"][0] == count - 1
    if count == 100:
        assert not np.array_equal(rows["at random"], choose_rows(np.arange(100), 4)["at random"])


def test_the_nearest_of_the_largest_cluster_is_labelled_first(tmp_path, make_images):
    images = make_images(tmp_path / "images", 30)
    labels = [1] * 5 + [2] * 20 + [0] * 5
    run = finished_run(tmp_path / "run", images, clusters=4, labels=labels, distances=list(np.linspace(1, 0, 30)))
    values = clusters(run, sheets=tmp_path / "sheets", most=2)
    assert (values["drawn"], values["listed"], values["unreadable"]) == (2, 3, 0)
    names = sorted(path.name for path in (tmp_path / "sheets").iterdir())
    assert names == ["cluster_0000.png", "cluster_0002.png", "label_first.csv", "label_first_01.png", "sheets.csv"]
    first = read(tmp_path / "sheets" / "label_first.csv")
    assert [(row["cluster"], row["images"], row["label"]) for row in first] == [
        ("2", "20", ""),
        ("0", "5", ""),
        ("1", "5", ""),
    ]
    assert [row["path"].removeprefix(f"{images}/") for row in first] == ["b/019.png", "b/029.png", "a/008.png"]
    listed = find_images(tmp_path / "sheets" / "label_first.csv")  # with labels filled in, `evaluate` takes it
    assert list(listed.names) == [row["path"] for row in first]
    assert list(listed.class_labels()) == ["", "", ""]
    where = read(tmp_path / "sheets" / "sheets.csv")
    assert (where[0]["sheet"], where[0]["column"], where[0]["path"]) == ("cluster_0002.png", "1", "b/019.png")
    with Image.open(tmp_path / "sheets" / "cluster_0002.png") as sheet:
        assert sheet.size[0] > 800


def test_a_broken_image_leaves_its_place_empty_and_is_counted(tmp_path, make_images):
    images = make_images(tmp_path / "images", 9)
    run = finished_run(tmp_path / "run", images)
    (images / "a" / "000.png").write_bytes(b"broken since")
    (images / "a" / "002.png").unlink()
    values = clusters(run, sheets=tmp_path / "sheets")
    assert (values["gone"], values["drawn"]) == (1, 3)
    assert values["unreadable"] == 2  # on its cluster's sheet, and on the page of those to label first


def test_overwrite_replaces_sheets_and_nothing_else(tmp_path, make_images):
    run = finished_run(tmp_path / "run", make_images(tmp_path / "images", 9))
    out = tmp_path / "sheets"
    clusters(run, sheets=out)
    before = tree(out)
    with pytest.raises(OdcftError, match="not empty"):
        clusters(run, sheets=out)
    clusters(run, sheets=out, overwrite=True)
    assert tree(out) == before
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OdcftError, match="did not write"):
        clusters(run, sheets=out, overwrite=True)
    with pytest.raises(OdcftError, match="among the images"):
        clusters(run, sheets=tmp_path / "images" / "sheets")
    assert not (tmp_path / "images" / "sheets").exists()
