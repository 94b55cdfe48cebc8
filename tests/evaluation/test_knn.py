"""Nearest neighbours: cosine, weighted votes."""

import numpy as np
import pytest

from odcft.evaluation import knn as module
from odcft.evaluation.knn import knn


def test_a_test_image_gets_the_class_of_similar_images():
    train = np.array([[1.0, 0], [2, 0.1], [0, 1], [0.1, 3]], dtype=np.float32)
    test = np.array([[5.0, 0.2], [0.3, 9]], dtype=np.float32)
    result = knn(train, np.array([0, 0, 1, 1]), test, np.array([0, 0]), k=2)
    assert result["predicted"].tolist() == [0, 1]
    assert result["top1"] == 50
    assert result["k"] == 2


def at(*degrees):
    return np.stack([np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))], axis=1)


def test_a_vote_is_weighted_by_the_exponential_of_similarity_over_temperature():
    # Two neighbours at cosine c outvote one at 1 where 2 exp(c / 0.07) > exp(1 / 0.07): c > 1 - 0.07 ln 2 = 0.9515.
    classes = np.array([0, 1, 1])
    for cosine, winner in ((0.9505, 0), (0.9525, 1)):
        away = np.rad2deg(np.arccos(cosine))
        assert knn(at(0, away, -away), classes, at(0), np.array([0]))["predicted"].tolist() == [winner]


def test_only_the_k_most_similar_vote():
    train, classes = at(0, 8, -8, 9, -9), np.array([1, 0, 0, 0, 0])
    assert knn(train, classes, at(0), np.array([1]), k=1)["predicted"].tolist() == [1]
    assert knn(train, classes, at(0), np.array([1]))["predicted"].tolist() == [0]


def test_k_is_20_or_the_number_of_training_images():
    train, classes = at(*range(30)), np.arange(30) % 2
    assert knn(train, classes, train, classes)["k"] == 20
    assert knn(train[:7], classes[:7], train, classes)["k"] == 7


def test_the_length_of_features_does_not_matter():
    train, test = np.array([[1e30, 0], [0, 1.0]]), np.array([[1e-5, 0], [1, 3e30]])
    assert knn(train, np.array([0, 1]), test, np.array([0, 1]), k=1)["top1"] == 100


@pytest.mark.parametrize("count", [1023, 1025, 2049])
def test_any_number_of_test_images(count):
    train, classes = at(0, 90, 180), np.array([0, 1, 2])
    expected = np.arange(count) % 3
    result = knn(train, classes, at(*(90 * expected + 3)), expected, k=1)
    assert result["predicted"].tolist() == expected.tolist()
    assert result["top1"] == 100


def brute_force(train, train_N, test, k):
    """Classes of the test images, one image at a time, in float64."""
    train, test = (
        part.astype(np.float64) / np.linalg.norm(part.astype(np.float64), axis=1)[:, None] for part in (train, test)
    )
    predicted = []
    for row in test:
        similarity = train @ row
        nearest = np.argsort(-similarity)[:k]
        votes = np.bincount(train_N[nearest], weights=np.exp(similarity[nearest] / 0.07), minlength=5)
        predicted.append(votes.argmax())
    return np.array(predicted)


@pytest.mark.parametrize("blocks", [(16_384, 1024), (64, 16)])
def test_every_k_equals_brute_force_in_float64(blocks, monkeypatch):
    monkeypatch.setattr(module, "TRAIN_ROWS", blocks[0])
    monkeypatch.setattr(module, "TEST_ROWS", blocks[1])
    draw = np.random.default_rng(0)
    train_N, test_N = draw.integers(0, 5, 301), draw.integers(0, 5, 100)
    train, test = (draw.normal(size=(len(n), 8)) + np.eye(5, 8)[n] for n in (train_N, test_N))
    result = knn(train.astype(np.float32), train_N, test.astype(np.float32), test_N)
    expected = {
        k: brute_force(train.astype(np.float32), train_N, test.astype(np.float32), k) for k in (10, 20, 100, 200)
    }
    assert result["per_k"] == {str(k): 100 * (one == test_N).mean() for k, one in expected.items()}
    assert result["predicted"].tolist() == expected[20].tolist()
    assert len(set(result["per_k"].values())) > 1


def test_numbers_of_neighbours_above_that_of_the_training_images_are_left_out():
    train, classes = at(*range(30)), np.arange(30) % 2
    assert list(knn(train, classes, train, classes)["per_k"]) == ["10", "20"]
    assert list(knn(train[:7], classes[:7], train, classes)["per_k"]) == ["7"]


def test_among_identical_features_every_image_gets_the_same_class():
    train = np.full((40, 5), 3.3)
    result = knn(train, np.arange(40) % 2, train, np.arange(40) % 2)
    assert result["per_k"] == {"10": 50, "20": 50}


def test_similarities_that_float32_cannot_tell_apart_are_ranked():
    away = 1e-5  # radians: its cosine differs from 1 by 5e-11
    train = np.array([[np.cos(2 * away), np.sin(2 * away)], [np.cos(away), np.sin(away)]])
    assert knn(train, np.array([0, 1]), np.array([[1.0, 0]]), np.array([1]), k=1)["top1"] == 100
