"""Measures without labels, on cases worked out by hand."""

import math

import numpy as np
import pytest

from odcft.evaluation.unlabelled import (
    cluster_stability,
    dead_share,
    effective_rank,
    lidar,
    spectrum_decay,
    spread,
)


def rotated(rows, seed=0):
    """The rows in another orthonormal basis."""
    width = rows.shape[1]
    return rows @ np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0]


def orthonormal(count, width, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(count, width)))[0]


def test_effective_rank():
    assert effective_rank(rotated(np.eye(8))) == pytest.approx(8, rel=1e-4)
    assert effective_rank(np.outer(np.arange(1, 9), np.ones(5))) == pytest.approx(1, rel=1e-4)
    assert effective_rank(np.eye(8)[:, :3] * 100) == pytest.approx(3, rel=1e-4)
    # Singular values 2, 1, 1: shares 1/2, 1/4, 1/4, entropy 1.5 bits.
    assert effective_rank(rotated(np.diag([2.0, 1, 1]))) == pytest.approx(2**1.5, rel=1e-4)
    assert effective_rank(np.zeros((4, 3))) == 0


def test_lidar_counts_directions_between_images_relative_to_those_within():
    # Four images at the corners of a square, each with two views 1 apart along a third axis.
    corners = np.array([[1, 1, 0], [1, -1, 0], [-1, 1, 0], [-1, -1, 0]], float)
    away = np.array([0, 0, 0.5])
    views = np.stack([corners + away, corners - away], 1)
    assert lidar(views) == pytest.approx(2, rel=1e-3)
    assert lidar(rotated(views.reshape(8, 3)).reshape(4, 2, 3)) == pytest.approx(2, rel=1e-3)
    # Views vary along the first axis, with variance 2, so that it weighs 1 / (2 + delta), and the second 1 / delta:
    # what differs between images there is lost in what differs between views.
    away = np.array([1, 0, 0])
    views = np.stack([corners + away, corners - away], 1)
    assert lidar(views) == pytest.approx(1, rel=2e-3)
    # With a delta of 1 the axes weigh 1 / 3 and 1.
    share = np.array([0.25, 0.75])
    expected = math.exp(-(share * np.log(share)).sum())
    assert lidar(views, delta=1.0) == pytest.approx(expected, rel=1e-3)
    assert lidar(np.ones((4, 2, 3))) == 0


def test_the_decay_of_the_spectrum_is_the_exponent_it_was_made_with():
    centred = orthonormal(200, 20) - orthonormal(200, 20).mean(0)
    directions = np.linalg.qr(centred)[0]  # centred, so that the covariance has exactly this spectrum
    for exponent in (0.5, 1, 2):
        features = rotated(directions * np.arange(1, 21) ** (-exponent / 2)) + 3
        assert spectrum_decay(features) == pytest.approx(exponent)
        assert spectrum_decay(features, 5, 15) == pytest.approx(exponent)
    assert math.isnan(spectrum_decay(np.outer(np.arange(5), [1.0, 2])))
    assert math.isnan(spectrum_decay(np.ones((5, 3))))


def test_clusters_that_are_there_are_found_again_and_others_are_not():
    draw = np.random.default_rng(0)
    apart = 20 * np.eye(4, 6)[np.arange(200) % 4] + draw.normal(size=(200, 6))
    assert cluster_stability(apart, 3, seed=1) <= 1
    assert cluster_stability(apart, 4, seed=3) > 0.6  # a bad start may join two
    noise = draw.normal(size=(300, 30))
    assert cluster_stability(noise, 8) < 0.3
    assert cluster_stability(noise, 8, seed=1) == cluster_stability(noise, 8, seed=1)


def test_spread():
    assert spread(np.eye(5) * [[1], [2], [3], [4], [5]]) == pytest.approx(1)
    assert spread(np.outer([1, 2, 3], [1.0, 1])) == pytest.approx(0)
    assert spread(np.array([[1.0, 0], [-1, 0]])) == pytest.approx(2)
    assert spread(np.array([[1.0, 0], [0.5, math.sqrt(0.75)]])) == pytest.approx(0.5)  # 60 degrees


def test_dead_features():
    features = np.random.default_rng(0).normal(size=(50, 4))
    assert dead_share(features) == 0
    features[:, 1] = 3
    features[:, 2] *= 1e-5
    assert dead_share(features) == 0.5
    assert dead_share(np.ones((3, 2))) == 1
