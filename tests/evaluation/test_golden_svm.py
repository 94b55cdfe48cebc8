"""The linear SVMs of VOC07 give what the reference scripts gave."""

from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent.parent


def test_svm_equals_the_reference_scripts():
    from odcft.evaluation.svm import voc07_svm

    golden = np.load(ROOT / "tests" / "data" / "voc07_svm.npz")
    names = ("train_features", "train_targets", "test_features", "test_targets")
    results = voc07_svm(*(golden[name] for name in names), tuple(golden["costs"]))
    assert results["costs"] == pytest.approx(golden["chosen_cost"].tolist())
    assert results["per_class"] == pytest.approx((100 * golden["test_ap"]).tolist(), abs=1e-6)
    assert results["mAP"] == pytest.approx(100 * float(golden["mean_ap"]), abs=1e-6)
