"""A backbone, or several, on labelled images; a RUN beside the checkpoint it came from.

Shapes: N images, F features, C classes.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from odcft.errors import OdcftError
from odcft.evaluation.arrays import PROTOCOLS, Split, evaluate_arrays, name_left_out, one_class
from odcft.evaluation.origin import given, origins, seen
from odcft.evaluation.table import FIGURES

if TYPE_CHECKING:
    from odcft.backbone import Loaded
    from odcft.data import Images
    from odcft.evaluation.labels import Labelled
    from odcft.inputs import View


def evaluate(
    ckpt: str | list[str],
    data: str,
    test: str | None = None,
    protocols: Sequence[str] = PROTOCOLS,
    arch: str | None = None,
    size: int | None = None,
    input: str | None = None,
    allow_partial: bool = False,
    progress: Any = None,
    arch_args: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Every protocol on the features of labelled images.

    Args:
        ckpt: what `load_backbone` takes. A RUN is evaluated beside the checkpoint it came from, where that is found.
            Several are evaluated side by side, and each alone.
        data: labelled images: sub-folders are classes, or a list with labels.
        test: others to test on; without, a stratified half of `data` is held out.
        protocols: of PROTOCOLS.
        arch: a timm name, where the checkpoint's own is not to be followed.
        size: pixels; by default as `view_of` says.
        input: the colours it is shown, where the checkpoint's own are not to be followed.
        allow_partial: accept a checkpoint that covers less than 90 % of the backbone.
        progress: where to speak.
        arch_args: what the network is built with besides its name.

    Returns:
        `evaluate_arrays`'s dict; for a RUN also `before`, the same of its checkpoint, and `change`. For a RUN of
        several members this is of all of them side by side, and `members` has the same of each. `classes` are their
        names; `images` is how many were found, of which `train_images` were learned from and `test_images` tested on;
        the others are counted by why they were left out (labels.py): `unreadable`, `unlabelled`, `overlap`, `copies`,
        `contradictory`. `view` is how they were seen.

    Raises:
        OdcftError: labels or images that cannot be evaluated on, or a checkpoint that cannot be loaded.
    """
    from odcft.backbone import load_backbone
    from odcft.evaluation.labels import labelled, told, without_unreadable
    from odcft.inputs import seen_as
    from odcft.log import Progress

    progress = progress or Progress()
    labels = labelled(data, test)
    if "knn" in protocols:  # refused before anything slow is done
        one_class(labels.targets[labels.targets.any(1)])
    sources = ckpt if isinstance(ckpt, list) else _sources(ckpt)
    loaded = [load_backbone(source, arch, input, allow_partial, arch_args=arch_args) for source in sources]
    befores = [] if isinstance(ckpt, list) else _befores(ckpt, len(sources), progress)
    of_run = None if isinstance(ckpt, list) else seen(ckpt)
    views = [view_of(one, labels.images, size, of_run) for one in loaded]
    found = ", ".join(f"{count:,} in {name}" for name, count in labels.sets)
    for view in dict.fromkeys(views):
        progress.say(f"Images      {found} · {seen_as(view)}")
    if labels.images.skipped:
        progress.say(f"Not read    {labels.images.not_read()}")
    features: list[np.ndarray] = []
    unreadable: dict[int, str] = {}
    for one, view in zip([*loaded, *befores], views + views, strict=False):
        rows, bad = _features(one, labels, view, progress)
        features.append(rows)
        unreadable |= bad
    labels = without_unreadable(labels, unreadable)
    for place, line in enumerate(told(labels.left_out, labels, unreadable)):
        progress.say(f"{'Left out' if place == 0 else '':<12}{line}")
    splits = [_split(rows, labels, one.source) for rows, one in zip(features, [*loaded, *befores], strict=True)]
    after_splits, before_splits = splits[: len(loaded)], splits[len(loaded) :]

    def compared(after_split: Split, before_split: Split | None) -> dict[str, Any]:
        after = evaluate_arrays(after_split, protocols, progress)
        results = {**after}
        if before_split is not None:
            before = evaluate_arrays(before_split, protocols, progress, "SVM before")
            results |= {"before": before, "change": changes(before, after, after_split.test_targets)}
            name_left_out(before, labels.classes)
        name_left_out(results, labels.classes)
        return results

    results = compared(_side_by_side(after_splits), _side_by_side(before_splits) if before_splits else None)
    if len(sources) > 1:
        results["members"] = [
            {"source": source, **compared(split, before_splits[m] if before_splits else None)}
            for m, (source, split) in enumerate(zip(sources, after_splits, strict=True))
        ]
    counts = {"images": len(labels.images)}
    counts |= {"train_images": len(labels.train_rows), "test_images": len(labels.test_rows)}
    counts |= {reason: len(rows) for reason, rows in labels.left_out.items()}
    return {**results, "classes": labels.classes, **counts, "view": vars(views[0])}


def _split(rows: np.ndarray, labels: "Labelled", source: str) -> Split:
    """Features of all images, as a split."""
    train, test = labels.train_rows, labels.test_rows
    used = np.concatenate([train, test])
    if bad := len(used) - int(np.isfinite(rows[used]).all(1).sum()):
        raise OdcftError(
            f"{source} gives features that are NaN or infinite for {bad:,} of {len(used):,} images: its weights are "
            "damaged. Take another checkpoint, for example an earlier state."
        )
    few = {c: f"{size} image{'s' if size > 1 else ''}, too few to hold a half out" for c, size in labels.few.items()}
    return Split(rows[train], labels.targets[train], rows[test], labels.targets[test], few)


