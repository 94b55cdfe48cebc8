"""The labels of the images, and which images are for training and which for testing.

Every image counts once. Images without a label, images that cannot be read and files with the same bytes as another are
left out, counted and reported. Of identical files in one set, one stays; of identical files in both sets, the one in
the test set; if their labels differ, none. Otherwise a test image could also be among the training images.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from odcft.data.custom_reader import Reader
from odcft.data.duplicates import identical_files
from odcft.data.images import Images
from odcft.data.names import Names
from odcft.data.sources import find_images
from odcft.data.stores.tables import TableStore
from odcft.errors import OdcftError
from odcft.evaluation.voc_folder import LabelledSet, find_voc_folder, load_voc_sets
from odcft.progress import Progress

HOW_TO_LABEL = (
    "Put each class into its own folder, or give a table (.csv, .parquet) with a column `label`, or tar shards with "
    ".cls members."
)
WITHOUT_LABELS = "To compare checkpoints without labels: odcft evaluate RUN IMAGES/ --protocol unlabelled"
MIN_IMAGES = 4  # of a class, so that half of them can be held out


@dataclass
class LabelledImages:
    """Images with targets (N, C) of 1 (present), 0 (absent) and -1 (difficult), and the rows to train and test on.

    Attributes:
        images: those of DATA, followed by those of --test.
        classes: names of the classes.
        targets: of all images.
        train_rows, test_rows: image numbers.
        sets: name and number of images of DATA, and of --test if given.
        left_out: reason to image numbers; the reasons are the keys of REASONS.
        too_small: classes with too few images to hold out half, and how many they have.
        duplicates: groups of images with the same bytes.
        from_folders: the tables without a column of labels, where the folder of an image is its label.
    """

    images: Images
    classes: list[str]
    targets: np.ndarray
    train_rows: np.ndarray
    test_rows: np.ndarray
    sets: list[tuple[str, int]]
    left_out: dict[str, list[int]]
    too_small: dict[int, int] = field(default_factory=dict)
    duplicates: list[list[int]] = field(default_factory=list)
    from_folders: list[str] = field(default_factory=list)


@dataclass
class _BothSets:
    """Where the images of two sets are, one after the other: a store for `Images`."""

    train: Images
    test: Images

    def read(self, row: int) -> bytes:
        return self.train.read(row) if row < len(self.train) else self.test.read(row - len(self.train))

    def take(self, rows: np.ndarray) -> "_BothSets":
        """Those of these rows, which ascend: both sets stay one after the other."""
        count, left_out = len(self.train), set(range(len(self.train) + len(self.test))) - set(rows.tolist())
        return _BothSets(
            self.train.without({row for row in left_out if row < count}),
            self.test.without({row - count for row in left_out if row >= count}),
        )

    def sizes(self) -> np.ndarray | None:
        sizes = self.train.sizes(), self.test.sizes()
        return None if sizes[0] is None or sizes[1] is None else np.concatenate(sizes)  # type: ignore[arg-type]


def load_labelled_images(
    data: str, test: str | None, progress: Progress | None = None, reader: Reader | None = None
) -> LabelledImages:
    """Load a set of labelled images and hold out half of each class; or load two sets, to train and to test on.

    Args:
        data: a folder with one sub-folder per class, or a list with labels (several per image joined by ";"), or a
            PASCAL VOC folder, which is divided by its own lists if it has both.
        test: the same, for the images to test on.
        progress: where to show that finding them takes long.
        reader: the user's function that reads the images.

    Raises:
        OdcftError: no labels, only one class, no class with enough images, a class that only the test set has, or the
            same images in both sets.
    """
    read = _read_sets(data, test, progress, reader)
    found = [one.images for one in read]
    per_image = [names for one in read for names in one.present]
    difficult = [names for one in read for names in one.difficult]
    sets = [(one.name, len(one.images)) for one in read]
    (train_name, count), test_name = sets[0], sets[-1][0]
    classes = sorted({name for names in per_image[:count] for name in names})
    if len(classes) < 2:
        what = f"only one class ({classes[0]}), and two are needed" if classes else _no_labels(read[0])
        raise OdcftError(f"{train_name}: {what}. {HOW_TO_LABEL} {WITHOUT_LABELS}")
    unknown = sorted({name for names in per_image[count:] for name in names} - set(classes))
    if unknown:
        raise OdcftError(
            f"{test_name} has a class that {train_name} does not have: {unknown[0]}. Both need the same classes."
        )
    if len(found) > 1 and not any(per_image[count:]):
        raise OdcftError(f"{test_name}: {_no_labels(read[1])}. {HOW_TO_LABEL}")
    targets = label_targets(per_image, difficult, classes)
    images = found[0] if len(found) == 1 else _joined(*found)
    no_rows = np.zeros(0, dtype=np.int64)
    labels = LabelledImages(images, classes, targets, no_rows, no_rows, sets, {}, duplicates=identical_files(images))
    labels.from_folders = [
        one.name for one in read if one.images.classes_are_folders and one.name.lower().endswith((".csv", ".tsv"))
    ]
    if len(found) == 1:
        _refuse_too_few(labels, targets)
    labels = _divide(labels, {})
    if labels.left_out["overlap"] and not len(labels.train_rows):
        raise OdcftError(
            f"Every image of {train_name} is in {test_name} as well: nothing is left to train on. "
            f"Give other images to --test, or drop --test to hold out half of {train_name}."
        )
    return labels


def without_unreadable(labels: LabelledImages, unreadable: Mapping[int, str]) -> LabelledImages:
    """Divide the images again without those that cannot be read.

    Args:
        labels: as returned by `load_labelled_images`.
        unreadable: image number to reason.

    Raises:
        OdcftError: a class loses all its images in a set, or no class has enough left.
    """
    labels, count = _divide(labels, unreadable), labels.sets[0][1]
    kept = np.concatenate([labels.train_rows, labels.test_rows])
    usable = np.isin(np.arange(len(labels.images)), kept)
    for (name, _), part in zip(labels.sets, (slice(0, count), slice(count, None)), strict=False):
        _refuse_if_nothing_left(labels, name, part, usable, unreadable)
    if len(labels.sets) == 1:
        _refuse_too_few(labels, labels.targets[kept])
    return labels


def _divide(labels: LabelledImages, unreadable: Mapping[int, str]) -> LabelledImages:
    """Decide which images are left out and why, and which of the others are for training and for testing."""
    images, targets, count = labels.images, labels.targets, labels.sets[0][1]
    has_label: np.ndarray = (targets != 0).any(1)  # -1: an image with difficult objects only is a negative
    left_out: dict[str, list[int]] = {
        "unreadable": sorted(unreadable),
        "unlabelled": [i for i in range(len(images)) if not has_label[i] and i not in unreadable],
        **{"overlap": [], "copies": [], "contradictory": []},
    }
    usable = has_label.copy()
    usable[left_out["unreadable"]] = False
    for group in labels.duplicates:
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
    is_test = held_out(targets[kept])
    too_small = {c: int(size) for c, size in enumerate((targets[kept] == 1).sum(0)) if size < MIN_IMAGES}
    return replace(labels, train_rows=kept[~is_test], test_rows=kept[is_test], left_out=left_out, too_small=too_small)


def _no_labels(one: LabelledSet) -> str:
    """What to say of images of which none has a label."""
    images = one.images
    if one.no_labels:
        return one.no_labels
    if isinstance(images.store, TableStore):
        column = images.store.columns.label
        return (
            "no labels, for it has no column of them" if column is None else f"no labels: its column {column} is empty"
        )
    if images.labels is not None:
        return (
            "no labels: its column of labels is empty" if images.store is None else "no labels: it has no .cls members"
        )
    return "no labels, because its images are not in folders of classes"


REASONS = {  # of one image, of several images
    "unreadable": ("cannot be read", "cannot be read"),
    "unlabelled": ("has no label", "have no label"),
    "overlap": ("is in --test as well", "are in --test as well"),
    "copies": ("is the same file as another", "are the same files as others"),
    "contradictory": (
        "is the same file as one with a different label",
        "are the same files as others with different labels",
    ),
}


def describe_left_out(
    left_out: Mapping[str, list[int]], labels: LabelledImages, unreadable: Mapping[int, str], most: int = 3
) -> list[str]:
    """One line per reason to leave images out, with the names of the first few."""
    lines = []
    for reason, rows in left_out.items():
        names = [labels.images.names[i] + (f" ({unreadable[i]})" if i in unreadable else "") for i in rows[:most]]
        some = ", ".join(names) + (", …" if len(rows) > most else "")
        if rows:
            lines.append(f"{len(rows):,} of {len(labels.images):,} images {REASONS[reason][len(rows) > 1]}: {some}")
    return lines


def _refuse_too_few(labels: LabelledImages, targets: np.ndarray) -> None:
    if (targets == 1).sum(0).max() < MIN_IMAGES:
        out = "; ".join(describe_left_out(labels.left_out, labels, {}, most=1))
        raise OdcftError(
            f"Every one of the {len(labels.classes):,} classes of {labels.sets[0][0]} has fewer than {MIN_IMAGES} "
            f"images, too few to hold out half{f' ({out})' if out else ''}. "
            "Give more images, or a test set with --test."
        )


def _refuse_if_nothing_left(
    labels: LabelledImages, name: str, part: slice, usable: np.ndarray, unreadable: Mapping[int, str]
) -> None:
    """Refuse a set in which no image, or no image of some class, is left, and say why."""
    targets, here = labels.targets, np.arange(len(labels.images))[part]
    if set(here.tolist()) <= set(unreadable):
        first = f"{labels.images.names[here[0]]}: {unreadable[int(here[0])].rstrip('.')}"
        raise OdcftError(f"None of the {len(here):,} images in {name} can be read; {first}.")
    what, rows = f"No image of {name}", set(here.tolist())
    if usable[part].any():
        lost = np.flatnonzero((targets[part] == 1).any(0) & ~(targets[here[usable[part]]] == 1).any(0))
        if not len(lost):
            return
        what = f"No image of class {labels.classes[lost[0]]} in {name}"
        rows = set(here[targets[part, lost[0]] == 1].tolist())
    mine = {reason: [i for i in some if i in rows] for reason, some in labels.left_out.items()}
    raise OdcftError(
        f"{what} is left to evaluate on: {'; '.join(describe_left_out(mine, labels, unreadable, most=1))}."
    )


def _read_sets(data: str, test: str | None, progress: Progress | None, reader: Reader | None) -> list[LabelledSet]:
    """The images of DATA and of --test, with their labels; both halves of a VOC folder if --test is not given."""
    read = []
    for one, for_test in ((data, False), (test, True)):
        if one is None:
            continue
        if (folder := find_voc_folder(one)) is not None:
            sets = load_voc_sets(folder, for_test)
            read += sets if test is None else sets[:1]
        else:
            images = find_images(one, progress, reader)
            read.append(LabelledSet(str(one), images, _labels_of(images), [[] for _ in range(len(images))]))
    return read


def labels_per_image(labels: Iterable[str]) -> list[list[str]]:
    """The labels of each image, which ";" separates."""
    return [[part.strip() for part in label.split(";") if part.strip()] for label in labels]


def _labels_of(images: Images) -> list[list[str]]:
    """The labels of each image: those it is given, or the name of its folder, which is one label whatever it is."""
    if images.classes_are_folders:
        return [[label] if label else [] for label in images.class_labels()]
    return labels_per_image(images.class_labels())


def label_targets(per_image: list[list[str]], difficult: list[list[str]], classes: list[str]) -> np.ndarray:
    """Targets (N, C): 1 for the classes of each image, -1 for those only difficult objects have, 0 for the others."""
    number = {name: c for c, name in enumerate(classes)}
    targets = np.zeros((len(per_image), len(classes)), dtype=np.int64)
    for i, names in enumerate(per_image):
        targets[i, [number[name] for name in names]] = 1
        targets[i, [number[name] for name in difficult[i] if name in number]] = -1
    return targets


def _joined(train: Images, test: Images) -> Images:
    """The images of two sets as one, under their full paths."""
    paths = Names(one.path(i) for one in (train, test) for i in range(len(one)))
    skipped = Counter(train.skipped) + Counter(test.skipped)
    store = None if train.store is None and test.store is None else _BothSets(train, test)
    return Images(train.source, "", paths, None, dict(skipped), store, train.reader)


def held_out(targets: np.ndarray) -> np.ndarray:
    """Which rows to test on: every other one of each combination of labels, in a random order with a fixed seed."""
    order = np.random.default_rng(0).permutation(len(targets))
    groups: dict[bytes, int] = {}
    is_test = np.zeros(len(targets), dtype=bool)
    for row in order:
        key = targets[row].tobytes()
        groups[key] = groups.get(key, 0) + 1
        is_test[row] = groups[key] % 2 == 0
    return is_test
