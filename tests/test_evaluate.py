import numpy as np
import pytest

from odcft.errors import OdcftError
from odcft.evaluation.compare import check_protocols, evaluate, evaluate_file
from odcft.evaluation.knn import knn
from odcft.evaluation.labels import labelled
from odcft.evaluation.svm import average_precision


def test_average_precision_is_the_area_under_the_envelope():
    present = np.array([True, False, True, False])
    assert average_precision(present, np.array([4.0, 3.0, 2.0, 1.0])) == pytest.approx((1 + 2 / 3) / 2)
    # the envelope lifts the second hit's precision of 1/2 to the 2/3 that follows it
    present = np.array([True, False, False, True, True])
    assert average_precision(present, -np.arange(5.0)) == pytest.approx((1 + 0.6 + 0.6) / 3)


def test_knn_takes_the_class_of_the_similar():
    train = np.array([[1.0, 0], [2, 0.1], [0, 1], [0.1, 3]], dtype=np.float32)
    result = knn(
        train, np.array([0, 0, 1, 1]), np.array([[5.0, 0.2], [0.3, 9]], dtype=np.float32), np.array([0, 0]), k=2
    )
    assert result["predicted"].tolist() == [0, 1]
    assert result["top1"] == 50


def test_halves_are_stratified(tmp_path, make_images):
    split = labelled(str(make_images(tmp_path, 24)), None)
    assert split.classes == ["a", "b"]
    assert split.targets[split.train_rows].sum(0).tolist() == split.targets[split.test_rows].sum(0).tolist() == [6, 6]
    assert not set(split.train_rows) & set(split.test_rows)


def test_evaluation_of_images(tmp_path, make_images, make_checkpoint):
    images = str(make_images(tmp_path / "images", 24))
    results = evaluate(str(make_checkpoint(tmp_path / "c.pth")), images, images, ["svm", "knn"])
    assert 50 < results["svm"]["mAP"] <= 100
    assert len(results["svm"]["per_class"]) == len(results["svm"]["costs"]) == 2
    assert results["knn"]["k"] == 20


def test_run_is_set_beside_its_checkpoint(tmp_path, make_images, make_checkpoint):
    from odcft.recipe import load_recipe
    from odcft.train import fine_tune

    images, checkpoint = str(make_images(tmp_path / "images", 24)), str(make_checkpoint(tmp_path / "c.pth"))
    fine_tune(checkpoint, images, tmp_path / "run", load_recipe("small", ["optim.epochs=1", "optim.batch_size=8"]))
    results = evaluate(str(tmp_path / "run"), images, None, ["knn"])
    alone = evaluate(checkpoint, images, None, ["knn"])
    assert results["before"]["knn"]["top1"] == alone["knn"]["top1"]
    change = results["change"]["knn"]
    assert change["change"] == pytest.approx(results["knn"]["top1"] - alone["knn"]["top1"])
    assert change["low"] <= change["change"] <= change["high"]


def test_features_made_elsewhere(tmp_path):
    draw = np.random.default_rng(0)
    labels = np.arange(60) % 3
    features = draw.normal(size=(60, 5)).astype(np.float32) + 5 * np.eye(3, 5, dtype=np.float32)[labels]
    path = tmp_path / "f.npz"
    np.savez(
        path,
        train_features=features[:30],
        train_targets=labels[:30],
        test_features=features[30:],
        test_targets=labels[30:],
    )
    results = evaluate_file(path, ["svm", "knn"])
    assert results["svm"]["mAP"] > 95
    assert results["knn"]["top1"] > 95
    np.savez(path, features=features)
    with pytest.raises(OdcftError, match=r"is not an \.npz with"):
        evaluate_file(path, ["knn"])


def test_several_labels_an_image_are_for_svm_only(tmp_path, make_images):
    make_images(tmp_path / "images", 16)
    rows = [f"images/{'ab'[i % 2]}/{i:03d}.png,{'cat;dog' if i % 4 else 'cat'}" for i in range(16)]
    (tmp_path / "l.csv").write_text("path,label\n" + "\n".join(rows))
    split = labelled(str(tmp_path / "l.csv"), None)
    assert split.targets.sum(0).tolist() == [16, 12]
    with pytest.raises(OdcftError, match="exactly one label"):
        evaluate("scratch:test_resnet", str(tmp_path / "l.csv"), None, ["knn"])


def test_unlabelled_images_and_unknown_protocols_are_refused(tmp_path, make_images):
    images = make_images(tmp_path, 4)
    with pytest.raises(OdcftError, match="no labels"):
        labelled(str(images / "a"), None)
    with pytest.raises(OdcftError, match="fewer than 4 images"):
        labelled(str(images), None)
    with pytest.raises(OdcftError, match="choose from svm, knn"):
        check_protocols("svm,nmi")
