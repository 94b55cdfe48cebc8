import os
import socket

import numpy as np
import pytest
import torch
from PIL import Image

from odcft.data.batches import Crops, TrainingOrder, collate
from odcft.data.duplicates import same_content
from odcft.data.image_decoding import read_image
from odcft.data.intensity_range import usual_side
from odcft.data.sources import find_images
from odcft.data.view import View
from odcft.errors import OdcftError
from odcft.plan import automatic_size
from odcft.recipe import AugmentRecipe


def test_folder_is_searched_recursively_and_sorted(tmp_path, make_images):
    make_images(tmp_path, 6)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_text("no image")
    assert find_images(tmp_path).names == ["a/000.png", "a/002.png", "a/004.png", "b/001.png", "b/003.png", "b/005.png"]
    assert find_images(tmp_path).classes() == ["a"] * 3 + ["b"] * 3


def test_list_files(tmp_path, make_images):
    make_images(tmp_path / "images", 4)
    (tmp_path / "l.txt").write_text("images/a/000.png\n\nimages/b/001.png\n")
    (tmp_path / "l.csv").write_text("path,label\nimages/a/000.png,cat;dog\nimages/b/001.png,dog\n")
    assert find_images(tmp_path / "l.txt").names == ["images/a/000.png", "images/b/001.png"]
    listed = find_images(tmp_path / "l.csv")
    assert listed.classes() == ["cat;dog", "dog"]
    assert read_image(listed.path(0)).size == (32, 32)


@pytest.mark.parametrize("name", ["missing", "empty", "page.html", "l.csv", "l.txt"])
def test_what_is_no_image_set_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "page.html").write_text("x")
    (tmp_path / "l.csv").write_text("file,kind\na,b\n")
    (tmp_path / "l.txt").write_text("\n")
    with pytest.raises(OdcftError):
        find_images(tmp_path / name)


@pytest.mark.parametrize("quote", ["", '"'])
@pytest.mark.parametrize(("ending", "delimiter"), [(".csv", ","), (".csv", ";"), (".csv", "\t"), (".tsv", "\t")])
def test_blanks_case_and_delimiters_of_a_table_are_forgiven(tmp_path, make_images, ending, delimiter, quote):
    make_images(tmp_path, 2)
    labels = "cat" if delimiter == ";" else "cat ; dog"
    rows = [("Path ", " LABEL"), ("a/000.png", labels), ("", ""), ("b/001.png", "dog ")]
    lines = [f"{quote}{a}{quote}{delimiter} {quote}{b}{quote}" if a else "" for a, b in rows]
    (tmp_path / f"l{ending}").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    listed = find_images(tmp_path / f"l{ending}")
    assert listed.names == ["a/000.png", "b/001.png"]
    assert listed.classes() == [labels.replace(" ", ""), "dog"]
    assert not listed.skipped


def test_table_without_paths_is_refused_with_the_columns_it_has(tmp_path):
    (tmp_path / "l.csv").write_text("file, class\na.png,cat\n")
    with pytest.raises(OdcftError, match=r"needs a header with a column `path`.* Its columns are: file, class\."):
        find_images(tmp_path / "l.csv")


@pytest.mark.parametrize(
    "bad", [b"p\0a\0t\0h\0", "path,label\n".encode("utf-16"), b'path\n"' + 200_000 * b"a" + b'"\n']
)
def test_what_is_no_text_is_no_list(tmp_path, bad):
    (tmp_path / "l.csv").write_bytes(bad)
    with pytest.raises(OdcftError, match=r"UTF-8|field larger than field limit"):
        find_images(tmp_path / "l.csv")


def test_lines_of_a_list_that_give_no_new_image_are_counted(tmp_path, make_images):
    make_images(tmp_path, 2)
    (tmp_path / "l.csv").write_text(
        "path,label\na/000.png,cat\n,dog\n./a/000.png,dog\na/000.png,cat\nb/001.png\n , x\n"
    )
    listed = find_images(tmp_path / "l.csv")
    assert listed.names == ["a/000.png", "b/001.png"]
    assert listed.labels == ["cat;dog", ""]
    assert listed.not_read() == "2 lines met again, 2 lines without a path"
    (tmp_path / "l.txt").write_text("a/000.png\n\nb/001.png\na//000.png\n")
    assert find_images(tmp_path / "l.txt").skipped == {"line met again": 1}
    assert find_images(tmp_path / "l.txt").without({0}).skipped == {"line met again": 1}


def test_folder_that_links_lead_to_is_read_once_under_its_own_name(tmp_path, make_images):
    make_images(tmp_path / "set", 6)
    make_images(tmp_path / "elsewhere", 2)
    names = find_images(tmp_path / "set").names
    for link, target in {"set/0": "set", "set/a/again": "set/b", "set/b/up": "set", "set/A": "set/a"}.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    assert find_images(tmp_path / "set").names == names
    assert find_images(tmp_path / "set").skipped == {"folder met again": 4}
    for link in ("z", "c", "m"):  # three ways to one folder: the first by name
        (tmp_path / "set" / link).symlink_to(tmp_path / "elsewhere")
    assert find_images(tmp_path / "set").names == sorted([*names, "c/a/000.png", "c/b/001.png"])
    (tmp_path / "other").symlink_to(tmp_path / "set")
    assert find_images(tmp_path / "other").names == sorted([*names, "c/a/000.png", "c/b/001.png"])


