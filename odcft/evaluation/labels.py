"""The labels that evaluations need, and which images are for training and which for the test.

Every image counts once. Left out, counted and named are images without a label, images that cannot be read, and files
with the same bytes as another: one of a set stays; of what stands in both sets, the one in the test; and none where the
labels differ. Without this, an image to be recognised could be among those that were learned from.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from odcft.data.duplicates import same_content
from odcft.data.sources import Images, find_images
from odcft.errors import OdcftError

FEWEST = 4  # images of a class, for a half of them to be held out


@dataclass
class Labelled:
    """Images with targets (N, C) of 1 and 0, and the rows to train and to test on.

    Attributes:
        images: of DATA, and behind them those of --test.
        classes: their names.
        targets: of all images.
        train_rows, test_rows: image numbers.
        sets: of DATA and of --test, where there is one: its name and how many images it has.
        left_out: why to image numbers; the keys are "unlabelled", "unreadable", "copies" and "contradictory".
        few: classes with too few images for a half to be held out, and how many they have.
    """

    images: Images
    classes: list[str]
    targets: np.ndarray
    train_rows: np.ndarray
    test_rows: np.ndarray
    sets: list[tuple[str, int]]
    left_out: dict[str, list[int]]
    few: dict[int, int] = field(default_factory=dict)
    alike: list[list[int]] = field(default_factory=list)  # images with the same bytes


def labelled(data: str, test: str | None) -> Labelled:
    """Labelled images of one set, half of each class held out, or of two.

    Args:
        data: sub-folders are classes, or a list with labels (several joined by ";").
        test: the same, to test on.

    Raises:
        OdcftError: no labels, only one class, no class with enough images, other classes in the test, or the same
            images in both sets.
    """
    found = [find_images(one) for one in (data, test) if one is not None]
    per_image = [names for images in found for names in _labels(images)]
    sets = [(str(name), len(images)) for name, images in zip((data, test), found, strict=False)]
    count = sets[0][1]
    classes = sorted({name for names in per_image[:count] for name in names})
    if len(classes) < 2:
        what = f"only one class ({classes[0]})" if classes else "no labels"
        raise OdcftError(
            f"{data}: {what}. Put each class into a folder of its own, or give a .csv with columns path,label."
        )
    strangers = sorted({name for names in per_image[count:] for name in names} - set(classes))
    if strangers:
        raise OdcftError(f"{test} has a class that {data} has not: {strangers[0]}. Both need the same classes.")
    if test is not None and not any(per_image[count:]):
        raise OdcftError(
            f"{test}: no labels. Put each class into a folder of its own, or give a .csv with columns path,label."
        )
    number = {name: c for c, name in enumerate(classes)}
    targets = np.zeros((len(per_image), len(classes)), dtype=np.int64)
    for i, names in enumerate(per_image):
        targets[i, [number[name] for name in names]] = 1
    images = found[0]
    if test is not None:
        paths = [one.path(i) for one in found for i in range(len(one))]
        skipped = Counter(found[0].skipped) + Counter(found[1].skipped)
        images = Images(images.source, images.root.__class__(""), paths, None, dict(skipped))
    no_rows = np.zeros(0, dtype=np.int64)
    labels = Labelled(images, classes, targets, no_rows, no_rows, sets, {}, alike=same_content(images))
    if test is None:
        _refuse_few(labels, targets)
    labels = _divided(labels, {})
    if labels.left_out["overlap"] and not len(labels.train_rows):
        raise OdcftError(
            f"Every image of {data} is in {test} as well: nothing is left to learn from. "
            "Give other images to --test, or leave it out, and a half is held out."
        )
    return labels


def without_unreadable(labels: Labelled, unreadable: Mapping[int, str]) -> Labelled:
    """The same labels, divided anew without the images that cannot be read.

    Args:
        labels: of `labelled`.
        unreadable: image number to reason.

    Raises:
        OdcftError: a class loses all its images of a set, or none has enough left.
    """
    labels, count = _divided(labels, unreadable), labels.sets[0][1]
    kept = np.concatenate([labels.train_rows, labels.test_rows])
    usable = np.isin(np.arange(len(labels.images)), kept)
    for (name, _), part in zip(labels.sets, (slice(0, count), slice(count, None)), strict=False):
        _refuse_loss(labels, name, part, usable, unreadable)
    if len(labels.sets) == 1:
        _refuse_few(labels, labels.targets[kept])
    return labels


def _divided(labels: Labelled, unreadable: Mapping[int, str]) -> Labelled:
    images, targets, count = labels.images, labels.targets, labels.sets[0][1]
    has_label: np.ndarray = (targets == 1).any(1)
    left_out: dict[str, list[int]] = {
        "unreadable": sorted(unreadable),
        "unlabelled": [i for i in range(len(images)) if not has_label[i] and i not in unreadable],
        **{"overlap": [], "copies": [], "contradictory": []},
    }
    usable = has_label.copy()
    usable[left_out["unreadable"]] = False
    for group in labels.alike:
        rows = [i for i in group if usable[i]]
        tested = [i for i in rows if i >= count]
        if len({targets[i].tobytes() for i in rows}) > 1:
            left_out["contradictory"] += rows
        elif tested:
            left_out["overlap"] += [i for i in rows if i < count]
            left_out["copies"] += tested[1:]
        else:
            left_out["copies"] += rows[1:]
    for out in left_out.values():
        usable[out] = False
    kept = np.flatnonzero(usable)
    if len(labels.sets) > 1:
        return replace(labels, train_rows=kept[kept < count], test_rows=kept[kept >= count], left_out=left_out)
    held_out = _held_out(targets[kept])
    few = {c: int(size) for c, size in enumerate(targets[kept].sum(0)) if size < FEWEST}
    return replace(labels, train_rows=kept[~held_out], test_rows=kept[held_out], left_out=left_out, few=few)


WORDS = {  # of one image, of several
    "unreadable": ("cannot be read", "cannot be read"),
    "unlabelled": ("has no label", "have no label"),
    "overlap": ("is in --test as well", "are in --test as well"),
    "copies": ("is the same file as another", "are the same files as others"),
    "contradictory": ("is the same file as one with another label", "are the same files as some with other labels"),
}


def told(
    left_out: Mapping[str, list[int]], labels: Labelled, unreadable: Mapping[int, str], most: int = 3
) -> list[str]:
    """What is left out, in words: a line a reason, with the names of a few images."""
    lines = []
    for reason, rows in left_out.items():
        names = [labels.images.names[i] + (f" ({unreadable[i]})" if i in unreadable else "") for i in rows[:most]]
        some = ", ".join(names) + (", …" if len(rows) > most else "")
        if rows:
            lines.append(f"{len(rows):,} of {len(labels.images):,} images {WORDS[reason][len(rows) > 1]}: {some}")
    return lines


def _refuse_few(labels: Labelled, targets: np.ndarray) -> None:
    if targets.sum(0).max() < FEWEST:
        raise OdcftError(
            f"Every class of {labels.sets[0][0]} has fewer than {FEWEST} images: too few to hold a half out. "
            "Give a set for --test, or more images."
        )


def _refuse_loss(labels: Labelled, name: str, part: slice, usable: np.ndarray, unreadable: Mapping[int, str]) -> None:
    """Refuse a set that has no image left, or a class of it that has none left, with the reasons."""
    targets, here = labels.targets, np.arange(len(labels.images))[part]
    if set(here.tolist()) <= set(unreadable):
        first = f"{labels.images.names[here[0]]}: {unreadable[int(here[0])].rstrip('.')}"
        raise OdcftError(f"None of the {len(here):,} images in {name} can be read; {first}.")
    what, rows = f"No image of {name}", set(here.tolist())
    if usable[part].any():
        lost = np.flatnonzero(targets[part].any(0) & ~targets[here[usable[part]]].any(0))
        if not len(lost):
            return
        what = f"No image of class {labels.classes[lost[0]]} in {name}"
        rows = set(here[targets[part, lost[0]] == 1].tolist())
    mine = {reason: [i for i in some if i in rows] for reason, some in labels.left_out.items()}
    raise OdcftError(f"{what} is left to evaluate on: {'; '.join(told(mine, labels, unreadable, most=1))}.")


def _labels(images: Images) -> list[list[str]]:
    """The labels of each image: those of a list, joined by ";", or the one that is its folder."""
    if images.labels is None:
        return [[label] if label else [] for label in images.classes()]
    return [[part.strip() for part in label.split(";") if part.strip()] for label in images.labels]


def _held_out(targets: np.ndarray) -> np.ndarray:
    """Which rows are for the test: every other one of each combination of labels, in an order of a fixed seed."""
    order = np.random.default_rng(0).permutation(len(targets))
    groups: dict[bytes, int] = {}
    is_test = np.zeros(len(targets), dtype=bool)
    for row in order:
        key = targets[row].tobytes()
        groups[key] = groups.get(key, 0) + 1
        is_test[row] = groups[key] % 2 == 0
    return is_test
