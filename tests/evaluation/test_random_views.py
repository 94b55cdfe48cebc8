"""Random views are the same for every network and any number of ranks, and are extracted once."""

import numpy as np
import pytest
import torch

from odcft.backbone.network import Backbone
from odcft.data.sources import find_images
from odcft.data.view import View
from odcft.evaluation import random_views
from odcft.progress import Progress

VIEW = View(32)


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return Backbone("test_resnet").eval()


@pytest.fixture
def images(tmp_path, make_images):
    return find_images(make_images(tmp_path / "images", 7))


def views(backbone, images, count=2):
    return random_views.random_views(backbone, images, VIEW, count, Progress(quiet=True))


def test_views_differ_from_each_other_and_are_the_same_again(backbone, images, monkeypatch):
    monkeypatch.setattr(random_views, "BATCH", 3)
    found = views(backbone, images)
    assert found.shape == (7, 2, backbone.width)
    assert found.dtype == np.float32
    assert not np.isclose(found[:, 0], found[:, 1]).all(1).any()
    assert np.array_equal(views(backbone, images, 1), found[:, :1])


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_see_the_views_of_one(backbone, images, monkeypatch, on_threads, ranks):
    monkeypatch.setattr(random_views, "BATCH", 3)
    expected = views(backbone, images)
    assert np.allclose(on_threads(ranks, lambda: views(backbone, images))[0], expected, atol=1e-5)


def test_an_image_that_cannot_be_read_leaves_a_row_of_zeros(backbone, images):
    (images.root / images.names[2]).write_bytes(b"no image")
    assert views(backbone, images).any((1, 2)).tolist() == [True, True, False, True, True, True, True]


def test_they_are_extracted_once(tmp_path, backbone, images, monkeypatch):
    monkeypatch.setenv("ODCFT_CACHE", str(tmp_path / "cache"))
    first = views(backbone, images)
    with monkeypatch.context() as patched:
        patched.setattr(random_views, "make_loader", lambda *args: pytest.fail("computed again"))
        assert np.array_equal(views(backbone, images), first)
    monkeypatch.setattr(random_views, "AUGMENT", random_views.AUGMENT.model_copy(update={"flip": 1.0}))
    assert not np.allclose(views(backbone, images), first)  # other views have another name
