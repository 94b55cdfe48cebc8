"""Run the protocols on features read from a file: computed elsewhere, or by `odcft embed`.

Shapes: N images, C classes.
"""

import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from odcft.errors import OdcftError
from odcft.evaluation.embedding_files import read_parquet
from odcft.evaluation.labels import WITHOUT_LABELS, held_out, label_targets, labels_per_image
from odcft.evaluation.per_class import add_per_class
from odcft.evaluation.protocols import ON_IMAGES, Split, evaluate_arrays, name_left_out

LARGEST = 1e150  # of features
MAX_TARGETS = 1 << 29  # images times classes
MAX_EXPANDED = 1 << 31  # bytes that any archive may expand to
NAMES = ("train_features", "train_targets", "test_features", "test_targets")


def evaluate_file(
    path: Path,
    protocols: Sequence[str],
    progress: Any = None,
    *,
    test: Path | None = None,
    per_class: bool = False,
) -> dict[str, Any]:
    """Run `evaluate_arrays` on features from a file.

    Args:
        path: an .npz of train_features, train_targets, test_features and test_targets; or what `odcft embed` writes
            (.npz or .parquet, with labels). Targets may be (N, C) of 1, 0, -1, or (N,) class numbers or names.
        protocols: some of PROTOCOLS.
        progress: where to report.
        test: of files that `odcft embed` wrote, the one to test on; without it, a stratified half is held out.
        per_class: add the figures of each class (`add_per_class`).

    Returns:
        The dict of `evaluate_arrays`, with `classes`, `train_images` and `test_images`.

    Raises:
        OdcftError: the file does not exist, or its arrays do not match.
    """
    for name in protocols:
        if name in ON_IMAGES:
            raise OdcftError(
                f"--protocol {name} fine-tunes the network, so it needs a checkpoint and images, not --features."
            )
    arrays = _read(path)
    if "features" in arrays:
        split, classes = _split_embedding(path, arrays, test)
    elif test is not None:
        raise OdcftError(f"{path} has test features of its own. Drop --test.")
    else:
        split, classes = _split_arrays(path, *(arrays[name] for name in NAMES))
    results = evaluate_arrays(split, protocols, progress)
    name_left_out(results, classes)
    if per_class:
        results = add_per_class(results, classes, split.train_targets, split.test_targets)
    counts = {"train_images": len(split.train_features), "test_images": len(split.test_features)}
    return {**results, "classes": classes, **counts}


def _split_arrays(
    path: Path, train: np.ndarray, train_targets: np.ndarray, test: np.ndarray, test_targets: np.ndarray
) -> tuple[Split, list[str]]:
    """A split of checked arrays, and its classes."""
    try:
        _check_features(train, test)
        _check_shapes(train, train_targets, test, test_targets)
        if train_targets.ndim == 1:
            classes, train_targets, test_targets = _targets_of_numbers(train_targets, test_targets)
        else:
            classes, train_targets, test_targets = _targets_of_rows(train_targets, test_targets)
    except OdcftError as error:
        raise OdcftError(f"{path}: {error}.") from None
    return Split(train, train_targets, test, test_targets), classes


def _split_embedding(path: Path, arrays: dict[str, np.ndarray], test: Path | None) -> tuple[Split, list[str]]:
    """A split of what `odcft embed` writes: of one file, half of the images of each class is held out."""
    found = [(path, arrays)]
    if test is not None:
        found.append((test, _read(test)))
    labelled = []
    for name, one in found:
        if "labels" not in one:
            raise OdcftError(
                f"{name} has no labels. Embed images with one folder per class, or a .csv of path,label. "
                f"{WITHOUT_LABELS}"
            )
        rows, labels = one["features"], one["labels"]
        if labels.ndim != 1:
            raise OdcftError(f"{name}: labels should be one text per image, but their shape is {labels.shape}.")
        names = labels_per_image([str(label) for label in labels])
        if rows.ndim != 2 or len(rows) != len(names):
            raise OdcftError(f"{name}: {len(names):,} labels do not match features of shape {rows.shape}.")
        kept = [i for i, mine in enumerate(names) if mine]
        labelled.append((rows[np.array(kept, dtype=np.int64)], [names[i] for i in kept]))
    classes = sorted({label for mine in labelled[0][1] for label in mine})
    if len(classes) < 2:
        what = f"only one class ({classes[0]}), and two are needed" if classes else "all of its labels are empty"
        raise OdcftError(f"{path}: {what}. Embed images of several classes. {WITHOUT_LABELS}")
    if len(labelled[0][1]) * len(classes) > MAX_TARGETS:
        raise OdcftError(f"{path}: {len(classes):,} classes of {len(labelled[0][1]):,} images are too many to compare.")
    unknown = sorted({label for _, names in labelled[1:] for mine in names for label in mine} - set(classes))
    if unknown:
        raise OdcftError(f"{test} has a class that {path} does not have: {unknown[0]}. Both need the same classes.")
    targets = [label_targets(names, [[]] * len(names), classes) for _, names in labelled]
    features = [one for one, _ in labelled]
    if test is None:
        half = held_out(targets[0])
        features, targets = [features[0][~half], features[0][half]], [targets[0][~half], targets[0][half]]
    return _split_arrays(path, features[0], targets[0], features[1], targets[1])[0], classes


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of NAMES; or `features` and, if there are any, `labels`, of what `odcft embed` writes."""
    unusable = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error)
    odd = (RuntimeError, tokenize.TokenError, SyntaxError)  # encrypted or unknown members, headers that are not Python
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a file")
        _refuse_bomb(path)
        if path.suffix == ".parquet":
            return read_parquet(path)
        if path.exists() and not zipfile.is_zipfile(path):  # np.load would advise to load it unsafely
            raise ValueError("it is not an archive of arrays")
        with np.load(path) as arrays:  # refuses pickled objects
            if "features" in arrays and NAMES[0] not in arrays:
                return {name: arrays[name] for name in ("features", "labels") if name in arrays}
            return {name: arrays[name] for name in NAMES}
    except (*unusable, *odd, MemoryError) as error:
        raise OdcftError(
            f"{path} is not an .npz file with {', '.join(NAMES[:3])} and {NAMES[3]}, nor one that "
            f"odcft embed wrote ({error})."
        ) from None


def _refuse_bomb(path: Path) -> None:
    """Raise a ValueError if the arrays of an .npz would take far more memory than the file suggests."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        expanded = sum(member.file_size for member in archive.infolist())
    if expanded > max(MAX_EXPANDED, 20 * path.stat().st_size):
        raise ValueError(f"its {path.stat().st_size:,} bytes expand to {expanded:,}")


