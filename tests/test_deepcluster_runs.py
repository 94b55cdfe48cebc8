"""Whole runs of DeepCluster: labels are fixed within an epoch, and new ones come with a reinitialised classifier."""

import json
import multiprocessing
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from odcft import train
from odcft.clustering import deepcluster
from odcft.errors import OdcftError
from odcft.first_memory import init_memory
from odcft.recipe import load_recipe
from odcft.train import fine_tune

QUICK = ["method=dc", "optim.batch_size=4", "log.interval=1", "log.tensorboard=false", "log.report=false", "dc.pca=4"]


@pytest.fixture
def checkpoint(tmp_path, make_checkpoint):
    return str(make_checkpoint(tmp_path / "start.pth.tar"))


@pytest.fixture
def images(tmp_path, make_images):
    return str(make_images(tmp_path / "images"))


def quick(*overrides):
    return load_recipe("small", [*QUICK, "optim.epochs=2", "memory.clusters=3", *overrides])


def backbone(run):
    return load_file(run / "backbone" / "model.safetensors")


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_labels_stand_still_within_an_epoch_and_change_between(tmp_path, checkpoint, images):
    summary = fine_tune(checkpoint, images, tmp_path / "run", quick("optim.epochs=3"))
    written = lines(tmp_path / "run")
    assert summary["steps"] == len(written) == 9
    assert all(line["change_ratio"] == 0 and line["empty"] == 0 for line in written)
    assert "nmi_previous" not in written[2]  # the first clustering has none before it
    assert any("nmi_previous" in written[step] for step in (5, 8))
    assert load_recipe(tmp_path / "run" / "recipe.yaml").method == "dc"


def test_new_labels_reinitialise_the_classifier(tmp_path, checkpoint, images, monkeypatch):
    from odcft.model.neck_and_head import Model

    heads = []
    whole = Model.new_head

    def new_head(self, optimizer, *place):
        heads.append(self.head.weight.detach().clone())
        whole(self, optimizer, *place)
        assert not any(p in optimizer.state for p in self.head.parameters())
        assert not torch.equal(self.head.weight, heads[-1])

    monkeypatch.setattr(Model, "new_head", new_head)
    fine_tune(checkpoint, images, tmp_path / "run", quick("optim.epochs=4"))
    assert len(heads) == 3
    fine_tune(checkpoint, images, tmp_path / "every_second", quick("optim.epochs=4", "dc.interval=2"))
    assert len(heads) == 4


def test_resumed_run_equals_uninterrupted_run(tmp_path, checkpoint, images):
    same = ("optim.schedule=step", "optim.final_epochs=0")
    fine_tune(checkpoint, images, tmp_path / "whole", quick(*same))
    fine_tune(checkpoint, images, tmp_path / "parts", quick(*same, "optim.epochs=1"))
    fine_tune(checkpoint, images, tmp_path / "parts", quick(*same), resume=True, epochs=2)
    first, second = backbone(tmp_path / "whole"), backbone(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_memory_of_one_method_is_not_for_the_other(tmp_path, checkpoint, images):
    init_memory(checkpoint, images, tmp_path / "memory", quick())
    fine_tune(checkpoint, images, tmp_path / "dc", quick(), memory=tmp_path / "memory")
    fine_tune(checkpoint, images, tmp_path / "none", quick())
    first, second = backbone(tmp_path / "dc"), backbone(tmp_path / "none")
    assert all(torch.allclose(first[name].float(), second[name].float(), atol=1e-4) for name in first)
    with pytest.raises(OdcftError, match="was made with method=dc, but this run has method=odc"):
        fine_tune(checkpoint, images, tmp_path / "odc", quick("method=odc"), memory=tmp_path / "memory")


def test_clusters_of_few_images_are_allowed(tmp_path, checkpoint, images):
    assert fine_tune(checkpoint, images, tmp_path / "run", quick("memory.clusters=6"))["clusters"] == 6
    with pytest.raises(OdcftError, match="13 clusters for 12 images cannot work"):
        fine_tune(checkpoint, images, tmp_path / "x", quick("memory.clusters=13"))


@pytest.mark.slow
def test_two_processes_cluster_together(tmp_path, checkpoint, images):
    command = [sys.executable, "-m", "odcft", "finetune", checkpoint, images, "--recipe", "small", "--json"]
    settings = [word for pair in quick_flags() for word in ("--set", pair)]
    result = subprocess.run(
        [*command, *settings, "--out", str(tmp_path / "run"), "--devices", "2"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["steps"] == 6
    assert all(line["empty"] == 0 for line in lines(tmp_path / "run"))


def quick_flags():
    return [*QUICK, "optim.epochs=2", "memory.clusters=3"]


@pytest.mark.parametrize("workers", [0, 1])
def test_there_is_one_loader_at_a_time_and_no_batch_is_drawn_with_old_labels(
    tmp_path, checkpoint, images, monkeypatch, workers
):
    made, drawn, clustered = [], [], []
    whole = train.TrainingBatches, train.extract, deepcluster.draw, deepcluster.begin_epoch

    def note(*args):
        made.append(whole[0](*args))
        return made[-1]

    def extract(*args, **options):
        assert made[0]._loader._iterator is None
        assert made[0]._running is None
        assert not multiprocessing.active_children()
        return whole[1](*args, **options)

    def begin_epoch(clusters, epoch, embed):
        clustered.append(epoch)
        return whole[3](clusters, epoch, embed)

    def draw(clusters, generator):
        drawn.append(len(clustered))
        return whole[2](clusters, generator)

    for owner, name, new in ((train, "TrainingBatches", note), (train, "extract", extract)):
        monkeypatch.setattr(owner, name, new)
    monkeypatch.setattr(deepcluster, "begin_epoch", begin_epoch)
    monkeypatch.setattr(deepcluster, "draw", draw)
    fine_tune(checkpoint, images, tmp_path / "run", quick("optim.epochs=3", f"data.workers={workers}", "dc.interval=2"))
    assert len(made) == 1
    assert clustered == [0, 1, 2]
    assert drawn == [1, 2, 3]  # each epoch is drawn after it has begun
