"""Run the protocols on arrays of features and targets, wherever they come from.

Shapes: N images, F features, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from odcft.errors import OdcftError

PROTOCOLS = ("svm", "low-shot", "linear", "knn", "semi", "clusters")
UNLABELLED = "unlabelled"  # needs no labels, and works in another way: unlabelled_comparison.py
DEFAULT = ("svm", "knn")
ONE_LABEL = ("linear", "knn", "semi", "clusters")  # protocols that need exactly one label per image
ON_IMAGES = ("semi",)  # protocols that train the network itself, so they need images, not features


@dataclass
class Split:
    """Features and targets of the training and test images, as every protocol takes them.

    Targets are (N, C) of 1, 0 and -1 (difficult). `left_out` are the classes that the SVMs must not count, and why.
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
    known = (*PROTOCOLS, UNLABELLED)
    if not wanted or any(name not in known for name in wanted):
        raise OdcftError(f"--protocol {protocols}: choose from {', '.join(known)}, separated by commas.")
    return wanted


def with_labels(protocols: Sequence[str], *, features: bool, test: str | None, layers: str) -> list[str]:
    """The protocols that need labels: all but `unlabelled`.

    Args:
        protocols: as `check_protocols` returns them.
        features: whether they are to run on features from a file.
        test, layers: as for `comparison.evaluate`.

    Raises:
        OdcftError: `unlabelled` cannot do this.
    """
    labelled = [name for name in protocols if name != UNLABELLED]
    if len(labelled) < len(protocols) and features:
        raise OdcftError("--protocol unlabelled compares views of images: give CKPT and DATA instead of --features.")
    if not labelled and test is not None:
        raise OdcftError("--protocol unlabelled has no test images: drop --test.")
    if not labelled and layers != "last":
        raise OdcftError(f"--protocol unlabelled measures the last layer only: drop --layers {layers}.")
    return labelled


def evaluate_arrays(split: Split, protocols: Sequence[str], progress: Any = None, suffix: str = "") -> dict[str, Any]:
    """Run every protocol on the same features.

    Args:
        split: features and targets.
        protocols: some of PROTOCOLS; those of ON_IMAGES are left to others.
        progress: where to show the progress of each.
        suffix: of the titles of the progress bars.

    Returns:
        One dict per protocol, as `evaluate --json` prints it (`low-shot` under `low_shot`), and with what the intervals
        need: the test images' `scores` (svm, low-shot) or `predicted` classes (linear, knn), or which images are
        `correct` (clusters).

    Raises:
        OdcftError: several labels per image for a protocol that needs one, or no class can be measured.
    """
    from odcft.progress import Progress

    progress = progress or Progress(quiet=True)
    check_labels(split.train_targets, split.test_targets, protocols)  # fail before anything slow starts
    return {
        name.replace("-", "_"): run(split, progress, suffix)
        for name, run in (
            ("svm", _svm),
            ("low-shot", _low_shot),
            ("linear", _linear),
            ("knn", _knn),
            ("clusters", _clusters),
        )
        if name in protocols
    }


def _svm(split: Split, progress: Any, suffix: str) -> dict[str, Any]:
    from odcft.evaluation.svm import voc07_svm

    arrays = (split.train_features, split.train_targets, split.test_features, split.test_targets)
    with progress.phase(f"SVM{suffix}", split.train_targets.shape[1], "classes") as advance:
        return voc07_svm(*arrays, left_out=split.left_out, advance=advance)


def _low_shot(split: Split, progress: Any, suffix: str) -> dict[str, Any]:
    from odcft.evaluation.low_shot import low_shot

    arrays = (split.train_features, split.train_targets, split.test_features, split.test_targets)
    with progress.phase(f"Low-shot{suffix}", split.train_targets.shape[1], "classes") as advance:
        return low_shot(*arrays, left_out=split.left_out, advance=advance)


def _linear(split: Split, progress: Any, suffix: str) -> dict[str, Any]:
    from odcft.evaluation.linear import count_of_steps, linear

    train, test = {"last": split.train_features}, {"last": split.test_features}
    train_N, test_N = class_numbers(split.train_targets), class_numbers(split.test_targets)
    with progress.phase(f"Linear{suffix}", count_of_steps(len(train), len(train_N)), "epochs") as advance:
        return linear(train, train_N, test, test_N, advance=advance)


def _knn(split: Split, progress: Any, suffix: str) -> dict[str, Any]:
    from odcft.evaluation.knn import knn

    train_N, test_N = class_numbers(split.train_targets), class_numbers(split.test_targets)
    with progress.waiting(f"Nearest neighbours{suffix}"):
        return knn(split.train_features, train_N, split.test_features, test_N)


def _clusters(split: Split, progress: Any, suffix: str) -> dict[str, Any]:
    """Clusters of training and test images together: they need no split."""
    from odcft.evaluation.clusters import cluster_features

    features = np.concatenate([split.train_features, split.test_features])
    class_N = class_numbers(np.concatenate([split.train_targets, split.test_targets]))
    with progress.waiting(f"K-Means{suffix} of {len(features):,} images"):
        return cluster_features(features, class_N)


def check_labels(train_NC: np.ndarray, test_NC: np.ndarray, protocols: Sequence[str]) -> None:
    """Refuse labels that one of the protocols cannot use: several per image, or only one class to train on.

    Raises:
        OdcftError: naming the protocol.
    """
    for protocol in protocols:
        if protocol in ONE_LABEL:
            train_N = class_numbers(train_NC, protocol)
            class_numbers(test_NC, protocol)
            if len(np.unique(train_N)) < 2:
                raise OdcftError(
                    f"--protocol {protocol} needs training images of two classes, but all {len(train_N):,} are of the "
                    "same one. Give images of other classes too."
                )


def class_numbers(targets_NC: np.ndarray, protocol: str = "knn") -> np.ndarray:
    """The class number (N,) of each image, for a protocol that needs one.

    Raises:
        OdcftError: an image with no label, or with several.
    """
    several = (targets_NC == 1).sum(1) != 1
    if several.any():
        raise OdcftError(
            f"--protocol {protocol} needs exactly one label per image, but {several.sum():,} of {len(several):,} "
            f"images {'has' if several.sum() == 1 else 'have'} none or several. Use --protocol svm or low-shot."
        )
    return (targets_NC == 1).argmax(1)


def name_left_out(results: dict[str, Any], classes: list[str]) -> None:
    """Replace the numbers of the classes that the SVMs left out by their names, in place."""
    for protocol in ("svm", "low_shot"):
        if protocol in results:
            left_out = results[protocol]["left_out"]
            results[protocol]["left_out"] = {classes[c]: reason for c, reason in left_out.items()}
