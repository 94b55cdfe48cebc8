"""List files and tables as people write them, and what is said about those that are something else."""

import pytest

from odcft.data.sources import find_images
from odcft.errors import OdcftError

NAMES = ["a/000.png", "b/001.png"]


@pytest.mark.parametrize("column", ["Path", "filename", "File_Name", "file", "image", "image_path", "IMG", " name "])
@pytest.mark.parametrize("label", ["Label", "class", "labels", "category", "Target"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_columns_have_many_names_and_delimiters(tmp_path, make_images, column, label, delimiter):
    rows = [("id", column, label), *((str(i), name, "xy"[i]) for i, name in enumerate(NAMES))]
    text = "\r\n".join(delimiter.join(f'"{cell}"' for cell in row) for row in rows)
    (tmp_path / "l.csv").write_text(f"\ufeff{text}\r\n\r\n", encoding="utf-8")
    found = find_images(tmp_path / "l.csv")
    assert found.names == NAMES
    assert found.labels == ["x", "y"]


def test_path_and_label_win(tmp_path):
    (tmp_path / "l.csv").write_text("image,path,class,label\n7,a.png,3,cat\n")
    assert find_images(tmp_path / "l.csv").names == ["a.png"]
    assert find_images(tmp_path / "l.csv").labels == ["cat"]


def test_blank_lines_before_the_header_do_not_matter(tmp_path):
    (tmp_path / "l.csv").write_text("\n\r\n\npath\na.png\n")
    assert find_images(tmp_path / "l.csv").names == ["a.png"]


REFUSED = {
    "two columns of paths": ("l.csv", "image,file\na,b\n", r"several columns that may hold the paths: image, file\."),
    "other columns": ("l.csv", "id;kind\n1;2\n", r"no column `path`; its columns are: id;kind\."),
    "no header": ("l.csv", "a/000.png,cat\n", r"no header: its first line, 'a/000.png,cat', is already an image"),
    "no header, another delimiter": ("l.csv", "cat;a/000.png\n", "is already an image"),
    "no header, not there": ("l.tsv", "x.JPG\t1\n", "no header"),
    "no header, without an ending": ("l.csv", "7,plain\n", "no header"),
    "an empty table": ("l.csv", "", "no column `path`; its columns are: none"),
    "a header alone": ("l.csv", "path,label\n", "lists no images"),
    "path and label in a .txt": (
        "l.txt",
        "a/000.png 3\nb/001.png 4\n",
        r"Save it as a \.csv with the columns path,label",
    ),
    "a table in a .txt": ("l.txt", "path,label\na/000.png,3\n", r"Save it as a \.csv"),
    "a table without a header in a .txt": ("l.txt", "a/000.png;3\n", r"Save it as a \.csv"),
    "an open quote": ("l.csv", 'path\n"' + "a\n" * 100_000, "field larger than field limit"),
    "a long line": ("l.csv", "a" * 200_000, "too long for a header"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_list_is_refused_with_what_was_found(tmp_path, make_images, case):
    make_images(tmp_path, 2)
    (tmp_path / "plain").touch()
    name, text, message = REFUSED[case]
    (tmp_path / name).write_text(text)
    with pytest.raises(OdcftError, match=message) as told:
        find_images(tmp_path / name)
    assert "\n" not in str(told.value)


def test_a_path_with_blanks_and_commas_in_a_txt_is_a_path(tmp_path, make_images):
    make_images(tmp_path, 2)
    (tmp_path / "a/000.png").rename(tmp_path / "a/0 1,2;3.png")
    (tmp_path / "l.txt").write_text("a/0 1,2;3.png\n")
    assert find_images(tmp_path / "l.txt").names == ["a/0 1,2;3.png"]
