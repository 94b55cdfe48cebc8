"""Every protocol on features made elsewhere, from an .npz file."""

import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from odcft.errors import OdcftError
from odcft.evaluation.protocols import Split, evaluate_arrays, name_left_out

NAMES = ("train_features", "train_targets", "test_features", "test_targets")


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
