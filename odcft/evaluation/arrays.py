"""Every protocol on features and targets, whoever made them.

Shapes: N images, F features, C classes.
"""

import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from odcft.errors import OdcftError

PROTOCOLS = ("svm", "knn")
NAMES = ("train_features", "train_targets", "test_features", "test_targets")


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
    from odcft.log import Progress

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


def evaluate_file(path: Path, protocols: Sequence[str], progress: Any = None) -> dict[str, Any]:
    """`evaluate_arrays` on an .npz of train_features, train_targets, test_features, test_targets.

    Targets may be (N, C) of 1, 0, -1, or (N,) class numbers or names.

    Returns:
        `evaluate_arrays`'s dict, with `classes`, `train_images` and `test_images`.

    Raises:
        OdcftError: no such file, or arrays that do not go together.
    """
    unusable = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error)
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no file")
        with np.load(path) as arrays:  # refuses pickled objects
            train, train_targets, test, test_targets = (arrays[name] for name in NAMES)
    except (*unusable, MemoryError) as error:
        raise OdcftError(f"{path} is not an .npz with {', '.join(NAMES[:3])} and {NAMES[3]} ({error}).") from None

    def refuse(what: str) -> None:
        raise OdcftError(f"{path}: {what}.")

    for name, features in (("train_features", train), ("test_features", test)):
        if features.ndim != 2 or features.dtype.kind not in "fiu":
            refuse(f"{name} must be numbers, a row an image, not {features.dtype} of the shape {features.shape}")
        if not features.size:
            refuse(f"{name} is empty: its shape is {features.shape}")
        if bad := len(features) - int(np.isfinite(features).all(1).sum()):
            refuse(f"{bad:,} of {len(features):,} rows of {name} hold NaN or infinite numbers")
    if train.shape[1] != test.shape[1]:
        refuse(f"train_features are {train.shape[1]} numbers wide, test_features {test.shape[1]}: they must be alike")
    if train_targets.ndim != test_targets.ndim or train_targets.shape[1:] != test_targets.shape[1:]:
        refuse(f"train_targets of the shape {train_targets.shape} do not go with test_targets of {test_targets.shape}")
    pairs = (("train", train, train_targets), ("test", test, test_targets))
    for name, features, targets in pairs:
        if targets.ndim not in (1, 2) or len(targets) != len(features):
            refuse(f"{name}_targets has the shape {targets.shape}, where {name}_features has {len(features):,} rows")
    if train_targets.ndim == 1:
        classes, train_targets, test_targets = _of_numbers(train_targets, test_targets, refuse)
    else:
        classes = [str(c) for c in range(train_targets.shape[1])]
        for name, targets in (("train_targets", train_targets), ("test_targets", test_targets)):
            if targets.dtype.kind not in "fiub" or not np.isin(targets, (-1, 0, 1)).all():
                refuse(f"{name} may hold only 1 (present), 0 (absent) and -1 (difficult), or be one class number a row")
        train_targets, test_targets = train_targets.astype(np.int64), test_targets.astype(np.int64)
    results = evaluate_arrays(Split(train, train_targets, test, test_targets), protocols, progress)
    name_left_out(results, classes)
    return {**results, "classes": classes, "train_images": len(train), "test_images": len(test)}


def _of_numbers(
    train_N: np.ndarray, test_N: np.ndarray, refuse: Callable[[str], None]
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Classes, and (N, C) targets, of a class number or name a row."""
    for name, targets in (("train_targets", train_N), ("test_targets", test_N)):
        if targets.dtype.kind not in "fiubUS" or (targets.dtype.kind == "f" and not (targets % 1 == 0).all()):
            refuse(f"{name} must be whole class numbers or names, not {targets.dtype}")
    if (train_N.dtype.kind in "US") != (test_N.dtype.kind in "US"):
        refuse("train_targets and test_targets must both be numbers, or both names")
    classes = np.unique(train_N)
    if len(classes) < 2:
        refuse(f"train_targets has only one class ({classes[0]})")
    strangers = np.setdiff1d(test_N, classes)
    if len(strangers):
        refuse(f"test_targets has a class that train_targets has not: {strangers[0]}")
    train_NC, test_NC = ((class_N[:, None] == classes).astype(np.int64) for class_N in (train_N, test_N))
    return [str(name) for name in classes.tolist()], train_NC, test_NC


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
