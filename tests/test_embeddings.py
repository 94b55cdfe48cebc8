"""`odcft embed` writes what `odcft evaluate --features` takes, and nothing over others' files."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from stopped_runs import quick

from odcft.backbone.load import load_backbone
from odcft.data.batches import Crops
from odcft.data.feature_extraction import to_float
from odcft.data.sources import find_images
from odcft.embeddings import embed
from odcft.evaluation.comparison import evaluate
from odcft.evaluation.feature_files import evaluate_file
from odcft.train import fine_tune


@pytest.mark.parametrize("ending", ["npz", "parquet"])
def test_features_paths_and_labels(tmp_path, make_images, make_checkpoint, odcft_command, ending):
    images, out = make_images(tmp_path / "images", 16), tmp_path / f"f.{ending}"
    (images / "a" / "000.png").write_bytes(b"no image")
    checkpoint = make_checkpoint(tmp_path / "c.pth")
    code, said, err = odcft_command("embed", checkpoint, images, "--out", out, "--json")
    assert code == 0, err
    values = json.loads(said)
    assert values["images"] == 15
    assert list(values["unreadable"]) == ["a/000.png"]
    assert "Left out    1 that cannot be read; the first is a/000.png (" in err
    if ending == "npz":
        arrays = np.load(out)
        paths, labels, rows = arrays["paths"].tolist(), arrays["labels"].tolist(), arrays["features"]
    else:
        table = pq.read_table(out)
        paths, labels = table["path"].to_pylist(), table["label"].to_pylist()
        rows = np.array(table["features"].to_pylist(), np.float32)
    assert rows.shape == (15, values["width"])
    assert paths[0] == "a/002.png"
    assert labels == [path[0] for path in paths]
    from_file = evaluate_file(out, ["svm", "knn"])
    (images / "a" / "000.png").unlink()
    direct = evaluate(str(checkpoint), str(images), None, ["svm", "knn"])
    assert from_file["svm"]["mAP"] == direct["svm"]["mAP"]
    assert from_file["knn"]["top1"] == direct["knn"]["top1"]
    assert from_file["classes"] == ["a", "b"]


def test_two_files_train_and_test(tmp_path, make_images, odcft_command):
    for name, count in (("fit", 12), ("test", 8)):
        embed("scratch:test_resnet", str(make_images(tmp_path / name, count)), tmp_path / f"{name}.npz")
    code, said, _ = odcft_command(
        *(
            "evaluate",
            "--features",
            tmp_path / "fit.npz",
            "--test",
            tmp_path / "test.npz",
            "--protocol",
            "knn",
            "--json",
        )
    )
    assert code == 0
    values = json.loads(said)
    assert (values["train_images"], values["test_images"]) == (12, 8)


def test_without_labels_it_is_written_but_not_evaluated(tmp_path, make_images, odcft_command):
    images, out = make_images(tmp_path / "images", 8) / "a", tmp_path / "f.npz"
    embed("scratch:test_resnet", str(images), out)
    assert "labels" not in np.load(out)
    code, _, err = odcft_command("evaluate", "--features", out)
    assert code == 2
    assert f"{out} has no labels. Embed images with one folder per class" in err


@pytest.mark.parametrize("features", [np.zeros(4, np.float32), np.zeros((3, 4), np.float32), np.full((4, 2), np.nan)])
def test_files_that_do_not_fit_are_refused(tmp_path, odcft_command, features):
    np.savez(tmp_path / "f.npz", features=features, labels=np.array(list("aabb")))
    code, _, err = odcft_command("evaluate", "--features", tmp_path / "f.npz", "--protocol", "knn")
    assert code == 2
    assert len(err.splitlines()) == 1


def test_files_of_others_are_kept(tmp_path, make_images, odcft_command):
    images = make_images(tmp_path / "images", 4)

    def run(out, *more):
        code, _, err = odcft_command("embed", "scratch:test_resnet", images, "--out", out, *more)
        return code, err

    mine = tmp_path / "mine.npz"
    np.savez(mine, features=np.zeros(3))
    before = mine.read_bytes()
    assert run(mine)[0] == 2
    code, err = run(mine, "--overwrite")
    assert (code, mine.read_bytes()) == (2, before)
    assert "was not written by odcft embed" in err
    ours = tmp_path / "ours.npz"
    assert run(ours)[0] == 0
    assert run(ours)[0] == 2
    assert run(ours, "--overwrite")[0] == 0
    code, err = run(tmp_path / "f.csv")
    assert code == 2
    assert "end the name with .npz or .parquet" in err


def test_images_of_12_bits_are_embedded_as_they_were_trained_on(tmp_path, make_checkpoint):
    draw = np.random.default_rng(0)
    (tmp_path / "set").mkdir()
    for i in range(12):
        values = draw.integers(100 * i, 100 * i + 2000, (32, 32)).astype(np.uint16)
        Image.fromarray(values).save(tmp_path / "set" / f"{i:02d}.png")
    data = str(tmp_path / "set")
    fine_tune(str(make_checkpoint(tmp_path / "c.pth")), data, tmp_path / "run", quick())
    for path in sorted((tmp_path / "set").iterdir())[3:]:
        path.unlink()  # the range of three images would be another than that of the run
    embed(str(tmp_path / "run"), data, tmp_path / "f.npz")
    backbone = load_backbone(tmp_path / "run").backbone
    assert backbone.input.view.intensity is not None
    crops = Crops(find_images(data), backbone.input.view)
    pixels = torch.stack([crops[0, i][0] for i in range(3)])
    with torch.no_grad():
        expected = backbone(to_float(pixels, torch.device("cpu")))
    assert np.allclose(np.load(tmp_path / "f.npz")["features"], expected.numpy(), atol=1e-5)
