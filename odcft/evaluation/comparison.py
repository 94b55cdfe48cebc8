"""Evaluate backbones on labelled images, a RUN side by side with the checkpoint it was started from.

Shapes: N images, F features, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from odcft.distributed import dist
from odcft.errors import OdcftError, refuse_not_finite
from odcft.evaluation.confidence_intervals import changes_with_intervals
from odcft.evaluation.layer_choice import check_layers, evaluate_layers
from odcft.evaluation.per_class import add_per_class
from odcft.evaluation.protocols import DEFAULT, Split, check_labels, class_numbers, name_left_out
from odcft.evaluation.starting_checkpoint import find_starting_checkpoints, load_options_of, reader_note, view_of_run
from odcft.evaluation.verdict import verdict
from odcft.plan import view_for_evaluation

if TYPE_CHECKING:
    from odcft.backbone.load import Loaded
    from odcft.data.images import Images
    from odcft.data.view import View
    from odcft.evaluation.labels import LabelledImages


def evaluate(
    ckpt: str | Sequence[str],
    data: str,
    test: str | None = None,
    protocols: Sequence[str] = DEFAULT,
    arch: str | None = None,
    size: int | None = None,
    input: str | None = None,
    allow_partial: bool = False,
    progress: Any = None,
    arch_args: dict[str, Any] | None = None,
    part: str | None = None,
    *,
    layers: str = "last",
    crop: str = "centre",
    reader: Any = None,
    per_class: bool = False,
) -> dict[str, Any]:
    """Run every protocol on the features of labelled images.

    Args:
        ckpt: anything `load_backbone` takes. A RUN is compared with the checkpoint it was started from, if that can be
            found. Of several, each is compared with the last.
        data: labelled images: one sub-folder per class, or a list with labels.
        test: images to test on; without them, a stratified half of `data` is held out.
        protocols: some of PROTOCOLS.
        arch: a timm name, to override the checkpoint's own.
        size: image size in pixels; by default chosen by `view_for_evaluation`.
        input: the colours the network expects, to override the checkpoint's own.
        allow_partial: accept a checkpoint that covers less than 90 % of the backbone.
        progress: where to report.
        arch_args: arguments to build the network with, besides its name.
        part: where in the checkpoint to look, if it holds several backbones.
        layers: one of LAYERS (layer_choice.py): which layer's features are evaluated.
        crop: "centre", or "squash": the whole image, squashed into a square (as for the published SVMs on VOC07).
        reader: the user's function that reads the images (`Reader`), or its name as MODULE:FUNCTION.
        per_class: add the figures of each class (`add_per_class`).

    Returns:
        On rank 0 the dict of `evaluate_layers`; for a RUN also `before`, the same for its starting checkpoint, `change`
        with its intervals, and `verdict`. For a RUN of several members these are the results of all of them side by
        side, and `members` has those of each. Of several checkpoints these are the results of the first, and `columns`
        has those of each, with its `source`. `classes` are the class names; `images` is how many were found, of which
        `train_images` and `test_images` were used; the others are counted by the reason they were left out (labels.py):
        `unreadable`, `unlabelled`, `overlap`, `copies`, `contradictory`. `view` is how the images were resized and
        cropped. On other ranks nothing.

    Raises:
        OdcftError: labels or images that cannot be evaluated on, or a checkpoint that cannot be loaded.
    """
    from odcft.data.custom_reader import make_reader
    from odcft.evaluation.labels import load_labelled_images
    from odcft.progress import Progress

    progress, several = progress or Progress(), not isinstance(ckpt, str)
    check_layers(layers)
    labels = load_labelled_images(data, test, progress, make_reader(reader))
    labelled = labels.targets[labels.targets.any(1)]
    check_labels(labelled, labelled, protocols)  # fail before anything slow starts
    options = {"arch": arch, "input": input, "allow_partial": allow_partial, "arch_args": arch_args, "part": part}
    sources = [ckpt] if isinstance(ckpt, str) else ckpt
    columns = [load_column(one, options, labels.images, size, crop, progress) for one in sources]
    if not several and (before := load_starting_checkpoints(columns[0], progress)):
        columns.append(Column(before[0].source, before, columns[0].views, suffix=" before"))
    _report_images(labels, columns, progress)
    for source in sources:
        if note := reader_note(source, labels.images.reader):
            progress.say(f"Note        {note}")
    labels = _add_splits(columns, labels, layers != "last", progress)
    if "semi" in protocols:
        _fine_tune_with_labels(columns, labels, progress)
    if dist.rank() > 0:
        return {}
    for column in columns:
        _evaluate_column(column, protocols, layers, labels.classes, progress, alone=not several)
    with progress.waiting("95 % intervals of the changes"):
        results = _compared(columns, labels, several)
    if "clusters" in protocols:
        results["clusters"] |= _clusters_of_run(sources[0], labels, progress)
    if per_class:
        targets = (labels.targets[rows] for rows in (labels.train_rows, labels.test_rows))
        results = add_per_class(results, labels.classes, *targets)
    counts = {"images": len(labels.images)}
    counts |= {"train_images": len(labels.train_rows), "test_images": len(labels.test_rows)}
    counts |= {reason: len(rows) for reason, rows in labels.left_out.items()}
    return {**results, "classes": labels.classes, **counts, "view": vars(columns[0].views[0])}


@dataclass
class Column:
    """What is evaluated: a backbone, or the members of a RUN of collaborative ODC side by side.

    Attributes:
        source: as the user gave it.
        parts: the backbones.
        views: how each sees the images.
        splits: of each, by layer.
        results: of all of them side by side.
        members: of each alone, if there are several.
        semi: the result of `--protocol semi`, if asked for; of all of them side by side.
        suffix: of the titles of progress bars.
    """

    source: str
    parts: list["Loaded"]
    views: list["View"]
    splits: list[dict[str, Split]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    members: list[dict[str, Any]] = field(default_factory=list)
    semi: dict[str, Any] = field(default_factory=dict)
    suffix: str = ""


def load_column(
    ckpt: str, options: dict[str, Any], images: "Images", size: int | None, crop: str, progress: Any
) -> Column:
    """Load a checkpoint, or all members of a RUN."""
    from odcft.backbone.load import load_backbone

    parts = [load_backbone(source, **options) for source in _members(ckpt)]
    run = view_of_run(ckpt)
    views = [replace(view_for_evaluation(one, images, size, run), crop=crop) for one in parts]
    for one, view in zip(parts, views, strict=True):
        _measure_if_unknown(one, view, images, progress)
    return Column(ckpt, parts, views)


def _evaluate_column(
    column: Column, protocols: Sequence[str], layers: str, classes: list[str], progress: Any, alone: bool
) -> None:
    """Fill in the results of a column; if `alone`, those of each of its members, too."""

    def run(splits: dict[str, Split]) -> dict[str, Any]:
        results = evaluate_layers(splits, protocols, layers, progress, column.suffix)
        name_left_out(results, classes)
        return results

    column.results = run(_side_by_side(column.splits)) | column.semi
    if alone and len(column.splits) > 1:
        column.members = [run(splits) for splits in column.splits]


def _fine_tune_with_labels(columns: list[Column], labels: "LabelledImages", progress: Any) -> None:
    """Fill in `semi` of each column, on all ranks together."""
    from odcft.evaluation.semi import semi, sets_of

    for column in columns:
        if len(set(column.views)) > 1:
            raise OdcftError(
                f"--protocol semi: the members of {column.source} see images differently, so they cannot be fine-tuned "
                "as one network. Evaluate each on its own, or give --size."
            )
    sets = sets_of(labels)
    for column in columns:
        backbones = [one.backbone for one in column.parts]
        column.semi = {"semi": semi(backbones, sets, column.views[0], progress, suffix=column.suffix)}


def _compared(columns: list[Column], labels: "LabelledImages", several: bool) -> dict[str, Any]:
    """The results of the first column, with what it or each of several columns is compared with."""
    targets = labels.targets[labels.test_rows]
    last = columns[-1]

    def change(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
        changes = changes_with_intervals(before, after, targets)
        return {"change": changes, "verdict": verdict(changes)}

    if several:
        rows = [
            {"source": one.source, **one.results, **(change(one.results, last.results) if one is not last else {})}
            for one in columns
        ]
        return {**rows[0], "columns": rows}
    results = dict(columns[0].results)
    if len(columns) > 1:
        results |= {"before": last.results, **change(results, last.results)}
    members = []
    for m, alone in enumerate(columns[0].members):
        row = {"source": columns[0].parts[m].source, **alone}
        if len(columns) > 1:
            row |= {"before": last.members[m], **change(alone, last.members[m])}
        members.append(row)
    return {**results, "members": members} if members else results


def _measure_if_unknown(loaded: "Loaded", view: "View", images: "Images", progress: Any) -> None:
    """Normalise by the mean and std of these images if nothing says with which the network was trained."""
    from odcft.backbone.load import set_mean_and_std
    from odcft.data.pixel_statistics import measure

    if not loaded.backbone.input.measured:
        found = measure(images, view, loaded.backbone.input.color, 0)
        set_mean_and_std(loaded.backbone, *found.mean_and_std())
        progress.say(
            f"Note        {loaded.source} does not say its mean and std: measured on {found.images:,} of these images."
        )


def _members(ckpt: str) -> list[str]:
    """The backbones of a RUN of several members, in order; anything else is a single backbone."""
    from odcft.run.folder import BACKBONES

    members = [str(Path(ckpt) / name) for name in BACKBONES if (Path(ckpt) / name).is_dir()]
    return members if len(members) > 1 else [ckpt]


def load_starting_checkpoints(column: Column, progress: Any) -> list["Loaded"]:
    """Load the checkpoints a RUN was started from; if that is impossible, say why and return none."""
    from odcft.backbone.load import load_backbone

    run = column.source
    ckpts, reason = find_starting_checkpoints(run, len(column.parts))
    try:
        loaded = [
            load_backbone(one, **load_options_of(run, member, len(ckpts)), member=member, fetch=False)
            for member, one in enumerate(ckpts)
        ]
    except OdcftError as error:
        loaded, reason = [], str(error).rstrip(".")
    if reason:
        progress.say(
            f"Before      not shown: {reason}. To compare, give the checkpoint as well: odcft evaluate RUN CKPT DATA"
        )
    return loaded


def _report_images(labels: "LabelledImages", columns: list[Column], progress: Any) -> None:
    """Say which images were found and how the networks see them; if they see them differently, which does how."""
    from odcft.data.view import describe_view

    found = ", ".join(f"{count:,} in {name}" for name, count in labels.sets)
    for name in labels.from_folders:
        progress.say(f"Labels      the folder of each image: {name} has no column called label, class or the like")
    views = dict.fromkeys((view, column.source) for column in columns for view in column.views)
    if len({view for view, _ in views}) == 1:
        progress.say(f"Images      {found} · {describe_view(next(iter(views))[0])}")
    else:
        progress.say(f"Images      {found}")
        for view, source in views:
            progress.say(f"            {source}: {describe_view(view)}")
    if labels.images.skipped:
        progress.say(f"Not read    {labels.images.skipped_summary()}")


def _add_splits(columns: list[Column], labels: "LabelledImages", all_layers: bool, progress: Any) -> "LabelledImages":
    """Extract the features of each column; return the labels without the images that cannot be read."""
    from odcft.evaluation.feature_cache import contents_of
    from odcft.evaluation.features import features_of
    from odcft.evaluation.labels import describe_left_out, without_unreadable

    unreadable: dict[int, str] = {}
    found = []
    options: dict[str, Any] = {"all_layers": all_layers, "contents": contents_of(labels.images, progress)}
    for column in columns:
        for one, view in zip(column.parts, column.views, strict=True):
            features = features_of(one.backbone, labels.images, view, progress, **options)
            found.append((column, one.source, features.layers))
            unreadable |= features.unreadable
    if dist.rank() > 0:
        return labels
    labels = without_unreadable(labels, unreadable)
    for i, line in enumerate(describe_left_out(labels.left_out, labels, unreadable)):
        progress.say(f"{'Left out' if i == 0 else '':<12}{line}")
    for column, source, layers in found:
        column.splits.append({name: _split(rows, labels, source) for name, rows in layers.items()})
    return labels


def _split(rows: np.ndarray, labels: "LabelledImages", source: str) -> Split:
    """The features of all images, divided into training and test images."""
    train, test = labels.train_rows, labels.test_rows
    used = np.concatenate([train, test])
    refuse_not_finite(len(used) - int(np.isfinite(rows[used]).all(1).sum()), len(used), source)
    left_out = {
        c: f"{size} image{'s' if size > 1 else ''}, too few to hold out half" for c, size in labels.too_small.items()
    }
    return Split(rows[train], labels.targets[train], rows[test], labels.targets[test], left_out)


def _clusters_of_run(run: str, labels: "LabelledImages", progress: Any) -> dict[str, Any]:
    """`run`: how well the clusters that a RUN ended with match the labels; nothing for other images, or no RUN."""
    from odcft.evaluation.clusters import compare_run

    if not (Path(run) / "clusters.parquet").exists():
        return {}
    rows = np.concatenate([labels.train_rows, labels.test_rows])
    try:
        class_N = class_numbers(labels.targets[rows])
        return {"run": compare_run(Path(run), [labels.images.path(row) for row in rows], class_N)}
    except OdcftError as error:
        progress.say(f"Clusters    those of the RUN are not compared with the labels: {error}")
        return {}


def _side_by_side(members: list[dict[str, Split]]) -> dict[str, Split]:
    """The features of several backbones concatenated, each scaled to unit length; those of a single one unchanged.

    Layers that not all of them have are left out.
    """
    if len(members) == 1:
        return members[0]

    def joined(layer: str, name: str) -> np.ndarray:
        parts = [getattr(splits[layer], name) for splits in members]
        return np.concatenate([part / (np.linalg.norm(part, axis=1, keepdims=True) + 1e-5) for part in parts], axis=1)

    return {
        layer: replace(
            split,
            train_features=joined(layer, "train_features"),
            test_features=joined(layer, "test_features"),
        )
        for layer, split in members[0].items()
        if all(layer in splits for splits in members)
    }
