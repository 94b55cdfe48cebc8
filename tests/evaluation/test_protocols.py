"""The names of the protocols, and what all have in common."""

import json

import numpy as np
import pytest
from evaluation_helpers import strict_json

from odcft.errors import OdcftError
from odcft.evaluation.protocols import ONE_LABEL, PROTOCOLS, Split, check_labels, check_protocols, evaluate_arrays
from odcft.evaluation.results_table import json_values


def test_unknown_protocols_are_refused():
    with pytest.raises(OdcftError, match="choose from svm, low-shot, linear, knn, semi, clusters"):
        check_protocols("svm,nmi")
    assert check_protocols(" knn ,svm") == ["knn", "svm"]


def split_of(C=2, count=48):
    class_N = np.arange(count) % C
    features = (3 * np.eye(C, 4)[class_N] + np.random.default_rng(0).normal(size=(count, 4))).astype(np.float32)
    targets = np.eye(C, dtype=np.int64)[class_N]
    return Split(features[::2], targets[::2], features[1::2], targets[1::2])


def test_every_protocol_gives_the_promised_keys_and_numbers():
    """Those of INTERFACE: further keys may come, but none may go."""
    split = split_of(C=3)
    results = json_values(evaluate_arrays(split, PROTOCOLS))
    promised = {
        "svm": {"mAP", "per_class", "costs"},
        "low_shot": {"mAP", "per_k"},
        "linear": {"top1", "per_layer"},
        "knn": {"top1", "k"},
        "clusters": {"nmi", "purity", "accuracy"},
    }
    assert list(results) == list(promised)
    for protocol, keys in promised.items():
        assert keys <= set(results[protocol]), protocol
    assert not {"scores", "predicted", "correct"} & set(json.dumps(results).split('"'))
    assert strict_json(json.dumps(results)) == results
    assert results["linear"]["per_layer"] == {"last": results["linear"]["top1"]}


def test_only_what_is_asked_for_is_computed():
    assert list(evaluate_arrays(split_of(C=3), ["clusters", "knn"])) == ["knn", "clusters"]


@pytest.mark.parametrize("protocol", ONE_LABEL)
def test_labels_that_a_protocol_cannot_use_are_refused(protocol):
    split = split_of()
    several = np.ones_like(split.train_targets)
    for train, test in ((several, split.test_targets), (split.train_targets, 0 * split.test_targets)):
        with pytest.raises(OdcftError, match=f"--protocol {protocol} needs exactly one label per image, but 24 of 24"):
            check_labels(train, test, ["svm", protocol])
    same = np.repeat([[1, 0]], 24, axis=0)
    with pytest.raises(OdcftError, match=f"--protocol {protocol} needs training images of two classes, but all 24"):
        evaluate_arrays(Split(split.train_features, same, split.test_features, split.test_targets), [protocol])
    check_labels(several, several, ["svm", "low-shot"])
