"""Evaluate backbones on labelled images, a RUN side by side with the checkpoint it was started from.

Shapes: N images, F features, C classes.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from odcft.errors import OdcftError
from odcft.evaluation.confidence_intervals import changes_with_intervals
from odcft.evaluation.protocols import DEFAULT, Split, check_labels, class_numbers, evaluate_arrays, name_left_out
from odcft.evaluation.starting_checkpoint import find_starting_checkpoints, load_options_of, reader_note, view_of_run
from odcft.plan import view_for_evaluation

if TYPE_CHECKING:
    from odcft.backbone.load import Loaded
    from odcft.data.view import View
    from odcft.evaluation.labels import LabelledImages


def evaluate(
    ckpt: str | list[str],
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
    reader: Any = None,
    crop: str = "centre",
) -> dict[str, Any]:
    """Run every protocol on the features of labelled images.

    Args:
        ckpt: anything `load_backbone` takes. A RUN is compared with the checkpoint it was started from, if that can be
            found. Several are evaluated side by side and each alone.
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
        reader: the user's function that reads the images (`Reader`), or its name as MODULE:FUNCTION.
        crop: "centre", or "squash": the whole image, squashed into a square (as for the published SVMs on VOC07).

    Returns:
        The dict of `evaluate_arrays`; for a RUN also `before`, the same for its starting checkpoint, and `change`. For
        a RUN of several members these are the results of all of them side by side, and `members` has those of each.
        `classes` are the class names; `images` is how many were found, of which `train_images` and `test_images` were
        used; the others are counted by the reason they were left out (labels.py): `unreadable`, `unlabelled`,
        `overlap`, `copies`, `contradictory`. `view` is how the images were resized and cropped.

    Raises:
        OdcftError: labels or images that cannot be evaluated on, or a checkpoint that cannot be loaded.
    """
    from odcft.backbone.load import load_backbone
    from odcft.data.custom_reader import make_reader
    from odcft.evaluation.labels import load_labelled_images
    from odcft.progress import Progress

    progress = progress or Progress()
    labels = load_labelled_images(data, test, progress, make_reader(reader))
    labelled = labels.targets[labels.targets.any(1)]
    check_labels(labelled, labelled, protocols)  # fail before anything slow starts
    sources = ckpt if isinstance(ckpt, list) else _members(ckpt)
    after = [load_backbone(source, arch, input, allow_partial, arch_args=arch_args, part=part) for source in sources]
    before = [] if isinstance(ckpt, list) else _load_starting_checkpoints(ckpt, len(sources), progress)
    run_view = None if isinstance(ckpt, list) else view_of_run(ckpt)
    views = [replace(view_for_evaluation(one, labels.images, size, run_view), crop=crop) for one in after]
    for one, view in zip(after, views, strict=True):
        _measure_if_unknown(one, view, labels, progress)
    _report_images(labels, views, progress)
    if note := [] if isinstance(ckpt, list) else reader_note(ckpt, labels.images.reader):
        progress.say(f"Note        {note}")
    splits, labels = _make_splits([*after, *before], views + views, labels, progress)
    after_splits, before_splits = splits[: len(after)], splits[len(after) :]

    before_split = _side_by_side(before_splits) if before_splits else None
    results = _compare(_side_by_side(after_splits), before_split, labels.classes, protocols, progress)
    if "clusters" in protocols and isinstance(ckpt, str):
        results["clusters"] |= _clusters_of_run(ckpt, labels, progress)
    if len(sources) > 1:
        results["members"] = []
        for m, source in enumerate(sources):
            before_split = before_splits[m] if before_splits else None
            alone = _compare(after_splits[m], before_split, labels.classes, protocols, progress)
            results["members"].append({"source": source, **alone})
    counts = {"images": len(labels.images)}
    counts |= {"train_images": len(labels.train_rows), "test_images": len(labels.test_rows)}
    counts |= {reason: len(rows) for reason, rows in labels.left_out.items()}
    return {**results, "classes": labels.classes, **counts, "view": vars(views[0])}


def _measure_if_unknown(loaded: "Loaded", view: "View", labels: "LabelledImages", progress: Any) -> None:
    """Normalise by the mean and std of these images if nothing says with which the network was trained."""
    from odcft.backbone.load import set_mean_and_std
    from odcft.data.pixel_statistics import measure

    if not loaded.backbone.input.measured:
        found = measure(labels.images, view, loaded.backbone.input.color, 0)
        set_mean_and_std(loaded.backbone, *found.mean_and_std())
        progress.say(
            f"Note        {loaded.source} does not say its mean and std: measured on {found.images:,} of these images."
        )


def _members(ckpt: str) -> list[str]:
    """The backbones of a RUN of several members, in order; anything else is a single backbone."""
    from odcft.run.folder import BACKBONES

    members = [str(Path(ckpt) / name) for name in BACKBONES if (Path(ckpt) / name).is_dir()]
    return members if len(members) > 1 else [ckpt]


def _load_starting_checkpoints(run: str, members: int, progress: Any) -> list["Loaded"]:
    """Load the checkpoints a RUN was started from; if that is impossible, say why and return none."""
    from odcft.backbone.load import load_backbone

    ckpts, reason = find_starting_checkpoints(run, members)
    try:
        loaded = [
            load_backbone(one, **load_options_of(run, member, len(ckpts)), member=member)
            for member, one in enumerate(ckpts)
        ]
    except OdcftError as error:
        loaded, reason = [], str(error).rstrip(".")
    if reason:
        progress.say(f"Before      no column: {reason}. To compare, evaluate that checkpoint on its own.")
    return loaded


def _report_images(labels: "LabelledImages", views: list["View"], progress: Any) -> None:
    """Say which images were found and how the networks see them."""
    from odcft.data.view import describe_view

    found = ", ".join(f"{count:,} in {name}" for name, count in labels.sets)
    for view in dict.fromkeys(views):
        progress.say(f"Images      {found} · {describe_view(view)}")
    if labels.images.skipped:
        progress.say(f"Not read    {labels.images.skipped_summary()}")


def _make_splits(
    backbones: list["Loaded"], views: list["View"], labels: "LabelledImages", progress: Any
) -> tuple[list[Split], "LabelledImages"]:
    """The features of each backbone as a split, and the labels without the images that cannot be read."""
    from odcft.evaluation.labels import describe_left_out, without_unreadable

    features: list[np.ndarray] = []
    unreadable: dict[int, str] = {}
    for one, view in zip(backbones, views, strict=False):
        rows, failed = _extract_features(one, labels, view, progress)
        features.append(rows)
        unreadable |= failed
    labels = without_unreadable(labels, unreadable)
    for i, line in enumerate(describe_left_out(labels.left_out, labels, unreadable)):
        progress.say(f"{'Left out' if i == 0 else '':<12}{line}")
    return [_split(rows, labels, one.source) for rows, one in zip(features, backbones, strict=True)], labels


def _extract_features(
    loaded: "Loaded", labels: "LabelledImages", view: "View", progress: Any
) -> tuple[np.ndarray, dict[int, str]]:
    """Backbone features (N, F) of all images, zero for those that cannot be read; and the reasons, by image number."""
    import torch

    from odcft.data.batches import Crops
    from odcft.data.feature_extraction import extract

    backbone = loaded.backbone
    backbone.resize(view.size)
    if not backbone.accepts_size(view.size):
        raise OdcftError(f"{backbone.arch} cannot process images of {view.size} pixels. Try --size {backbone.size}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    crops = Crops(labels.images, view)
    features, unreadable = extract(backbone.to(device).eval(), crops, 128, 0, device, progress)
    return features.cpu().numpy(), unreadable


def _split(rows: np.ndarray, labels: "LabelledImages", source: str) -> Split:
    """The features of all images, divided into training and test images."""
    train, test = labels.train_rows, labels.test_rows
    used = np.concatenate([train, test])
    if bad := len(used) - int(np.isfinite(rows[used]).all(1).sum()):
        raise OdcftError(
            f"{source} gives features that are NaN or infinite for {bad:,} of {len(used):,} images: its weights are "
            "damaged. Use another checkpoint, for example an earlier state."
        )
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
        progress.say(f"Clusters    those of the run are not compared with the labels: {error}")
        return {}


def _side_by_side(splits: list[Split]) -> Split:
    """The features of several backbones concatenated, each scaled to unit length; those of a single one unchanged."""
    if len(splits) == 1:
        return splits[0]

    def joined(name: str) -> np.ndarray:
        parts = [getattr(split, name) for split in splits]
        return np.concatenate([part / (np.linalg.norm(part, axis=1, keepdims=True) + 1e-5) for part in parts], axis=1)

    return replace(splits[0], train_features=joined("train_features"), test_features=joined("test_features"))


def _compare(
    after_split: Split, before_split: Split | None, classes: list[str], protocols: Sequence[str], progress: Any
) -> dict[str, Any]:
    """Results of one backbone; with those `before` and the `change` if there is a starting checkpoint."""
    after = evaluate_arrays(after_split, protocols, progress)
    results = {**after}
    if before_split is not None:
        before = evaluate_arrays(before_split, protocols, progress, " before")
        results |= {"before": before, "change": changes_with_intervals(before, after, after_split.test_targets)}
        name_left_out(before, classes)
    name_left_out(results, classes)
    return results
