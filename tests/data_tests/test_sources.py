"""Which images a folder or a list file holds, and what else is counted."""

import os
import socket

import numpy as np
import pytest
import torch

from odcft.data.batches import Crops, collate
from odcft.data.duplicates import identical_files
from odcft.data.image_decoding import read_image
from odcft.data.intensity_range import median_shorter_side
from odcft.data.sources import find_images
from odcft.data.view import View
from odcft.errors import OdcftError


def test_folder_is_searched_recursively_and_sorted(tmp_path, make_images):
    make_images(tmp_path, 6)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_text("no image")
    assert find_images(tmp_path).names == ["a/000.png", "a/002.png", "a/004.png", "b/001.png", "b/003.png", "b/005.png"]
    assert find_images(tmp_path).class_labels() == ["a"] * 3 + ["b"] * 3


def test_names_are_sorted_as_whole_paths(tmp_path):
    """As the versions before the index sorted them: a RUN of theirs can be resumed."""
    draw = np.random.default_rng(0)
    for _ in range(300):
        parts = ["".join(draw.choice(list("aA0!-./\u00e9\uff01\U0001f600"), 2)) for _ in range(draw.integers(1, 4))]
        path = tmp_path / ("/".join(parts).strip("/") + "x.png")
        if not any(part.startswith(".") for part in path.relative_to(tmp_path).parts):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    names = [os.path.relpath(os.path.join(top, f), tmp_path) for top, _, found in os.walk(tmp_path) for f in found]
    assert len(names) > 100
    assert find_images(tmp_path).names == sorted(names)


def test_list_files(tmp_path, make_images):
    make_images(tmp_path / "images", 4)
    (tmp_path / "l.txt").write_text("images/a/000.png\n\nimages/b/001.png\n")
    (tmp_path / "l.csv").write_text("path,label\nimages/a/000.png,cat;dog\nimages/b/001.png,dog\n")
    assert find_images(tmp_path / "l.txt").names == ["images/a/000.png", "images/b/001.png"]
    listed = find_images(tmp_path / "l.csv")
    assert listed.class_labels() == ["cat;dog", "dog"]
    assert read_image(listed.read(0)).size == (32, 32)


@pytest.mark.parametrize("name", ["missing", "empty", "page.html", "l.csv", "l.txt"])
def test_a_path_that_is_not_a_set_of_images_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "page.html").write_text("x")
    (tmp_path / "l.csv").write_text("id,kind\na,b\n")
    (tmp_path / "l.txt").write_text("\n")
    with pytest.raises(OdcftError):
        find_images(tmp_path / name)


@pytest.mark.parametrize("quote", ["", '"'])
@pytest.mark.parametrize(("ending", "delimiter"), [(".csv", ","), (".csv", ";"), (".csv", "\t"), (".tsv", "\t")])
def test_spaces_case_and_delimiters_of_a_table_do_not_matter(tmp_path, make_images, ending, delimiter, quote):
    make_images(tmp_path, 2)
    labels = "cat" if delimiter == ";" else "cat ; dog"
    rows = [("Path ", " LABEL"), ("a/000.png", labels), ("", ""), ("b/001.png", "dog ")]
    lines = [f"{quote}{a}{quote}{delimiter} {quote}{b}{quote}" if a else "" for a, b in rows]
    (tmp_path / f"l{ending}").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    listed = find_images(tmp_path / f"l{ending}")
    assert listed.names == ["a/000.png", "b/001.png"]
    assert listed.class_labels() == [labels.replace(" ", ""), "dog"]
    assert not listed.skipped


def test_a_table_without_paths_is_refused_with_its_columns(tmp_path):
    (tmp_path / "l.csv").write_text("id, class\na.png,cat\n")
    with pytest.raises(
        OdcftError, match=r"has no column `path`; its columns are: id, class\. It needs a header with `path`"
    ):
        find_images(tmp_path / "l.csv")


