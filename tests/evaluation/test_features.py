"""Features are extracted once, and depend on everything that could change them."""

import numpy as np
import pytest
import torch

from odcft.backbone.layers import LAST
from odcft.backbone.network import Backbone
from odcft.data.sources import find_images
from odcft.data.view import View
from odcft.evaluation import feature_cache, features
from odcft.evaluation.features import features_of
from odcft.progress import Progress

VIEW = View(32)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ODCFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return Backbone("test_resnet")


@pytest.fixture
def images(tmp_path, make_images):
    return find_images(make_images(tmp_path / "images", 6))


def extracted(backbone, images, view=VIEW, **more):
    return features_of(backbone, images, view, Progress(quiet=True), **more)


def test_second_time_nothing_is_computed(cache, backbone, images, monkeypatch):
    (images.root / images.names[2]).write_bytes(b"no image")
    first = extracted(backbone, images, all_layers=True)
    monkeypatch.setattr(features, "extract", lambda *args: pytest.fail("computed again"))
    again = extracted(backbone, images, all_layers=True)
    assert not first.cached
    assert again.cached
    assert list(again.layers) == list(first.layers)
    assert all(np.array_equal(again.layers[name], first.layers[name]) for name in first.layers)
    assert again.unreadable == first.unreadable
    assert list(first.unreadable) == [2]
    last = extracted(backbone, images)  # of all layers, the last was kept too
    assert np.array_equal(last.layers[LAST], first.layers[LAST])


@pytest.mark.parametrize("changed", ["weight", "image", "view", "order"])
def test_anything_that_matters_is_noticed(cache, backbone, images, changed):
    extracted(backbone, images)
    view = VIEW
    if changed == "weight":
        with torch.no_grad():
            next(backbone.net.parameters())[0, 0, 0, 0] += 1e-3
    elif changed == "image":
        (images.root / images.names[0]).write_bytes((images.root / images.names[1]).read_bytes())
    elif changed == "view":
        view = View(32, crop_fraction=1.0)
    else:
        images = images.without({0})
    found = extracted(backbone, images, view)
    assert not found.cached
    assert len(found.layers[LAST]) == len(images)


def test_a_damaged_or_foreign_entry_is_computed_again(cache, backbone, images):
    first = extracted(backbone, images)
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    flipped = whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]
    for damage in (b"", b"no features", whole[:-8], flipped, feature_file(3), feature_file(6, np.float64)):
        entry.write_bytes(damage)
        found = extracted(backbone, images)
        assert not found.cached
        assert np.array_equal(found.layers[LAST], first.layers[LAST])


def feature_file(count, dtype=np.float32):
    from safetensors.numpy import save

    return save({"features": np.zeros((count, 4), dtype)}, {"unreadable": "{}"})


def test_cache_is_ours_alone_and_can_be_switched_off(cache, backbone, images, monkeypatch):
    extracted(backbone, images)
    assert cache.stat().st_mode & 0o777 == 0o700
    cache.chmod(0o777)  # anybody could have put something there
    assert not extracted(backbone, images).cached
    cache.chmod(0o700)
    assert extracted(backbone, images).cached
    monkeypatch.setenv("ODCFT_CACHE", "off")
    assert not extracted(backbone, images).cached


def test_cache_that_cannot_be_written_is_done_without(tmp_path, backbone, images, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ODCFT_CACHE", str(tmp_path / "file"))
    assert not extracted(backbone, images).cached
    assert not extracted(backbone, images).cached


def test_oldest_entries_make_room(cache, backbone, images, monkeypatch):
    extracted(backbone, images)
    (old,) = cache.iterdir()
    monkeypatch.setenv("ODCFT_CACHE_GB", str(1.5 * old.stat().st_size / 1e9))
    extracted(backbone, images, View(40))
    (left,) = cache.iterdir()
    assert left != old
    monkeypatch.setenv("ODCFT_CACHE_GB", "0")
    extracted(backbone, images, View(48))  # too large to be kept at all
    assert left in list(cache.iterdir())


def test_no_image_can_be_read(backbone, images):
    for name in images.names:
        (images.root / name).write_bytes(b"")
    found = extracted(backbone, images)
    assert len(found.unreadable) == 6
    assert not found.layers[LAST].any()
    assert feature_cache.contents_of(images, Progress(quiet=True)) == b""
    assert feature_cache.key(backbone, b"", VIEW, "float32") == ""


def test_every_rank_reads_its_share_of_the_checksums(cache, images, on_threads, monkeypatch):
    """They are the same on any number of ranks, and are exchanged before any rank is far ahead."""
    (images.root / images.names[2]).write_bytes(b"no image")
    monkeypatch.setattr(feature_cache, "BETWEEN", 4)
    alone, read = feature_cache.contents_of(images, Progress(quiet=True)), []
    monkeypatch.setattr(type(images), "read", lambda self, index: read.append(index) or b"x")
    same = feature_cache.contents_of(images, Progress(quiet=True))
    read.clear()
    assert on_threads(2, lambda: feature_cache.contents_of(images, Progress(quiet=True))) == [same, same]
    assert sorted(read) == list(range(6))
    assert len(alone) == len(same) == 6 * feature_cache.SUM
