"""Groups of nearly identical images: against a search without blocks or projection, and what known copies give."""

import numpy as np
import pytest
import torch
from PIL import Image

from odcft.data.sources import find_images
from odcft.data.view import View
from odcft.reports import near_duplicates
from odcft.reports.near_duplicates import draw_pages, find_groups, whitened


def plainly(unit_NF, threshold, first):
    """What `find_groups` must find: image by image against all that are kept."""
    cosine, kept, joined = (unit_NF @ unit_NF.T).numpy(), [], np.arange(len(unit_NF))
    for row in first:
        best = max(kept, key=lambda other: cosine[row, other], default=None)
        if best is not None and cosine[row, best] >= threshold:
            joined[row] = best
        else:
            kept.append(row)
    return joined


@pytest.mark.parametrize("threshold", [0.2, 0.7, 0.95])
@pytest.mark.parametrize("small", [False, True])
def test_the_same_groups_as_by_a_plain_search(monkeypatch, threshold, small):
    draw = np.random.default_rng(0)
    if small:  # several blocks, and the projection
        for name, value in (("BLOCK", 16), ("KEPT_BLOCK", 24), ("SHORT", 4), ("PIECE", 10)):
            monkeypatch.setattr(near_duplicates, name, value)
    centres = draw.standard_normal((25, 12)).astype(np.float32)
    features = centres[draw.integers(0, 25, 120)] + draw.choice([0.01, 0.3], (120, 1)) * draw.standard_normal((120, 12))
    unit_NF, first = whitened(features), draw.permutation(120)
    done = []
    found = find_groups(unit_NF, threshold, first, done.append)
    expected = plainly(unit_NF, threshold, first)
    # An image may join a kept one of its own block that comes after it only if that is nearer: then it is no worse.
    cosine = unit_NF @ unit_NF.T
    assert found.kept_N.tolist() == expected.tolist()
    assert np.allclose(found.similarity_N, cosine[np.arange(120), expected].clamp(max=1), atol=1e-5)
    assert found.left == len(set(expected.tolist()))
    assert sum(done) == 120
    groups = found.lists()
    assert sum(map(len, groups)) == 120 - found.left + len(groups)
    assert [len(group) for group in groups] == sorted(map(len, groups), reverse=True)
    for group in groups:
        assert expected[group].tolist() == [group[0]] * len(group)


def test_without_copies_no_group_and_equal_images_are_one():
    draw = np.random.default_rng(0)
    features = draw.standard_normal((50, 8)).astype(np.float32)
    assert find_groups(whitened(features), 0.999).lists() == []
    assert find_groups(whitened(np.ones((5, 8))), 0.9).lists() == []  # no difference from the mean: nothing to compare
    features[[7, 30, 31]] = features[7]
    found = find_groups(whitened(features), 0.999)
    assert found.lists() == [[7, 30, 31]]
    assert found.left == 48
    assert find_groups(whitened(features), 0.999, np.arange(50)[::-1]).lists() == [[31, 7, 30]]


def test_whitened_features_weigh_all_directions_alike():
    draw = np.random.default_rng(0)
    features = draw.standard_normal((4000, 6)) * (100, 50, 20, 10, 1e-3, 0) + 1000
    unit = whitened(features)
    assert torch.allclose(unit.norm(dim=1), torch.ones(4000), atol=1e-5)
    spread = unit.var(0).sort(descending=True).values
    assert spread[3] > 0.6 * spread[0]
    assert spread[4] < 1e-3  # below the noise: not blown up


def test_a_page_shows_the_groups(tmp_path, make_images):
    images = find_images(make_images(tmp_path / "images", 30))
    groups = [[0, 1, 2], *([2 * n, 2 * n + 1] for n in range(2, 15))]
    pages = list(draw_pages(groups, np.ones(30, np.float32), images, np.arange(30), View(32)))
    assert len(pages) == 2
    assert all(isinstance(page, Image.Image) for page in pages)
    assert pages[0].size[1] > pages[1].size[1]