@pytest.mark.parametrize(
    "bad", [b"p\0a\0t\0h\0", "path,label\n".encode("utf-16"), b'path\n"' + 200_000 * b"a" + b'"\n']
)
def test_a_list_that_is_not_text_is_refused(tmp_path, bad):
    (tmp_path / "l.csv").write_bytes(bad)
    with pytest.raises(OdcftError, match=r"UTF-8|field larger than field limit"):
        find_images(tmp_path / "l.csv")


def test_duplicate_lines_and_lines_without_a_path_are_counted(tmp_path, make_images):
    make_images(tmp_path, 2)
    (tmp_path / "l.csv").write_text(
        "path,label\na/000.png,cat\n,dog\n./a/000.png,dog\na/000.png,cat\nb/001.png\n , x\n"
    )
    listed = find_images(tmp_path / "l.csv")
    assert listed.names == ["a/000.png", "b/001.png"]
    assert listed.labels == ["cat;dog", ""]
    assert listed.skipped_summary() == "2 duplicate lines, 2 lines without a path"
    (tmp_path / "l.txt").write_text("a/000.png\n\nb/001.png\na//000.png\n")
    assert find_images(tmp_path / "l.txt").skipped == {"duplicate line": 1}
    assert find_images(tmp_path / "l.txt").without({0}).skipped == {"duplicate line": 1}


def test_a_symlinked_folder_is_read_once_under_its_real_name(tmp_path, make_images):
    make_images(tmp_path / "set", 6)
    make_images(tmp_path / "elsewhere", 2)
    names = find_images(tmp_path / "set").names
    for link, target in {"set/0": "set", "set/a/again": "set/b", "set/b/up": "set", "set/A": "set/a"}.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    assert find_images(tmp_path / "set").names == names
    assert find_images(tmp_path / "set").skipped == {"folder already read": 4}
    for link in ("z", "c", "m"):  # three links to one folder: the first by name counts
        (tmp_path / "set" / link).symlink_to(tmp_path / "elsewhere")
    assert find_images(tmp_path / "set").names == sorted([*names, "c/a/000.png", "c/b/001.png"])
    (tmp_path / "other").symlink_to(tmp_path / "set")
    assert find_images(tmp_path / "other").names == sorted([*names, "c/a/000.png", "c/b/001.png"])


def test_other_files_in_a_folder_are_counted_by_extension(tmp_path, make_images):
    make_images(tmp_path, 4)
    for i in range(1200):
        (tmp_path / f"{i}.PSD").touch()
    for name in ("a/x.xml", "a/y.XML", "README", "b/v.mp4", ".hidden.png", ".DS_Store", ".git/x.png", "a/d.cdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    images = find_images(tmp_path)
    assert len(images) == 6  # dangling links count as images that cannot be read
    assert images.skipped_summary().startswith(
        "1,200 .psd, 2 .xml, 1 .cdf, 1 .mp4, 1 file without an extension, 1 hidden folder"
    )
    assert images.skipped_summary().endswith("1 of 1 other kinds")
    assert images.skipped["hidden image"] == images.skipped["hidden folder"] == 1
    assert sum(images.skipped.values()) == 1207


def test_a_folder_without_images_is_refused_with_what_it_holds(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(3):
        (tmp_path / "a" / f"{i}.psd").touch()
    with pytest.raises(OdcftError, match=r"holds no images \(but 3 \.psd\)\. odcft looks for \.jpg"):
        find_images(tmp_path)


def test_only_regular_files_are_images(tmp_path, make_images):
    make_images(tmp_path, 2)
    os.mkfifo(tmp_path / "pipe.jpg")
    os.mkfifo(tmp_path / "list.txt")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "s.jpg"))
        images = find_images(tmp_path)
    assert images.names == ["a/000.png", "b/001.png"]
    assert images.skipped == {"pipe": 2, "socket": 1, "device": 1}
    with pytest.raises(OdcftError, match="neither a folder nor a list"):
        find_images(tmp_path / "list.txt")
    (tmp_path / "l.csv").write_text("path\npipe.jpg\nzero.jpg\ns.jpg\na\ngone.jpg\na/000.png\n")
    listed = find_images(tmp_path / "l.csv")
    assert median_shorter_side(listed) == 32
    batch = collate([Crops(listed, View(8))[0, i] for i in range(len(listed))])
    assert batch.index_B.tolist() == [5]
    assert [reason for _, reason in sorted(batch.unreadable.items())][:4] == [
        f"a {kind}, not a file" for kind in ("pipe", "device", "socket", "folder")
    ]
    assert identical_files(listed) == []


