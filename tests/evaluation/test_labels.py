"""Which images an evaluation counts: each once, with a label, and readable."""

import shutil
import tarfile

import numpy as np
import pytest

from odcft.errors import OdcftError
from odcft.evaluation.labels import describe_left_out, load_labelled_images, without_unreadable


@pytest.fixture
def images(tmp_path, make_images):
    """24 images, folders `a` and `b`."""
    return make_images(tmp_path / "images", 24)


def names(labels, rows):
    return [labels.images.names[i] for i in rows]


def write_list(folder, rows):
    path = folder / "list.csv"
    path.write_text("path,label\n" + "".join(f"{name},{label}\n" for name, label in rows))
    return str(path)


def test_halves_are_stratified(images):
    split = load_labelled_images(str(images), None)
    assert split.classes == ["a", "b"]
    assert split.targets[split.train_rows].sum(0).tolist() == split.targets[split.test_rows].sum(0).tolist() == [6, 6]
    assert sorted([*split.train_rows, *split.test_rows]) == list(range(24))
    assert split.sets == [(str(images), 24)]
    assert not any(split.left_out.values())
    # The split is fixed: with other halves, results could not be compared.
    assert split.test_rows.tolist() == load_labelled_images(str(images), None).test_rows.tolist() == HELD_OUT


HELD_OUT = [0, 1, 2, 3, 5, 10, 15, 16, 17, 19, 21, 23]


def test_odd_images_are_for_training(tmp_path, make_images):
    split = load_labelled_images(str(make_images(tmp_path, 10)), None)
    assert split.targets[split.train_rows].sum(0).tolist() == [3, 3]
    assert split.targets[split.test_rows].sum(0).tolist() == [2, 2]


def test_halves_are_stratified_by_combination_of_labels(images):
    rows = [(f"images/{'ab'[i % 2]}/{i:03d}.png", ["cat;dog", "dog", " cat ;; bird"][i % 3]) for i in range(24)]
    split = load_labelled_images(write_list(images.parent, rows), None)
    assert split.classes == ["bird", "cat", "dog"]
    for half in (split.train_rows, split.test_rows):
        assert split.targets[half].sum(0).tolist() == [4, 8, 8]


def test_a_folder_with_a_semicolon_is_one_class(tmp_path, make_images):
    make_images(tmp_path, 8)
    (tmp_path / "a").rename(tmp_path / "a;b")
    assert load_labelled_images(str(tmp_path), None).classes == ["a;b", "b"]


def test_images_without_a_label_are_left_out_and_reported(images):
    shutil.copy(images / "a" / "000.png", images / "top.png")
    (images / "top.png").write_bytes((images / "top.png").read_bytes() + b"0")
    split = load_labelled_images(str(images), None)
    assert split.classes == ["a", "b"]
    assert names(split, split.left_out["unlabelled"]) == ["top.png"]
    assert len(split.train_rows) + len(split.test_rows) == 24
    assert describe_left_out(split.left_out, split, {}) == ["1 of 25 images has no label: top.png"]


def test_unreadable_images_are_left_out_before_the_set_is_divided(images):
    split = without_unreadable(
        load_labelled_images(str(images), None), {0: "broken", 3: "empty", 1: "broken", 14: "broken"}
    )
    assert split.left_out["unreadable"] == [0, 1, 3, 14]
    assert split.targets[split.train_rows].sum(0).tolist() == [5, 6] or split.targets[split.train_rows].sum() == 11
    assert not {0, 1, 3, 14} & {*split.train_rows, *split.test_rows}
    assert len(split.train_rows) + len(split.test_rows) == 20
    assert describe_left_out(split.left_out, split, {0: "broken", 3: "empty", 1: "broken", 14: "broken"}) == [
        "4 of 24 images cannot be read: a/000.png (broken), a/002.png (broken), a/006.png (empty), …"
    ]


