"""Run the protocols on arrays of features and targets, wherever they come from.

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
    """Features and targets of the training and test images, as every protocol takes them.

    Targets are (N, C) of 1, 0 and -1 (difficult). `left_out` are the classes that the SVM must not count, and why.
    """

    train_features: np.ndarray
    train_targets: np.ndarray
    test_features: np.ndarray
    test_targets: np.ndarray
    left_out: dict[int, str] = field(default_factory=dict)


def check_protocols(protocols: str) -> list[str]:
    """Parse a list of protocols such as "svm,knn".

    Raises:
        OdcftError: an unknown protocol, or none.
    """
    wanted = [name.strip() for name in protocols.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in PROTOCOLS]
    if unknown or not wanted:
        raise OdcftError(f"--protocol {protocols}: choose from {', '.join(PROTOCOLS)}, separated by commas.")
    return wanted


def evaluate_arrays(split: Split, protocols: Sequence[str], progress: Any = None, title: str = "SVM") -> dict[str, Any]:
    """Run every protocol on the same features.

    Args:
        split: features and targets.
        protocols: some of PROTOCOLS.
        progress: where to show the progress of the SVM.
        title: of that progress bar.

    Returns:
        One dict per protocol, as `evaluate --json` prints it, and with the test images' `scores` (svm) and `predicted`
        classes (knn).

    Raises:
        OdcftError: several labels per image for a protocol that needs one, or no class can be measured.
    """
    from odcft.progress import Progress

    results: dict[str, Any] = {}
    if "knn" in protocols:  # fail before anything slow starts
        train_N, test_N = class_numbers(split.train_targets), class_numbers(split.test_targets)
    if "svm" in protocols:
        from odcft.evaluation.svm import voc07_svm

        arrays = (split.train_features, split.train_targets, split.test_features, split.test_targets)
        with (progress or Progress(quiet=True)).phase(title, split.train_targets.shape[1], "classes") as advance:
            results["svm"] = voc07_svm(*arrays, left_out=split.left_out, advance=advance)
    if "knn" in protocols:
        from odcft.evaluation.knn import knn

        results["knn"] = knn(split.train_features, train_N, split.test_features, test_N)
    return results


def class_numbers(targets_NC: np.ndarray) -> np.ndarray:
    """The class number (N,) of each image.

    Raises:
        OdcftError: an image with no label, or with several.
    """
    several = (targets_NC == 1).sum(1) != 1
    if several.any():
        raise OdcftError(
            f"--protocol knn needs exactly one label per image, but {several.sum():,} of {len(several):,} images have "
            "none or several. Use --protocol svm."
        )
    return (targets_NC == 1).argmax(1)


def name_left_out(results: dict[str, Any], classes: list[str]) -> None:
    """Replace the numbers of the classes that the SVM left out by their names, in place."""
    if "svm" in results:
        results["svm"]["left_out"] = {classes[c]: reason for c, reason in results["svm"]["left_out"].items()}