ODD = [
    b"\xff\xfe.png",
    b"caf\xe9.png",
    "caf\u00e9 \U0001f600.png".encode(),
    b"a\nb.png",
    b"c,'d\" .png",
    b"\x1b[31mred.png",
]


ODD += [b"-x.png", b"back\\slash.png", b"cr\r.png", b"=1+1.png", b"{x}%s.png", b"[bold]x.png"]


def test_file_names_with_any_bytes_survive_a_whole_run(tmp_path, make_images, make_checkpoint):
    import pyarrow.parquet as pq

    from odcft.evaluation.comparison import evaluate
    from odcft.files import read_column
    from odcft.first_memory import init_memory
    from odcft.recipe import load_recipe
    from odcft.train import fine_tune

    make_images(tmp_path / "plain", 12)
    for i, name in enumerate(ODD):
        folder = os.fsencode(tmp_path / "set") + (b"/\xe9t\xe9/", b"/b\xfc/")[i % 2]
        os.makedirs(folder, exist_ok=True)
        os.link(tmp_path / "plain" / "ab"[i % 2] / f"{i:03d}.png", folder + name)
    with open(os.fsencode(tmp_path / "set") + b"/broken\xff\n.png", "wb") as file:
        file.write(b"no image")
    images = find_images(tmp_path / "set")
    good = [name for name in images.names if "broken" not in name]
    assert {os.path.basename(os.fsencode(name)) for name in good} == set(ODD)
    checkpoint, data, run = str(make_checkpoint(tmp_path / "c.pth")), str(tmp_path / "set"), tmp_path / "run"
    quick = ["optim.batch_size=4", "optim.epochs=1", "neck.hidden=16", "neck.dim=8", "log.tensorboard=false"]
    recipe = load_recipe("small", quick)
    init_memory(checkpoint, data, tmp_path / "memory", recipe)
    fine_tune(checkpoint, data, run, recipe, memory=tmp_path / "memory")
    assert fine_tune(checkpoint, data, run, recipe, resume=True, epochs=2)["unreadable"] == 1
    for folder in (run, tmp_path / "memory"):
        assert read_column(folder / "images.csv", "path") == good
        assert read_column(folder / "quarantine.csv", "path") == ["broken\udcff\n.png"]
    written = pq.read_table(run / "clusters.parquet").to_pydict()["path"]
    assert written == [os.fsencode(name).decode("utf-8", "backslashreplace") for name in good]
    assert evaluate(str(run), data, None, ["knn"])["classes"] == ["b\udcfc", "\udce9t\udce9"]
    (tmp_path / "l.txt").write_bytes(
        b"\n".join(b"set/" + os.fsencode(n) for n in good if "\n" not in n and "\r" not in n)
    )
    listed = find_images(tmp_path / "l.txt")
    assert len(listed) == len(good) - 2
    assert all(isinstance(Crops(listed, View(8))[0, i][0], torch.Tensor) for i in range(len(listed)))


def test_training_and_pretext_say_once_what_is_not_read(tmp_path, make_images, make_checkpoint, capfd):
    from odcft.first_memory import init_memory
    from odcft.pretexts.training import train_pretext
    from odcft.recipe import load_recipe

    data = make_images(tmp_path / "set", 12)
    for i in range(3):
        (data / f"{i}.psd").touch()
    (data / "again").symlink_to(data)
    quick = ["optim.batch_size=4", "optim.epochs=1", "data.size=32"]
    init_memory(str(make_checkpoint(tmp_path / "c.pth")), str(data), tmp_path / "m", load_recipe("small", quick))
    assert capfd.readouterr().err.count("Not read    3 .psd, 1 folder already read\n") == 1
    train_pretext("rotation", str(data), "test_resnet", tmp_path / "p.pth", load_recipe("pretext", quick))
    assert capfd.readouterr().err.count("Not read    3 .psd, 1 folder already read\n") == 1