def test_an_image_without_label_that_cannot_be_read_counts_once(images):
    (images / "top.png").write_bytes(b"no image")
    split = load_labelled_images(str(images), None)
    (row,) = split.left_out["unlabelled"]
    split = without_unreadable(split, {row: "broken"})
    assert split.left_out["unlabelled"] == []
    assert split.left_out["unreadable"] == [row]


def test_copies_in_a_set_count_once_and_give_the_split_of_the_list_without_them(images):
    once = load_labelled_images(str(images), None)
    rows = [(f"images/{name}", name[0]) for name in once.images.names]
    for i in range(3):
        shutil.copy(images / "a" / "000.png", images.parent / f"copy_{i}.png")
    split = load_labelled_images(write_list(images.parent, [*rows, *((f"copy_{i}.png", "a") for i in range(3))]), None)
    assert split.left_out["copies"] == [24, 25, 26]
    assert split.train_rows.tolist() == once.train_rows.tolist()
    assert split.test_rows.tolist() == once.test_rows.tolist()
    assert describe_left_out(split.left_out, split, {}, most=2) == [
        "3 of 27 images are the same files as others: copy_0.png, copy_1.png, …"
    ]


def test_unreadable_files_are_not_called_copies_of_each_other(images):
    for name in ("x", "y", "z"):
        (images / "a" / f"{name}.png").write_bytes(b"no image")
    split = load_labelled_images(str(images), None)
    bad = {i: "broken" for i, name in enumerate(split.images.names) if name[2] in "xyz"}
    split = without_unreadable(split, bad)
    assert len(split.left_out["unreadable"]) == 3
    assert split.left_out["copies"] == []


def test_the_same_file_under_two_labels_is_left_out_altogether(images):
    shutil.copy(images / "a" / "000.png", images / "b" / "again.png")
    split = load_labelled_images(str(images), None)
    assert names(split, split.left_out["contradictory"]) == ["a/000.png", "b/again.png"]
    assert len(split.train_rows) + len(split.test_rows) == 23
    assert describe_left_out(split.left_out, split, {}) == [
        "2 of 25 images are the same files as others with different labels: a/000.png, b/again.png"
    ]


def test_images_in_both_sets_are_used_for_testing_only(images, tmp_path):
    test = tmp_path / "test"
    for name in ("a/000.png", "a/002.png", "b/001.png", "b/003.png"):
        (test / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images / name, test / name)
    shutil.copy(images / "a/000.png", test / "a/again.png")
    split = load_labelled_images(str(images), str(test))
    assert len(split.train_rows) == 20
    assert len(split.test_rows) == 4
    assert len(split.left_out["overlap"]) == 4
    assert all(str(test) not in name for name in names(split, split.left_out["overlap"]))
    assert names(split, split.left_out["copies"]) == [str(test / "a/again.png")]
    assert all(str(test) in name for name in names(split, split.test_rows))
    assert split.sets == [(str(images), 24), (str(test), 5)]
    assert describe_left_out(split.left_out, split, {})[0].startswith("4 of 29 images are in --test as well: ")


def test_two_sets_of_the_same_images_are_refused(images, tmp_path):
    shutil.copytree(images, tmp_path / "other")
    for other in (images, tmp_path / "other"):
        with pytest.raises(OdcftError, match=r"Every image of .* is in .* as well: nothing is left to train on"):
            load_labelled_images(str(images), str(other))


def test_copies_among_training_images_count_once(images, make_images, tmp_path):
    shutil.copy(images / "a" / "000.png", images / "a" / "again.png")
    test = make_images(tmp_path / "test", 8, side=40)
    split = load_labelled_images(str(images), str(test))
    assert names(split, split.left_out["copies"]) == [str(images / "a/again.png")]
    assert split.train_rows.tolist() == [i for i in range(25) if i != 12]
    assert split.test_rows.tolist() == list(range(25, 33))
    assert split.too_small == {}


