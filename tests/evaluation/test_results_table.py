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