def _check_features(train: np.ndarray, test: np.ndarray) -> None:
    for name, features in (("train_features", train), ("test_features", test)):
        if features.ndim != 2 or features.dtype.kind not in "fiu":
            raise OdcftError(
                f"{name} must be numbers with one row per image, not {features.dtype} of shape {features.shape}"
            )
        if not features.size:
            raise OdcftError(f"{name} is empty: its shape is {features.shape}")
        if bad := len(features) - int(np.isfinite(features).all(1).sum()):
            raise OdcftError(f"{bad:,} of {len(features):,} rows of {name} hold NaN or infinite numbers")
        if float(np.abs(features).max()) > LARGEST:
            raise OdcftError(f"{name} holds numbers above {LARGEST:g}, whose squares overflow. Scale the features")
    if train.shape[1] != test.shape[1]:
        raise OdcftError(
            f"train_features has {train.shape[1]} columns and test_features {test.shape[1]}: make them equal"
        )


def _check_shapes(train: np.ndarray, train_targets: np.ndarray, test: np.ndarray, test_targets: np.ndarray) -> None:
    """Check that the targets have the shapes that the features ask for."""
    if train_targets.ndim != test_targets.ndim or train_targets.shape[1:] != test_targets.shape[1:]:
        raise OdcftError(
            f"train_targets of shape {train_targets.shape} does not match test_targets of shape {test_targets.shape}"
        )
    for name, features, targets in (("train", train, train_targets), ("test", test, test_targets)):
        if targets.ndim not in (1, 2) or len(targets) != len(features):
            raise OdcftError(
                f"{name}_targets has shape {targets.shape}, but {name}_features has {len(features):,} rows"
            )


def _targets_of_rows(train_NC: np.ndarray, test_NC: np.ndarray) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Classes, and (N, C) integer targets, from rows of 1, 0 and -1."""
    for name, targets in (("train_targets", train_NC), ("test_targets", test_NC)):
        if targets.dtype.kind not in "fiub" or not np.isin(targets, (-1, 0, 1)).all():
            raise OdcftError(
                f"{name} may hold only 1 (present), 0 (absent) and -1 (difficult), or one class number per row"
            )
    return [str(c) for c in range(train_NC.shape[1])], train_NC.astype(np.int64), test_NC.astype(np.int64)


def _targets_of_numbers(train_N: np.ndarray, test_N: np.ndarray) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Classes, and (N, C) targets, from one class number or name per row."""
    for name, targets in (("train_targets", train_N), ("test_targets", test_N)):
        if targets.dtype.kind not in "fiubUS" or (targets.dtype.kind == "f" and not (targets % 1 == 0).all()):
            raise OdcftError(f"{name} must be whole class numbers or names, not {targets.dtype}")
    if (train_N.dtype.kind in "US") != (test_N.dtype.kind in "US"):
        raise OdcftError("train_targets and test_targets must both be numbers, or both names")
    classes = np.unique(train_N)
    if len(classes) < 2:
        raise OdcftError(f"train_targets has only one class ({classes[0]})")
    unknown = np.setdiff1d(test_N, classes)
    if len(unknown):
        raise OdcftError(f"test_targets has a class that train_targets does not have: {unknown[0]}")
    train_NC, test_NC = ((class_N[:, None] == classes).astype(np.int64) for class_N in (train_N, test_N))
    return [str(name) for name in classes.tolist()], train_NC, test_NC
