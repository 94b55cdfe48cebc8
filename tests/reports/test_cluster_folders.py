"""Folders of links: names are safe whatever the images are called, and nothing outside is written or removed."""

import csv
import os

import pytest
from folders import tree
from PIL import Image
from run_folders import finished_run

from odcft.cluster_listing import clusters
from odcft.errors import OdcftError
from odcft.reports.cluster_folders import MAX_NAME, file_name, folder_name


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a/b/photo.jpg", "00007_photo.jpg"),
        ("-rf.png", "00007_-rf.png"),
        ("shard.tar/../..", "00007_"),
        ("../../etc/passwd", "00007_passwd"),
        ("C:\\photos\\1.jpg", "00007_1.jpg"),
        ('a/b<c>:"|?*.jpg', "00007_b_c______.jpg"),
        ("new\nline\x1b[31m.png", "00007_new_line_[31m.png"),
        ("right\u202eto left.png", "00007_right_to left.png"),
        ("фото/кот.jpg", "00007_кот.jpg"),
        ("bytes\udcff.png", "00007_bytes\udcff.png"),
        ("train.parquet/12", "00007_12.jpg"),
        ("con. . ", "00007_con"),
    ],
)
def test_a_name_is_safe_and_still_tells_which_image_it_is(path, expected):
    assert file_name(7, path, ending=".jpg" if path.endswith("12") else "") == expected


@pytest.mark.parametrize("stem", ["x" * 400, "я" * 200, "猫" * 120, "\udcff" * 300, "😺" * 90])
def test_a_long_name_is_cut_to_what_file_systems_take(stem):
    name = file_name(7, f"a/{stem}.jpeg")
    assert MAX_NAME - 8 < len(os.fsencode(name)) <= MAX_NAME
    assert name.startswith(f"00007_{stem[:50]}")
    assert name.endswith(".jpeg")
    assert len(os.fsencode(file_name(7, f"a.{stem}"))) <= MAX_NAME  # an ending as long as that is no ending


def test_all_numbers_of_clusters_have_equally_many_digits():
    assert (folder_name(3, 10), folder_name(3, 10_001)) == ("cluster_0003", "cluster_00003")


@pytest.fixture
def images(tmp_path):
    """Nine images with names to beware of; two of one name."""
    names = ("a/same.png", "b/same.png", "-rf.png", "ко т.png", "new\nline.png", "b/'$(touch x)'.png", "c.png", "d.png")
    for number, name in enumerate((*names, "z" * 240 + ".png")):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number * 20, 0, 0)).save(path)
    return tmp_path / "images"


@pytest.mark.parametrize("links", ["absolute", "relative", "copy"])
def test_every_image_is_in_the_folder_of_its_cluster(images, tmp_path, links):
    run = finished_run(tmp_path / "run", images)
    before = tree(tmp_path)
    values = clusters(run, folders=tmp_path / "out", links=links)
    assert (values["linked"], values["folder_count"], values["gone"]) == (9, 3, 0)
    with (tmp_path / "out" / "images.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    for row in rows:
        path = tmp_path / "out" / row["folder"] / row["file"]
        assert path.is_symlink() == (links != "copy")
        assert path.read_bytes() == (images / row["path"]).read_bytes()
        if links != "copy":
            assert os.path.isabs(os.readlink(path)) == (links == "absolute")
    assert {place: what for place, what in tree(tmp_path).items() if not place.startswith("out")} == before
    assert not list((tmp_path / "out").glob(".*"))


def test_overwrite_replaces_what_was_written_and_nothing_else(images, tmp_path):
    run, out = finished_run(tmp_path / "run", images), tmp_path / "out"
    clusters(run, folders=out)
    with pytest.raises(OdcftError, match="not empty"):
        clusters(run, folders=out)
    clusters(run, folders=out, links="copy", overwrite=True)
    clusters(run, folders=out, overwrite=True)
    before = tree(out)
    for mine in ("notes.txt", "cluster_0000/notes.txt", "cluster_0009/me.png", "mine/"):
        if mine.endswith("/"):
            (out / mine).mkdir()
        else:
            (out / mine).parent.mkdir(exist_ok=True)
            (out / mine).write_text("mine")
        with pytest.raises(OdcftError, match="did not write"):
            clusters(run, folders=out, overwrite=True)
        (out / mine).rmdir() if mine.endswith("/") else (out / mine).unlink()
    (out / "cluster_0009").rmdir()
    link = next((out / "cluster_0001").iterdir())
    link.unlink()
    link.write_text("a drawing in its place")
    with pytest.raises(OdcftError, match="did not write"):
        clusters(run, folders=out, overwrite=True)
    link.unlink()
    clusters(run, folders=out, overwrite=True)
    assert tree(out) == before


def test_a_list_that_names_files_outside_removes_none(images, tmp_path, outside):
    run, out = finished_run(tmp_path / "run", images), tmp_path / "out"
    out.mkdir()
    (out / "images.csv").write_text(f"folder,file,path,kind\n..,outside/precious,x,copy\n{outside},precious,x,copy\n")
    before = tree(outside)
    clusters(run, folders=out, overwrite=True)
    assert tree(outside) == before
    (tmp_path / "link").symlink_to(outside)
    with pytest.raises(OdcftError, match="is a link"):
        clusters(run, folders=tmp_path / "link", overwrite=True)
    (out / "cluster_0000" / "more").symlink_to(outside)
    with pytest.raises(OdcftError, match="did not write"):
        clusters(run, folders=out, overwrite=True)
    assert tree(outside) == before


def test_images_in_a_tar_are_copied_with_an_ending(images, tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for number, path in enumerate(sorted(images.rglob("*.png"))):
            tar.add(path, f"x/-{number}.png")
    run = finished_run(tmp_path / "run", tmp_path / "shard.tar")
    values = clusters(run, folders=tmp_path / "out")
    assert values["links"] == "copy"
    written = [path for path in (tmp_path / "out").rglob("*.png") if path.is_file() and not path.is_symlink()]
    assert len(written) == values["linked"] == 9
    assert {path.read_bytes() for path in written} == {path.read_bytes() for path in images.rglob("*.png")}


def test_without_room_or_links_it_says_so(images, tmp_path, monkeypatch):
    run = finished_run(tmp_path / "run", images)
    monkeypatch.setattr("os.symlink", lambda *args: (_ for _ in ()).throw(OSError(1, "Operation not permitted")))
    with pytest.raises(OdcftError, match="--links copy"):
        clusters(run, folders=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(OdcftError, match="GB left"):
        clusters(run, folders=tmp_path / "out", links="copy")
    assert not (tmp_path / "out").exists()


def test_a_list_that_names_other_files_is_not_believed(images, tmp_path):
    run, out = finished_run(tmp_path / "run", images), tmp_path / "forged"
    (out / "docs").mkdir(parents=True)
    (out / "docs" / "thesis.tex").write_text("mine")
    (out / "images.csv").write_text("folder,file,path,kind\ndocs,thesis.tex,a,copy\n")
    with pytest.raises(OdcftError, match="holds files odcft did not write"):
        clusters(run, folders=out, overwrite=True)
    assert (out / "docs" / "thesis.tex").read_text() == "mine"