def test_what_a_folder_holds_besides_images_is_counted_by_its_ending(tmp_path, make_images):
    make_images(tmp_path, 4)
    for i in range(1200):
        (tmp_path / f"{i}.HEIC").touch()
    for name in ("a/x.xml", "a/y.XML", "README", "b/v.mp4", ".hidden.png", ".DS_Store", ".git/x.png", "a/d.dcm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    images = find_images(tmp_path)
    assert len(images) == 6  # links to nowhere are images that cannot be read
    assert images.not_read().startswith("1,200 .heic, 2 .xml, 1 .dcm, 1 .mp4, 1 file without an ending, 1 folder of a")
    assert images.not_read().endswith("1 of 1 other kinds")
    assert images.skipped["image of a hidden name"] == images.skipped["folder of a hidden name"] == 1
    assert sum(images.skipped.values()) == 1207


def test_folder_without_images_says_what_it_holds(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(3):
        (tmp_path / "a" / f"{i}.heic").touch()
    with pytest.raises(OdcftError, match=r"holds no images \(but 3 \.heic\)\. odcft looks for \.jpg"):
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
    with pytest.raises(OdcftError, match="not images"):
        find_images(tmp_path / "list.txt")
    (tmp_path / "l.csv").write_text("path\npipe.jpg\nzero.jpg\ns.jpg\na\ngone.jpg\na/000.png\n")
    listed = find_images(tmp_path / "l.csv")
    assert usual_side(listed) == 32
    batch = collate([Crops(listed, View(8))[0, i] for i in range(len(listed))])
    assert batch.index_B.tolist() == [5]
    assert [reason for _, reason in sorted(batch.unreadable.items())][:4] == [
        f"a {kind}, no file" for kind in ("pipe", "device", "socket", "folder")
    ]
    assert same_content(listed) == []


ODD = [
    b"\xff\xfe.png",
    b"caf\xe9.png",
    "caf\u00e9 \U0001f600.png".encode(),
    b"a\nb.png",
    b"c,'d\" .png",
    b"\x1b[31mred.png",
]
ODD += [b"-x.png", b"back\\slash.png", b"cr\r.png", b"=1+1.png", b"{x}%s.png", b"[bold]x.png"]


def test_names_that_are_no_utf8_and_others_of_any_bytes_go_through_a_whole_run(tmp_path, make_images, make_checkpoint):
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


def test_images_of_the_same_content_are_found(tmp_path, make_images):
    make_images(tmp_path, 6)
    (tmp_path / "a" / "003.png").write_bytes((tmp_path / "a" / "000.png").read_bytes())
    (tmp_path / "b" / "copy.png").write_bytes((tmp_path / "b" / "005.png").read_bytes())
    (tmp_path / "z.png").symlink_to(tmp_path / "a" / "000.png")
    for name in ("x.png", "y.png"):  # as long, but not the same
        (tmp_path / name).write_bytes(os.urandom((tmp_path / "a" / "000.png").stat().st_size))
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    images = find_images(tmp_path)
    groups = [[images.names[i] for i in rows] for rows in same_content(images)]
    assert groups == [["a/000.png", "a/003.png", "z.png"], ["b/005.png", "b/copy.png"]]


def test_unreadable_image_is_told_and_not_raised(tmp_path, make_images):
    make_images(tmp_path, 2)
    (tmp_path / "a" / "000.png").write_bytes(b"\x89PNG broken")
    crops = Crops(find_images(tmp_path), View(16, 1.0))
    batch = collate([crops[(0, 0)], crops[(0, 1)]])
    assert batch.index_B.tolist() == [1]
    assert list(batch.unreadable) == [0]
    assert batch.pixels.shape == (1, 3, 16, 16)


def test_sixteen_bit_and_palette_and_gray_images_become_rgb(tmp_path):
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray((ramp / 257).astype(np.uint8)).convert("P").save(tmp_path / "palette.gif")
    Image.fromarray((ramp / 257).astype(np.uint8)).save(tmp_path / "gray.png")
    for name in ("deep.png", "palette.gif", "gray.png"):
        pixels = np.array(read_image(str(tmp_path / name)))
        assert pixels.shape == (8, 8, 3)
        assert np.abs(pixels[..., 0].astype(float) - ramp / 257).max() < 2


def test_crops_depend_on_seed_epoch_and_image_only(tmp_path, make_images):
    images = find_images(make_images(tmp_path, 4))
    crops = Crops(images, View(16), AugmentRecipe(), 3)
    assert torch.equal(crops[(5, 1)][0], crops[(5, 1)][0])
    assert not torch.equal(crops[(5, 1)][0], crops[(6, 1)][0])
    assert not torch.equal(crops[(5, 1)][0], Crops(images, View(16), AugmentRecipe(), 4)[(5, 1)][0])


def test_epoch_sees_every_image_once():
    order = TrainingOrder(12, 4, 2, seed=0)
    batches = list(order)
    assert order.steps == len(batches) == 6
    for epoch in (0, 1):
        seen = [key for batch in batches[3 * epoch : 3 * epoch + 3] for key in batch]
        assert sorted(seen) == [(epoch, i) for i in range(12)]


def test_order_goes_on_anywhere():
    whole = list(TrainingOrder(11, 3, 4, seed=0))
    assert list(TrainingOrder(11, 3, 4, seed=0, first_step=7)) == whole[7:]


def test_fewer_images_than_a_batch_make_one_batch():
    assert len(list(TrainingOrder(5, 128, 2, seed=0))) == 2


def test_size_follows_small_images_but_not_beyond_the_network(tmp_path, make_images):
    assert usual_side(find_images(make_images(tmp_path, 4, side=40))) == 40
    assert automatic_size(224, False, 40) == 40
    assert automatic_size(224, False, 20) == 32
    assert automatic_size(224, False, 500) == 224
    assert automatic_size(224, True, 40) == 224


def test_broken_images_are_the_same_with_data_workers(tmp_path, make_images, make_checkpoint):
    from odcft.files import read_column
    from odcft.recipe import load_recipe
    from odcft.train import fine_tune

    make_images(tmp_path / "set", 16)
    for i in (0, 5, 6, 11):
        path = tmp_path / "set" / "ab"[i % 2] / f"{i:03d}.png"
        path.write_bytes(path.read_bytes()[: 40 + 10 * i])
    os.mkfifo(tmp_path / "set" / "pipe.png")
    (tmp_path / "l.txt").write_text(
        "\n".join(["set/pipe.png", *(f"set/{n}" for n in find_images(tmp_path / "set").names)])
    )
    checkpoint = str(make_checkpoint(tmp_path / "c.pth"))
    told = []
    for workers in (0, 2):
        quick = ["optim.batch_size=4", "optim.epochs=1", "neck.hidden=16", "neck.dim=8", "log.tensorboard=false"]
        run = tmp_path / f"run{workers}"
        done = fine_tune(
            checkpoint, str(tmp_path / "l.txt"), run, load_recipe("small", [*quick, f"data.workers={workers}"])
        )
        told.append((done["images"], done["unreadable"], done["loss"], (run / "quarantine.csv").read_text()))
    assert told[0] == told[1]
    assert told[0][:2] == (12, 5)
    assert read_column(tmp_path / "run0" / "quarantine.csv", "reason")[0] == "a pipe, no file"


def test_evaluation_without_one_readable_image_says_so(tmp_path, make_images):
    from odcft.evaluation.comparison import evaluate

    make_images(tmp_path, 16)
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(
        OdcftError, match=r"None of the 16 images in .* can be read; a/000\.png: .*not an image of a format"
    ):
        evaluate("scratch:test_resnet", str(tmp_path), None, ["svm", "knn"])


def test_evaluation_says_what_it_left_out(tmp_path, make_images, capfd):
    from odcft.evaluation.comparison import evaluate

    for folder, side in (("train", 32), ("test", 40)):
        make_images(tmp_path / folder, 24, side)
        (tmp_path / folder / "a" / "000.png").write_bytes(b"no image")
        (tmp_path / folder / "a" / "x.heic").touch()
    evaluate("scratch:test_resnet", str(tmp_path / "train"), str(tmp_path / "test"), ["knn"])
    said = capfd.readouterr().err
    assert "Not read    2 .heic" in said
    assert "2 of 48 images cannot be read: " in said


@pytest.mark.parametrize("size", [None, 16, 40])
def test_images_too_small_for_a_network_are_refused_in_evaluation(tmp_path, make_images, size):
    from odcft.evaluation.comparison import evaluate

    with pytest.raises(OdcftError, match=r"cannot process images of \d+ pixels"):
        evaluate("scratch:alexnet", str(make_images(tmp_path, 8)), None, ["knn"], size=size)


def test_what_is_not_read_is_said_once_by_training_and_pretext(tmp_path, make_images, make_checkpoint, capfd):
    from odcft.first_memory import init_memory
    from odcft.pretexts.training import train_pretext
    from odcft.recipe import load_recipe

    data = make_images(tmp_path / "set", 12)
    for i in range(3):
        (data / f"{i}.heic").touch()
    (data / "again").symlink_to(data)
    quick = ["optim.batch_size=4", "optim.epochs=1", "data.size=32"]
    init_memory(str(make_checkpoint(tmp_path / "c.pth")), str(data), tmp_path / "m", load_recipe("small", quick))
    assert capfd.readouterr().err.count("Not read    3 .heic, 1 folder met again\n") == 1
    train_pretext("rotation", str(data), "test_resnet", tmp_path / "p.pth", load_recipe("pretext", quick))
    assert capfd.readouterr().err.count("Not read    3 .heic, 1 folder met again\n") == 1
