"""The labels that evaluations need, and which images are for training and which for the test."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from odcft.data import Images, find_images
from odcft.errors import OdcftError


@dataclass
class Labelled:
    """Images with targets (N, C) of 1 and 0, and the rows to train and to test on."""

    images: Images
    classes: list[str]
    targets: np.ndarray
    train_rows: np.ndarray
    test_rows: np.ndarray


def labelled(data: str, test: str | None) -> Labelled:
    """Labelled images of one set, half of each class held out, or of two.

    Args:
        data: sub-folders are classes, or a list with labels (several joined by ";").
        test: the same, to test on.

    Raises:
        OdcftError: no labels, only one class, a class without enough images, or other classes in the test.
    """
    train = find_images(data)
    images, train_count = train, len(train)
    if test is not None:
        other = find_images(test)
        names = [train.path(i) for i in range(len(train))] + [other.path(i) for i in range(len(other))]
        skipped = dict(Counter(train.skipped) + Counter(other.skipped))
        images = Images(train.source, train.root.__class__(""), names, [*train.classes(), *other.classes()], skipped)
    per_image = [[part for part in label.split(";") if part] for label in images.classes()]
    classes = sorted({name for names in per_image[:train_count] for name in names})
    if len(classes) < 2:
        found = f"only one class ({classes[0]})" if classes else "no labels"
        raise OdcftError(
            f"{data}: {found}. Put each class into a folder of its own, or give a .csv with columns path,label."
        )
    strangers = sorted({name for names in per_image[train_count:] for name in names} - set(classes))
    if strangers:
        raise OdcftError(f"{test} has a class that {data} has not: {strangers[0]}. Both need the same classes.")
    number = {name: c for c, name in enumerate(classes)}
    targets = np.zeros((len(images), len(classes)), dtype=np.int64)
    for i, names in enumerate(per_image):
        targets[i, [number[name] for name in names]] = 1
    if test is not None:
        return Labelled(images, classes, targets, np.arange(train_count), np.arange(train_count, len(images)))
    train_rows, test_rows = _halves(targets, classes)
    return Labelled(images, classes, targets, train_rows, test_rows)


def _halves(targets: np.ndarray, classes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """A stratified half each: every other image of each combination of labels, in an order drawn with a fixed seed."""
    few = [classes[c] for c in range(len(classes)) if targets[:, c].sum() < 4]
    if few:
        raise OdcftError(
            f"Class {few[0]} has fewer than 4 images: too few to hold a half out. "
            "Give a set for --test, or more images."
        )
    order = np.random.default_rng(0).permutation(len(targets))
    groups: dict[bytes, int] = {}
    is_test = np.zeros(len(targets), dtype=bool)
    for row in order:
        key = targets[row].tobytes()
        groups[key] = groups.get(key, 0) + 1
        is_test[row] = groups[key] % 2 == 0
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)
