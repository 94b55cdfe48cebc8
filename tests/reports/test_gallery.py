"""Which images stand for a cluster, and how tight and stable it is, by hand."""

import numpy as np
import pytest

from odcft.reports.gallery import by_importance, make_gallery, overlaps
from odcft.reports.run_record import Assignment


def test_overlaps_do_not_depend_on_how_clusters_are_numbered():
    row_N = np.array([0, 0, 0, 1, 1, 2])
    other_N = np.array([7, 7, 5, 5, 5, 9])
    # {0,1,2} and {0,1}: 2 of 3. {3,4} and {2,3,4}: 2 of 3. {5} and {5}.
    assert overlaps(row_N, other_N).tolist() == [pytest.approx(2 / 3), pytest.approx(2 / 3), 1.0]


def test_a_small_cluster_shows_each_image_once():
    clusters = Assignment(list("abcdefg"), np.array([4, 4, 4, 4, 4, 4, 9]), np.arange(7).astype(np.float32))
    gallery = make_gallery(clusters)
    assert gallery.ids.tolist() == [4, 9]
    shown = [*gallery.near[0], *gallery.random[0], *gallery.far[0]]
    assert sorted(shown) == [0, 1, 2, 3, 4, 5]
    assert gallery.near[1] == [6]
    assert gallery.random[1] == gallery.far[1] == []


def test_every_cluster_has_its_nearest_image_before_any_has_a_second():
    draw = np.random.default_rng(0)
    cluster_N = np.sort(draw.integers(0, 20, 500))
    clusters = Assignment([""] * 500, cluster_N, draw.random(500).astype(np.float32))
    gallery = make_gallery(clusters)
    order = by_importance(gallery)
    assert sorted(order.tolist()) == list(range(500))
    K = len(gallery.ids)
    assert set(order[:K].tolist()) == {near[0] for near in gallery.near}
    assert set(gallery.row_N[order[K : 2 * K]].tolist()) == set(range(K))


def test_distances_that_are_missing_are_no_obstacle():
    gallery = make_gallery(Assignment(list("abc"), np.array([0, 0, 1]), np.full(3, np.nan, np.float32)))
    assert gallery.near == [[0, 1], [2]]
    assert np.isnan(gallery.tightness_K).all()