def test_a_class_too_small_for_two_halves_is_reported(images):
    rows = [(f"images/{'ab'[i % 2]}/{i:03d}.png", "few" if i < 3 else "enough" if i < 7 else "many") for i in range(24)]
    split = load_labelled_images(write_list(images.parent, rows), None)
    assert split.too_small == {1: 3}
    split = without_unreadable(split, {3: "broken"})
    assert split.too_small == {0: 3, 1: 3}


def test_missing_labels_are_told_apart_and_unlabelled_is_offered(images, tmp_path):
    empty = tmp_path / "empty.csv"
    empty.write_text("path,label\n" + "".join(f"images/a/{i:03d}.png,\n" for i in (0, 2, 4)))
    for data, why in ((images / "a", "its images are not in folders of classes"), (empty, "column of labels is empty")):
        with pytest.raises(OdcftError, match=f"no labels.*{why}.*--protocol unlabelled"):
            load_labelled_images(str(data), None)
    with pytest.raises(OdcftError) as refused:
        load_labelled_images(str(images), str(empty))
    assert "empty.csv: no labels: its column of labels is empty" in str(refused.value)
    assert "--protocol unlabelled" not in str(refused.value)  # which has no test images


def test_sets_that_cannot_be_divided_are_refused(images, make_images, tmp_path):
    with pytest.raises(OdcftError, match="no labels"):
        load_labelled_images(str(images / "a"), None)
    with pytest.raises(OdcftError, match=r"only one class \(cat\)"):
        load_labelled_images(
            write_list(images.parent, [("images/a/000.png", "cat"), ("images/b/001.png", "cat")]), None
        )
    with pytest.raises(OdcftError, match="fewer than 4 images"):
        load_labelled_images(str(make_images(tmp_path / "six", 6)), None)
    with pytest.raises(OdcftError, match=r"/a: no labels"):
        load_labelled_images(str(images), str(images / "a"))
    other = make_images(tmp_path / "other", 8, side=40)
    (other / "b").rename(other / "c")
    with pytest.raises(OdcftError, match=r"has a class that .* does not have: c"):
        load_labelled_images(str(images), str(other))


def test_a_class_that_loses_its_images_is_refused_with_the_reason(images, make_images, tmp_path):
    split = load_labelled_images(str(images), None)
    bad = {i: "broken" for i, name in enumerate(split.images.names) if name[0] == "b"}
    with pytest.raises(OdcftError, match=r"No image of class b in .*: 12 of 24 images cannot be read: b/001.png \(bro"):
        without_unreadable(split, bad)
    with pytest.raises(OdcftError, match=r"None of the 24 images in [^ ]*images can be read; a/000.png: broken"):
        without_unreadable(split, dict.fromkeys(range(24), "broken"))
    split = load_labelled_images(str(images), str(make_images(tmp_path / "test", 8, side=40)))
    with pytest.raises(OdcftError, match=r"No image of class a in [^ ]*test is left .*: 4 of 32 images cannot be read"):
        without_unreadable(split, dict.fromkeys(range(24, 28), "broken"))
    without_unreadable(split, dict.fromkeys(range(24, 27), "broken"))
    with pytest.raises(OdcftError, match=r"None of the 8 images in [^ ]*test can be read; .*test/a/000.png: broken"):
        without_unreadable(split, dict.fromkeys(range(24, 32), "broken"))


def test_a_set_that_loses_all_images_is_refused_with_every_reason(images):
    shutil.copy(images / "a" / "000.png", images / "b" / "again.png")
    split = load_labelled_images(str(images), None)
    rest = {i: "broken" for i, name in enumerate(split.images.names) if name not in ("a/000.png", "b/again.png")}
    with pytest.raises(
        OdcftError, match=r"No image of [^ ]*images is left .*: 23 of 25 .* read: .*; 2 of 25 .* labels"
    ):
        without_unreadable(split, rest)


def test_targets_are_the_labels(images):
    rows = [(f"images/{'ab'[i % 2]}/{i:03d}.png", ["cat;dog", "dog"][i % 2]) for i in range(24)]
    split = load_labelled_images(write_list(images.parent, rows), None)
    assert np.array_equal(split.targets, [[1 - i % 2, 1] for i in range(24)])


