"""PASCAL VOC folders: labels, difficult objects, lists, and XML that means harm."""

import time

import numpy as np
import pytest
from PIL import Image

from odcft.errors import OdcftError
from odcft.evaluation.labels import load_labelled_images, without_unreadable
from odcft.evaluation.protocols import Split, evaluate_arrays
from odcft.evaluation.voc_folder import find_voc_folder, load_voc_sets, parse_annotation


def annotation(*objects):
    """XML of objects, each a class or (class, difficult); with parts, which have names too."""
    pairs = [one if isinstance(one, tuple) else (one, 0) for one in objects]
    inside = "".join(
        f"<object><name>{name}</name><pose>Left</pose><difficult>{difficult}</difficult>"
        "<part><name>head</name><difficult>1</difficult></part></object>"
        for name, difficult in pairs
    )
    return f"<annotation><folder>VOC2007</folder><owner><name>?</name></owner>{inside}</annotation>".encode()


def write_voc(folder, lists, images):
    """A VOC folder: name of a list to ids, and id to objects (None: no annotation)."""
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / name).mkdir(parents=True)
    for name, ids in lists.items():
        (folder / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{one}\n" for one in ids))
    draw = np.random.default_rng(0)
    for one, objects in images.items():
        if objects is not None:
            (folder / "Annotations" / f"{one}.xml").write_bytes(annotation(*objects))
        pixels = draw.integers(0, 256, (24, 40, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "JPEGImages" / f"{one}.jpg")
    return folder


TRAIN = {f"1{i}": ["cat"] if i < 4 else ["dog"] for i in range(8)}
TEST = {"20": ["cat"], "21": [("cat", 1), "dog"], "22": ["cat", "dog"], "23": ["dog"], "24": ["dog", ("dog", 1)]}


@pytest.fixture
def voc(tmp_path):
    return write_voc(tmp_path / "VOCdevkit" / "VOC2007", {"trainval": TRAIN, "test": TEST}, TRAIN | TEST)


def test_objects_of_an_annotation():
    assert parse_annotation(annotation("dog", ("cat", 1), "dog", ("dog", 1))) == (["dog"], ["cat"])
    assert parse_annotation(annotation(("cat", 1))) == ([], ["cat"])
    assert parse_annotation(b"<annotation><object><name> cat\n</name></object><object/></annotation>") == (["cat"], [])


@pytest.mark.parametrize(
    ("xml", "words"),
    [
        (b'<!DOCTYPE a [<!ENTITY x "y">]><annotation>&x;</annotation>', "declares a document type"),
        (b'<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "declares a document type"),
        (
            b'<!DOCTYPE a [<!ENTITY a "ha"><!ENTITY b "' + b"&a;" * 99 + b'"><!ENTITY c "' + b"&b;" * 99 + b'">]>'
            b"<annotation>&c;</annotation>",
            "declares a document type",
        ),
        (b"<annotation>&x;</annotation>", "undefined entity"),
        (b"<a>" * 40, "nested more than 32 deep"),
        (b"<annotation>" + b" " * (1 << 20) + b"</annotation>", "bytes are more than"),
        (b"<annotation><object></annotation>", "mismatched tag"),
        (b"", "no element found"),
        (b"<annotation>\xff</annotation>", "invalid token"),
        (b'<?xml version="1.0" encoding="rot13"?><annotation/>', "rot13"),
    ],
)
def test_annotations_that_mean_harm_are_refused(xml, words):
    started = time.monotonic()
    with pytest.raises(ValueError, match=words):
        parse_annotation(xml)
    assert time.monotonic() - started < 1


def test_average_precision_of_a_voc_folder_worked_out_by_hand(voc):
    labels = load_labelled_images(str(voc.parent), None)
    assert labels.classes == ["cat", "dog"]
    assert labels.sets == [(f"{voc} (trainval)", 8), (f"{voc} (test)", 5)]
    assert labels.targets[labels.test_rows].tolist() == [[1, 0], [-1, 1], [1, 1], [0, 1], [0, 1]]
    # Features on a quarter circle, cats at one end: the SVM ranks images by their angle, here in degrees.
    angle_N = np.deg2rad([0, 10, 12, 14, 80, 83, 86, 90, 5, 20, 40, 30, 60])
    features = np.stack([np.cos(angle_N), np.sin(angle_N)], 1)
    split = Split(
        features[labels.train_rows],
        labels.targets[labels.train_rows],
        features[labels.test_rows],
        labels.targets[labels.test_rows],
    )
    result = evaluate_arrays(split, ["svm"])["svm"]
    # cat, by angle: 20 yes, 21 difficult and so left out, 23 no, 22 yes, 24 no: (1 + 2/3) / 2.
    # dog, from the other end: 24 yes, 22 yes, 23 yes, 21 yes, 20 no: 1.
    assert result["per_class"] == pytest.approx([100 * (1 + 2 / 3) / 2, 100])


def test_difficult_images_of_the_training_list_are_negatives_but_count_as_labelled(tmp_path):
    images = TRAIN | {"30": [("cat", 1)], "31": [], "32": None}
    labels = load_labelled_images(str(write_voc(tmp_path / "VOC2012", {"trainval": images}, images)), None)
    assert labels.sets == [(f"{tmp_path / 'VOC2012'} (trainval)", 11)]
    assert [labels.images.names[i] for i in labels.left_out["unlabelled"]] == ["JPEGImages/31.jpg", "JPEGImages/32.jpg"]
    used = np.concatenate([labels.train_rows, labels.test_rows])
    assert 8 in used
    assert labels.targets[8].tolist() == [-1, 0]
    assert len(labels.test_rows) == 4  # half of each class; one with difficult objects only is a group of its own
    assert labels.too_small == {}


@pytest.mark.parametrize(
    ("lists", "for_test", "expected"),
    [
        (("trainval", "train", "val", "test"), False, ["trainval", "test"]),
        (("trainval", "train", "val"), False, ["trainval"]),
        (("train", "val"), False, ["train", "val"]),
        (("test",), False, ["test"]),
        (("trainval", "test"), True, ["test"]),
        (("train", "val"), True, ["val"]),
        (("trainval",), True, ["trainval"]),
    ],
)
def test_which_lists_are_used(tmp_path, lists, for_test, expected):
    folder = write_voc(tmp_path / "VOC", {name: ["10"] for name in lists}, {"10": ["cat"]})
    assert [one.name.rpartition(" ")[2] for one in load_voc_sets(folder, for_test)] == [
        f"({name})" for name in expected
    ]


def test_another_test_set_replaces_the_test_list(voc, tmp_path):
    other = write_voc(tmp_path / "VOC2012", {"val": ["40", "41"]}, {"40": ["cat"], "41": ["dog"]})
    labels = load_labelled_images(str(voc), str(other))
    assert labels.sets == [(f"{voc} (trainval)", 8), (f"{other} (val)", 2)]
    assert load_labelled_images(str(voc), str(voc)).sets == load_labelled_images(str(voc), None).sets
    assert labels.images.path(9) == str(other / "JPEGImages" / "41.jpg")


def test_where_a_voc_folder_is(voc, tmp_path):
    assert find_voc_folder(str(voc)) == find_voc_folder(str(voc.parent)) == voc
    assert find_voc_folder(str(voc / "JPEGImages")) is None
    assert find_voc_folder(str(tmp_path / "missing")) is None
    write_voc(voc.parent / "VOC2012", {}, {})
    with pytest.raises(OdcftError, match=r"holds several VOC folders: VOC2007, VOC2012\. Name one"):
        find_voc_folder(str(voc.parent))
    with pytest.raises(OdcftError, match=r"has none of the lists trainval\.txt, train\.txt, test\.txt, val\.txt"):
        load_voc_sets(voc.parent / "VOC2012")


@pytest.mark.parametrize("name", ["../../../etc/passwd", "..", "a/b", "a\\b", "\0"])
def test_lists_name_only_images_of_the_folder(voc, name):
    (voc / "ImageSets" / "Main" / "test.txt").write_text(f"20\n{name}\n")
    with pytest.raises(OdcftError, match="which is not the name of an image in JPEGImages"):
        load_labelled_images(str(voc), None)


def test_lists_and_annotations_that_cannot_be_read_are_named(voc):
    (voc / "Annotations" / "21.xml").write_bytes(b"<annotation>")
    with pytest.raises(
        OdcftError, match=r"Annotations/21\.xml is not an annotation of VOC: no element found.*lists\.$"
    ):
        load_labelled_images(str(voc), None)
    for content, words in ((b"", "lists no images"), (b"\xff\xff", "cannot be read")):
        (voc / "ImageSets" / "Main" / "test.txt").write_bytes(content)
        with pytest.raises(OdcftError, match=rf"test\.txt.* {words}"):
            load_labelled_images(str(voc), None)


def test_an_image_that_is_missing_is_counted_and_a_repeated_line_is_one_image(voc):
    (voc / "JPEGImages" / "23.jpg").rename(voc / "JPEGImages" / "23.png")
    (voc / "JPEGImages" / "24.jpg").unlink()
    (voc / "ImageSets" / "Main" / "test.txt").write_text("20  1\n21 -1\n22\n23\n\n24\n20\n")
    labels = load_labelled_images(str(voc), None)
    assert [labels.images.path(i) for i in (11, 12)] == [
        str(voc / "JPEGImages" / name) for name in ("23.png", "24.jpg")
    ]
    labels = without_unreadable(labels, {12: "no such file"})
    assert labels.left_out["unreadable"] == [12]
    assert len(labels.test_rows) == 4


def test_a_voc_folder_from_the_command_line(voc, odcft_command):
    """The published way: trainval to train, test to test, images squashed."""
    code, out, err = odcft_command(
        "evaluate", "scratch:test_resnet", voc.parent, "--protocol", "svm", "--crop", "squash", "--size", 32, "--json"
    )
    assert code == 0, err
    assert '"crop": "squash"' in out
    assert "8 in " in err
    assert "5 in " in err
    assert "then squashed into a square" in err
    code, _, err = odcft_command("evaluate", "scratch:test_resnet", voc, "--protocol", "linear")
    assert code == 2
    assert "--protocol linear needs exactly one label per image, but 1 of 13 images has none or several" in err
    code, _, err = odcft_command("evaluate", "scratch:test_resnet", voc, "--crop", "middle")
    assert code == 2
    assert "--crop middle: choose centre or squash." in err
