"""Every protocol on features and targets, whoever made them.

Shapes: N images, F features, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from odcft.errors import OdcftError

PROTOCOLS = ("svm", "knn")


@dataclass
class Split:
    """Features and targets of training and test images: what every protocol takes.

    Targets are (N, C) of 1, 0 and -1 (difficult). `left_out` are classes that are not to count for svm, and why.
    """

    train_features: np.ndarray
    train_targets: np.ndarray
    test_features: np.ndarray
    test_targets: np.ndarray
    left_out: dict[int, str] = field(default_factory=dict)


def check_protocols(protocols: str) -> list[str]:
    """The protocols of "svm,knn".

    Raises:
        OdcftError: one that odcft does not have.
    """
    wanted = [name.strip() for name in protocols.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in PROTOCOLS]
    if unknown or not wanted:
        raise OdcftError(f"--protocol {protocols}: choose from {', '.join(PROTOCOLS)}, several joined by commas.")
    return wanted


def evaluate_arrays(split: Split, protocols: Sequence[str], progress: Any = None, title: str = "SVM") -> dict[str, Any]:
    """Every protocol on the same features.

    Args:
        split: of features and targets.
        protocols: of PROTOCOLS.
        progress: where to show how far the SVM is.
        title: of that.

    Returns:
        A dict a protocol (INTERFACE: evaluate --json), with `scores` (svm) and `predicted` (knn) of the test images.

    Raises:
        OdcftError: several labels an image where a protocol needs one, or no class that can be measured.
    """
    from odcft.progress import Progress

    results: dict[str, Any] = {}
    if "knn" in protocols:  # refused before anything slow is done
        train_N, test_N = one_class(split.train_targets), one_class(split.test_targets)
    if "svm" in protocols:
        from odcft.evaluation.svm import voc07_svm

        arrays = (split.train_features, split.train_targets, split.test_features, split.test_targets)
        with (progress or Progress(quiet=True)).phase(title, split.train_targets.shape[1], "classes") as advance:
            results["svm"] = voc07_svm(*arrays, left_out=split.left_out, advance=advance)
    if "knn" in protocols:
        from odcft.evaluation.knn import knn

        results["knn"] = knn(split.train_features, train_N, split.test_features, test_N)
    return results


def one_class(targets_NC: np.ndarray) -> np.ndarray:
    """The class (N,) of each image that has exactly one."""
    several = (targets_NC == 1).sum(1) != 1
    if several.any():
        raise OdcftError(
            f"--protocol knn needs exactly one label an image, and {several.sum():,} of {len(several):,} images have "
            "none or several. Use --protocol svm."
        )
    return (targets_NC == 1).argmax(1)


def name_left_out(results: dict[str, Any], classes: list[str]) -> None:
    """Call the classes that the SVM left out by their names."""
    if "svm" in results:
        results["svm"]["left_out"] = {classes[c]: reason for c, reason in results["svm"]["left_out"].items()}