def test_files_that_are_not_read_are_counted_in_both_sets(images, make_images, tmp_path):
    test = make_images(tmp_path / "test", 8, side=40)
    for path in (images / "one.psd", test / "two.psd", test / "three.xml"):
        path.write_bytes(b"")
    assert load_labelled_images(str(images), str(test)).images.skipped == {".psd": 2, ".xml": 1}


def test_a_set_that_becomes_too_small_to_divide_is_refused(images):
    split = load_labelled_images(str(images), None)
    with pytest.raises(OdcftError, match=r"2 classes of .* fewer than 4 images, .* \(18 of 24 images cannot be read: "):
        without_unreadable(split, {i: "broken" for i in range(24) if i % 12 > 2})
    assert without_unreadable(split, {i: "broken" for i in range(24) if i % 12 > 3}).too_small == {}


def test_files_of_two_labels_that_cannot_be_read_are_not_called_contradictory(images):
    for path in images.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(OdcftError, match=r"None of the 24 images in .* can be read; a/000.png: broken"):
        without_unreadable(load_labelled_images(str(images), None), dict(enumerate(["broken", *["later"] * 23])))


def test_a_few_images_are_all_named_but_only_the_first_of_many(images):
    split = load_labelled_images(str(images), None)
    bad = {0: "x", 1: "x", 2: "x"}
    assert describe_left_out({"unreadable": [0, 1, 2]}, split, bad)[0].endswith(
        ": a/000.png (x), a/002.png (x), a/004.png (x)"
    )
    assert describe_left_out({"unreadable": [0, 1, 2]}, split, bad, most=2)[0].endswith(
        ": a/000.png (x), a/002.png (x), …"
    )


def test_sets_of_different_kinds_are_joined(tmp_path, images):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(images, ".")
    for name in names(load_labelled_images(str(images), None), range(12, 24)):
        if name[:1] == "b" and name > "b/013.png":
            (images / name).unlink()
    split = load_labelled_images(str(tmp_path / "x.tar"), str(images))
    tested = len(split.images) - 24
    assert split.classes == ["a", "b"]
    assert len(split.left_out["overlap"]) == tested == 19
    assert split.images.read(24) == split.images.read(0)


@pytest.mark.parametrize("labelled", [True, False])
def test_labels_that_are_folders_are_said_to_be_and_no_others(tmp_path, make_images, labelled, odcft_command):
    make_images(tmp_path / "images", 16)
    for name, first in (("fit", 0), ("test", 8)):
        rows = [f"images/{'ab'[i % 2]}/{i:03d}.png,{'ab'[i % 2]}" for i in range(first, first + 8)]
        header = "path,label" if labelled else "path,species"
        (tmp_path / f"{name}.csv").write_text("\n".join([header, *rows]))
    code, _, err = odcft_command(
        *("evaluate", "scratch:test_resnet", tmp_path / "fit.csv", "--test", tmp_path / "test.csv", "--protocol", "knn")
    )
    assert code == 0
    said = [line for line in err.splitlines() if line.startswith("Labels ")]
    assert len(said) == (0 if labelled else 2)


def test_images_can_be_left_out_of_two_joined_sets(tmp_path, make_images):
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = make_images(tmp_path / "images", 12)
    for name, first in (("fit", 0), ("test", 6)):
        paths = [images / "ab"[i % 2] / f"{i:03d}.png" for i in range(first, first + 6)]
        table = {"image": [path.read_bytes() for path in paths], "label": [path.parent.name for path in paths]}
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    whole = load_labelled_images(str(tmp_path / "fit.parquet"), str(tmp_path / "test.parquet")).images
    some = whole.without({1, 5, 6, 11})
    assert [some.read(i) for i in range(8)] == [whole.read(i) for i in (0, 2, 3, 4, 7, 8, 9, 10)]
