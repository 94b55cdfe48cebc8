"""What is printed of the results."""

import numpy as np

from odcft.evaluation.results_table import json_values, table_lines


def test_json_values_are_plain_numbers_without_nan():
    results = {"a": np.float32(0.5), "b": [np.int64(3), float("nan")], 3: (np.float64("inf"),), "scores": np.zeros(3)}
    assert json_values(results) == {"a": 0.5, "b": [3, None], "3": [None]}
    assert all(type(value) is kind for value, kind in zip(json_values(results)["b"], (int, type(None)), strict=True))


def test_of_many_classes_left_out_only_ten_are_named():
    svm = {"mAP": 50.0, "per_class": [None] * 12 + [50.0], "left_out": {f"c{i}": "no image" for i in range(12)}}
    said = table_lines({"svm": svm})
    assert said[1] == "  SVM mAP is the mean over 1 of 13 classes. Left out:"
    assert said[2:] == [*(f"    c{i}: no image" for i in range(10)), "    and 2 more"]


def figures(add=0.0):
    """Results of every protocol."""
    return {
        "svm": {"mAP": 50.0 + add, "per_class": [50.0, None], "left_out": {"b": "no test image"}},
        "low_shot": {
            **{"mAP": 40.0 + add, "per_k": {"1": 35.0, "2": 45.0}, "oracle": {"mAP": 41.0}, "per_class": [40.0, None]},
            **{"too_few": {"4": "a class has only 3 training images"}, "left_out": {"b": "no test image"}},
        },
        "linear": {"top1": 60.0, "logistic": {"top1": 62.5}},
        "knn": {"top1": 55.0, "per_k": {"10": 54.0, "20": 55.0}},
        "clusters": {"accuracy": 30.0, "purity": 33.0, "nmi": 0.25 + add / 100},
    }


def test_every_protocol_has_its_line():
    assert table_lines(figures()) == [
        "  SVM mAP        50.0",
        "  Low-shot mAP   40.0",
        "    best cost*   41.0",
        "  Linear top-1   60.0",
        "    logistic     62.5",
        "  kNN top-1      55.0",
        "  Cluster acc.   30.0",
        "    purity       33.0",
        "    NMI          0.25",
        "  Low-shot mAP by images per class: 1: 35.0 · 2: 45.0",
        "    left out: 4, because a class has only 3 training images",
        "  * with the SVM cost that is best on the test images, as published results choose it",
        "  kNN top-1 by neighbours: 10: 54.0 · 20: 55.0",
        "  SVM mAP is the mean over 1 of 2 classes. Left out:",
        "    b: no test image",
    ]


def test_before_and_after_of_every_protocol():
    change = {protocol: {"change": 1.0, "low": -0.5, "high": 2.0} for protocol in figures()}
    run = {"nmi": 0.5, "purity": 70.0, "accuracy": 20.0, "k": 30, "images": 5000}
    after = figures(2.0)
    after["clusters"]["run"] = run
    lines = table_lines({**after, "before": figures(), "change": change})
    assert lines[:3] == [
        "                before   after    change (95 % interval)",
        "  SVM mAP         50.0    52.0    +2.0  (-0.5 … +2.0)",
        "  Low-shot mAP    40.0    42.0    +2.0  (-0.5 … +2.0)",
    ]
    assert "    NMI           0.25    0.27    +0.02" in lines
    assert "  Clusters of the RUN: NMI 0.50, purity 70.0, accuracy 20.0 (30 clusters of 5,000 images)" in lines


def test_classes_left_out_of_low_shot_alone_are_named():
    lines = table_lines({"low_shot": figures()["low_shot"]})
    assert lines[-2:] == ["  Low-shot mAP is the mean over 1 of 2 classes. Left out:", "    b: no test image"]


def semi(add=0.0):
    setting = {"name": "quick", "epochs": 300, "batch": 12, "optimizer": "sgd", "lr": 0.01, "head_lr": 10.0}
    fractions = {
        "1%": {"top1": 20.0 + add, "top5": 50.0, "images": 12, "few": True, "setting": setting},
        "10%": {"top1": 30.0 + add, "top5": 60.0, "images": 120, "few": False, "setting": {**setting, "batch": 32}},
    }
    return {"semi": {"top1": 30.0 + add, "seed": 0, "per_fraction": fractions}}


def test_semi_says_how_many_labels_it_used_and_how_it_trained():
    change = {"change": 2.0, "low": -0.5, "high": 3.0}
    one = {"change": 2.0, "low": 0.5, "high": 4.0}
    how = "SGD, learning rate 0.01 (head: 10 times as high), divided by 5 after 60 % and after 80 % of the steps"
    changes = {"semi": {**change, "per_fraction": {"1%": one, "10%": change}}}
    assert table_lines({**semi(2.0), "before": semi(), "change": changes})[1:] == [
        "  Semi 10 %       30.0    32.0    +2.0  (-0.5 … +3.0)",
        "    top-5         60.0    60.0    +0.0",
        "    with 1 %      20.0    22.0    +2.0  (+0.5 … +4.0)",
        "    … top-5       50.0    50.0    +0.0",
        f"  Semi 1 %: 12 labels, quick setting: 300 epochs, batches of 12, {how}",
        "    one image of each class where 1 % would be less than one",
        f"  Semi 10 %: 120 labels, quick setting: 300 epochs, batches of 32, {how}",
    ]
    columns = [{"source": "a", **semi(), "change": changes}, {"source": "b", **semi()}]
    assert table_lines({**columns[0], "columns": columns})[1] == "  a       30.0  +2.0  (-0.5 … +3.0)"
