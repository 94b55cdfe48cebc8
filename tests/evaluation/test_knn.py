"""Nearest neighbours: cosine, weighted votes."""

import numpy as np
import pytest

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