def _befores(run: str, members: int, progress: Any) -> list["Loaded"]:
    """The checkpoints that a RUN was started from; none, and a sentence that says why, where they cannot be had."""
    from odcft.backbone import load_backbone

    ckpts, reason = origins(run, members)
    try:
        taken = given(run) if ckpts else {}
        loaded = [load_backbone(one, **taken, member=member) for member, one in enumerate(ckpts)]
    except OdcftError as error:
        loaded, reason = [], str(error).rstrip(".")
    if reason:
        progress.say(f"Before      no column: {reason}. To compare, evaluate that checkpoint by itself.")
    return loaded


def _side_by_side(splits: list[Split]) -> Split:
    """The features of several backbones as one, each at unit length; those of a single one as they are."""
    if len(splits) == 1:
        return splits[0]

    def joined(name: str) -> np.ndarray:
        parts = [getattr(split, name) for split in splits]
        return np.concatenate([part / (np.linalg.norm(part, axis=1, keepdims=True) + 1e-5) for part in parts], axis=1)

    return replace(splits[0], train_features=joined("train_features"), test_features=joined("test_features"))


def _sources(ckpt: str) -> list[str]:
    """The backbones of a RUN of several members, in their order; anything else is one by itself."""
    from odcft.folders import BACKBONES

    members = [str(Path(ckpt) / name) for name in BACKBONES if (Path(ckpt) / name).is_dir()]
    return members if len(members) > 1 else [ckpt]


def view_of(loaded: "Loaded", images: "Images", size: int | None, run: "View | None" = None) -> "View":
    """How labelled images are seen: as the recipe that trained the backbone says, where its file tells.

    A network that was made for larger images is not shown small ones enlarged, but whole and as they are, unless its
    file says so.

    Args:
        loaded: the backbone.
        images: those to see.
        size: the user's word.
        run: how the RUN it is of saw its images.
    """
    from odcft.data import automatic_size, own_range, usual_side

    backbone = loaded.backbone
    view = run or backbone.input.view
    if view.intensity is None:  # it was trained on images of 8 bits, or somewhere else
        view = replace(view, intensity=own_range(images)[0])
    if size is not None or run is not None or loaded.told:
        return replace(view, size=size or view.size)
    size = automatic_size(view.size, backbone.fixed_size, usual_side(images))
    return replace(view, size=size, crop_fraction=1.0 if size < view.size else view.crop_fraction)


def _features(loaded: "Loaded", labels: "Labelled", view: "View", progress: Any) -> tuple[np.ndarray, dict[int, str]]:
    """Backbone features (N, F) of all images, zero where one cannot be read; and those: number to reason."""
    import torch

    from odcft.data import Crops
    from odcft.features import extract

    backbone = loaded.backbone
    if backbone.fixed_size and view.size != backbone.size:
        raise OdcftError(f"{backbone.arch} takes images of {backbone.size} pixels only, not {view.size}.")
    if not backbone.takes(view.size):
        raise OdcftError(f"{backbone.arch} cannot look at images of {view.size} pixels. Try --size {backbone.size}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    crops = Crops(labels.images, view)
    features, bad = extract(backbone.to(device).eval(), crops, 128, 0, device, progress)
    return features.cpu().numpy(), bad


def changes(before: dict[str, Any], after: dict[str, Any], targets_NC: np.ndarray, draws: int = 200) -> dict[str, Any]:
    """By how much each figure changed, and the 95 % interval over test images drawn again (a paired bootstrap).

    A class that a draw has lost, or that every image of it has, counts in neither mean of that draw.
    """
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, len(targets_NC), len(targets_NC)) for _ in range(draws)]
    changed = {}
    for protocol, (_, name) in FIGURES.items():
        if protocol in before:
            change = after[protocol][name] - before[protocol][name]
            drawn = _DRAWN[protocol](before[protocol], after[protocol], targets_NC, rows)
            low, high = np.percentile(drawn or [change], [2.5, 97.5])
            changed[protocol] = {"change": change, "low": float(low), "high": float(high)}
    return changed


def _knn_changes(before: dict, after: dict, targets_NC: np.ndarray, rows: list[np.ndarray]) -> list[float]:
    class_N = one_class(targets_NC)
    gain_N = 100.0 * (after["predicted"] == class_N) - 100.0 * (before["predicted"] == class_N)
    return [float(gain_N[drawn].mean()) for drawn in rows]


def _svm_changes(before: dict, after: dict, targets_NC: np.ndarray, rows: list[np.ndarray]) -> list[float]:
    """Of each draw in which a class can be measured."""
    from odcft.evaluation.svm import ranked_precision

    times = [np.bincount(drawn, minlength=len(targets_NC)) for drawn in rows]  # each image is drawn
    gains: list[list[float]] = [[] for _ in rows]
    for c, precision in enumerate(after["per_class"]):
        if precision is None:
            continue
        certain = np.flatnonzero(targets_NC[:, c] != -1)
        old, new = (certain[np.argsort(-one["scores"][certain, c], kind="stable")] for one in (before, after))
        for gain, times_N in zip(gains, times, strict=True):
            old_N, new_N = (np.repeat(targets_NC[order, c] == 1, times_N[order]) for order in (old, new))
            if old_N.any() and not old_N.all():
                gain.append(100 * (ranked_precision(new_N) - ranked_precision(old_N)))
    return [float(np.mean(gain)) for gain in gains if gain]


_DRAWN = {"svm": _svm_changes, "knn": _knn_changes}
