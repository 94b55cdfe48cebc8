"""The contact sheet for trackers while a run trains: which images, how often, and that it changes nothing."""

import numpy as np
import torch

from odcft.clustering.memory import new_memory
from odcft.data.sources import find_images
from odcft.data.view import View
from odcft.reports import training_sheets
from odcft.reports.training_sheets import TrainingSheets


class Clusters:
    """As much of `clustering.clusters.Clusters` as a sheet needs."""

    def __init__(self, features_SD, labels_S, K):
        self.memory = new_memory(features_SD, labels_S, K, torch.float32)
        self.memory.sizes_K = self.memory.counts_K


def test_a_sheet_is_drawn_when_due_and_changes_nothing(tmp_path, make_images, monkeypatch):
    images = find_images(make_images(tmp_path / "images", 24))
    clusters = Clusters(torch.eye(4).repeat(6, 1), torch.arange(24, dtype=torch.int32) % 3, 4)
    sheets = TrainingSheets(images, View(32), 5)
    clock, before = [1000.0], clusters.memory.features_SD.clone()
    monkeypatch.setattr(training_sheets.time, "monotonic", lambda: clock[0])
    random = torch.random.get_rng_state()
    first = sheets.draw(clusters)
    assert first.dtype == np.uint8
    assert first.shape[2] == 3
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.equal(clusters.memory.features_SD, before)
    assert sheets.draw(clusters) is None
    assert sheets.draw(clusters, last=True) is not None
    clock[0] += 301
    assert sheets.draw(clusters) is not None
    assert TrainingSheets(images, View(32), 0).draw(clusters, last=True) is None


def test_images_that_have_gone_leave_their_places_empty(tmp_path, make_images):
    images = find_images(make_images(tmp_path / "images", 24))
    for path in (tmp_path / "images").rglob("*.png"):
        path.unlink()
    clusters = Clusters(torch.eye(4).repeat(6, 1), torch.zeros(24, dtype=torch.int32), 4)
    assert TrainingSheets(images, View(32), 5).draw(clusters) is not None
