"""`odcft evaluate` on images: which are counted, and what is reported."""

import shutil

import numpy as np
import pytest
import torch
from evaluation_helpers import RecordedProgress, strict_json

from odcft.errors import OdcftError
from odcft.evaluation.comparison import evaluate
from odcft.evaluation.labels import load_labelled_images
from odcft.evaluation.results_table import json_values


def test_evaluation_of_images(tmp_path, make_images, make_checkpoint):
    images, test = make_images(tmp_path / "images", 24), make_images(tmp_path / "test", 16, side=40)
    results = evaluate(str(make_checkpoint(tmp_path / "c.pth")), str(images), str(test), ["svm", "knn"])
    assert 50 < results["svm"]["mAP"] <= 100
    assert len(results["svm"]["per_class"]) == len(results["svm"]["costs"]) == 2
    assert results["knn"]["k"] == 20
    assert results["classes"] == ["a", "b"]


def test_what_is_left_out_is_counted_and_reported(tmp_path, make_images, make_checkpoint, odcft_command):
    images = make_images(tmp_path / "images", 24)
    for name in ("a/x.png", "b/y.png", "b/z.png"):
        (images / name).write_bytes(b"no image")
    (images / "a" / "000.png").rename(images / "top.png")
    shutil.copy(images / "b" / "001.png", images / "b" / "again.png")
    code, out, err = odcft_command("evaluate", make_checkpoint(tmp_path / "c.pth"), images, "--json")
    assert code == 0
    values = strict_json(out)
    counts = {name: value for name, value in values.items() if isinstance(value, int)}
    assert counts == {
        **{"images": 28, "train_images": 12, "test_images": 11},
        **{"unreadable": 3, "unlabelled": 1, "copies": 1, "overlap": 0, "contradictory": 0},
    }
    assert values["classes"] == ["a", "b"]
    assert set(values["svm"]) == {"mAP", "per_class", "costs", "left_out", "cv"}
    assert set(values["knn"]) == {"top1", "k", "per_k"}
    said = err.splitlines()
    assert sum("Left out    3 of 28 images cannot be read: a/x.png (" in line for line in said) == 1
    assert "            1 of 28 images has no label: top.png" in said
    assert "            1 of 28 images is the same file as another: b/again.png" in said
    assert "Figures     2 classes, 12 images to train on, 11 to test on, 5 left out · 32 pixels" in said
    assert any(line.startswith("SVM: 2/2 classes") for line in said)


def test_duplicates_do_not_change_the_results(tmp_path, make_images, make_checkpoint):
    """Three copies of every image give the same results as one."""
    images, checkpoint = make_images(tmp_path / "images", 24), str(make_checkpoint(tmp_path / "c.pth"))
    once = evaluate(checkpoint, str(images), progress=RecordedProgress())
    for path in list(images.rglob("*.png")):
        for again in "xy":
            shutil.copy(path, path.with_name(f"{path.stem}{again}.png"))
    thrice = evaluate(checkpoint, str(images), progress=RecordedProgress())
    assert thrice["copies"] == 48
    assert json_values({p: thrice[p] for p in ("svm", "knn")}) == json_values({p: once[p] for p in ("svm", "knn")})


def test_no_readable_image_is_refused_in_one_sentence(tmp_path, make_images, make_checkpoint, odcft_command):
    images = make_images(tmp_path / "images", 12)
    for path in images.rglob("*.png"):
        path.write_bytes(b"no image")
    code, out, err = odcft_command("evaluate", make_checkpoint(tmp_path / "c.pth"), images, "--json")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"odcft: None of the 12 images in {images} can be read; a/000.png: ")


def test_a_class_too_small_is_left_out_of_the_svm_by_name(tmp_path, make_images, make_checkpoint, odcft_command):
    images = make_images(tmp_path / "images", 24)
    for i in (0, 2, 4):
        (images / "c").mkdir(exist_ok=True)
        (images / "a" / f"{i:03d}.png").rename(images / "c" / f"{i}.png")
    code, out, err = odcft_command("evaluate", make_checkpoint(tmp_path / "c.pth"), images, "--json")
    assert code == 0
    svm = strict_json(out)["svm"]
    assert svm["per_class"][2] is None
    assert svm["costs"][2] is None
    assert svm["mAP"] == pytest.approx(np.mean(svm["per_class"][:2]))
    assert svm["left_out"] == {"c": "3 images, too few to hold out half"}
    assert "  SVM mAP is the mean over 2 of 3 classes. Left out:" in err.splitlines()
    assert "    c: 3 images, too few to hold out half" in err.splitlines()


def test_a_backbone_of_nan_is_refused(tmp_path, make_images, make_checkpoint, monkeypatch):
    images, checkpoint = make_images(tmp_path / "images", 12), str(make_checkpoint(tmp_path / "c.pth"))

    def broken(*args, **how):
        return torch.full((12, 4), torch.nan), {}

    monkeypatch.setattr("odcft.evaluation.features.extract", broken)
    with pytest.raises(OdcftError, match=r"c\.pth gives features that are NaN or infinite for 12 of 12 images"):
        evaluate(checkpoint, str(images), progress=RecordedProgress())


def test_several_labels_per_image_work_only_with_svm(tmp_path, make_images):
    make_images(tmp_path / "images", 16)
    rows = [f"images/{'ab'[i % 2]}/{i:03d}.png,{'cat;dog' if i % 4 else 'cat'}" for i in range(16)]
    (tmp_path / "l.csv").write_text("path,label\n" + "\n".join(rows))
    split = load_labelled_images(str(tmp_path / "l.csv"), None)
    assert split.targets.sum(0).tolist() == [16, 12]
    with pytest.raises(OdcftError, match="exactly one label"):
        evaluate("scratch:test_resnet", str(tmp_path / "l.csv"), None, ["knn"])
