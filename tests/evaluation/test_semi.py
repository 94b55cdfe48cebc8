"""`--protocol semi`: which labels are used, how it trains, and what it reports."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from evaluation_helpers import RecordedProgress, strict_json

from odcft.backbone.network import Backbone
from odcft.data.sources import find_images
from odcft.data.view import View
from odcft.errors import OdcftError
from odcft.evaluation import semi as module
from odcft.evaluation.semi import LabelledSets, draw_labelled, semi, setting_for
from odcft.progress import Progress

VIEW = View(32)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(module, "QUICK_STEPS", 4)
    monkeypatch.setattr(module, "EPOCHS", 4)


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return Backbone("test_resnet")


@pytest.fixture
def sets(tmp_path, make_images):
    images = find_images(make_images(tmp_path / "images", 24))
    class_N = np.array(["b" in name.split("/")[0] for name in images.names], dtype=np.int64)
    rows = np.arange(24)
    return LabelledSets(images, rows[::2], class_N[::2], rows[1::2], class_N[1::2])


def test_every_class_gives_the_same_share_of_its_labels():
    class_N = np.repeat([0, 1, 3], [100, 200, 40])
    one, ten = draw_labelled(class_N, 1, 0), draw_labelled(class_N, 10, 0)
    assert np.bincount(class_N[one]).tolist() == [1, 2, 0, 1]  # at least one of each class
    assert np.bincount(class_N[ten]).tolist() == [10, 20, 0, 4]
    assert set(one) < set(ten)
    assert ten.tolist() == sorted(draw_labelled(class_N, 10, 0)) != draw_labelled(class_N, 10, 1).tolist()


def test_few_images_get_steps_enough_and_many_the_published_schedule(monkeypatch):
    monkeypatch.undo()
    published = setting_for(12_811)
    assert (published.name, published.epochs, published.batch) == ("published", 20, 256)
    assert (published.lr, published.head_lr, published.weight_decay) == (0.01, 10, 5e-4)
    quick = setting_for(25)
    assert (quick.name, quick.batch, quick.epochs) == ("quick", 25, 300)
    assert setting_for(5000).epochs == 20
    assert setting_for(25, transformer=True).optimizer == "adamw"


def test_it_is_the_same_for_a_seed_and_leaves_the_backbone_alone(backbone, sets):
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    first, again, other = (
        semi([backbone], sets, VIEW, Progress(quiet=True), percents=(1, 50), seed=seed) for seed in (0, 0, 1)
    )
    for name in ("1%", "50%"):
        assert first["per_fraction"][name]["predicted"].tolist() == again["per_fraction"][name]["predicted"].tolist()
    assert first["per_fraction"]["1%"]["few"]
    assert first["per_fraction"]["1%"]["images"] == 2
    assert first["per_fraction"]["50%"]["images"] == 6
    assert not first["per_fraction"]["50%"]["few"]
    assert first["top1"] == first["per_fraction"]["50%"]["top1"]
    assert "top5" not in first["per_fraction"]["1%"]  # two classes
    assert (first["seed"], other["seed"]) == (0, 1)
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())


def test_all_layers_learn(backbone, sets):
    network = module._train([backbone], sets, np.arange(12), VIEW, setting_for(12), 0, Progress(quiet=True), "")
    old = dict(backbone.named_parameters())
    assert all(not torch.equal(old[name], new) for name, new in network.backbones[0].named_parameters())
    assert not network.training


def test_top_5_of_more_than_five_classes():
    logits_NC = np.array([[6.0, 5, 4, 3, 2, 1, 0], [6, 5, 4, 3, 2, 1, 0], [6, 5, 4, 3, 2, 1, 0]])
    figures = module._figures(logits_NC, np.array([0, 4, 5]))
    assert figures["top1"] == pytest.approx(100 / 3)
    assert figures["top5"] == pytest.approx(200 / 3)
    assert "top5" not in module._figures(logits_NC[:, :5], np.array([0, 4, 4]))


def test_too_few_labels_for_so_many_processes_are_refused(backbone, sets, monkeypatch):
    monkeypatch.setattr(module.dist, "world_size", lambda: 2)
    with pytest.raises(OdcftError, match="1 % of the labels are 2 images, fewer than 2 for each of 2 processes"):
        semi([backbone], sets, VIEW, Progress(quiet=True))


def test_an_image_that_vanishes_is_named(backbone, sets):
    (sets.images.root / sets.images.names[0]).unlink()
    with pytest.raises(OdcftError, match=r"a/000\.png can no longer be read: No such file"):
        semi([backbone], sets, VIEW, RecordedProgress(), percents=(100,))


def test_a_network_that_diverges_is_refused(backbone, sets):
    with torch.no_grad():
        next(backbone.parameters()).fill_(torch.nan)
    with pytest.raises(OdcftError, match="training with the labels diverged"):
        semi([backbone], sets, VIEW, Progress(quiet=True), percents=(100,))


def test_a_run_is_compared_with_its_checkpoint(tmp_path, make_images, make_checkpoint, odcft_command):
    """The figures of both, with the change of each share of the labels and its interval."""
    images, one, two = tmp_path / "images", tmp_path / "one.pth", tmp_path / "two.pth"
    make_images(images, 24)
    make_checkpoint(one)
    make_checkpoint(two, seed=1)
    code, out, err = odcft_command("evaluate", one, two, images, "--protocol", "semi", "--json")
    assert code == 0, err
    values = strict_json(out)
    assert set(values["semi"]) == {"top1", "seed", "per_fraction"}
    assert set(values["semi"]["per_fraction"]) == {"1%", "10%"}
    change = values["columns"][0]["change"]["semi"]
    assert change["low"] <= change["change"] <= change["high"]
    assert change["per_fraction"]["10%"] == {name: change[name] for name in ("change", "low", "high")}
    said = err.splitlines()
    assert any(line.split() == ["Semi", "10", "%", "change", "(95", "%", "interval)"] for line in said)


def test_features_from_a_file_are_refused(tmp_path, odcft_command):
    code, _, err = odcft_command("evaluate", "--features", tmp_path / "f.npz", "--protocol", "semi")
    assert code == 2
    assert (
        err == "odcft: --protocol semi fine-tunes the network, so it needs a checkpoint and images, not --features.\n"
    )


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path, make_images, make_checkpoint):
    def evaluate(images):
        make_images(tmp_path / str(images), images)
        command = [sys.executable, "-m", "odcft", "evaluate", str(make_checkpoint(tmp_path / "c.pth"))]
        command += [str(tmp_path / str(images)), "--protocol", "semi", "--devices", "2", "--json"]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    done = evaluate(800)
    assert done.returncode == 0, done.stderr
    fractions = strict_json(done.stdout)["semi"]["per_fraction"]
    assert [fractions[name]["images"] for name in ("1%", "10%")] == [4, 40]
    refused = evaluate(40)
    assert refused.returncode == 2
    assert "fewer than 2 for each of 2 processes" in refused.stderr
    assert "Traceback" not in refused.stderr
