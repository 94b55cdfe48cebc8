"""A backbone, or several, on labelled images; a RUN beside the checkpoint it came from.

Shapes: N images, F features, C classes.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from odcft.errors import OdcftError
from odcft.evaluation.protocols import PROTOCOLS, Split, evaluate_arrays, name_left_out, one_class
from odcft.evaluation.starting_checkpoint import given, origins, seen

if TYPE_CHECKING:
    from odcft.backbone.load import Loaded
    from odcft.data.view import View
    from odcft.evaluation.labels import Labelled
from odcft.evaluation.confidence_intervals import changes
from odcft.plan import view_for_evaluation


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
        size: pixels; by default as `view_for_evaluation` says.
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
    from odcft.backbone.load import load_backbone
    from odcft.data.view import seen_as
    from odcft.evaluation.labels import labelled, told, without_unreadable
    from odcft.progress import Progress

    progress = progress or Progress()
    labels = labelled(data, test)
    if "knn" in protocols:  # refused before anything slow is done
        one_class(labels.targets[labels.targets.any(1)])
    sources = ckpt if isinstance(ckpt, list) else _sources(ckpt)
    loaded = [load_backbone(source, arch, input, allow_partial, arch_args=arch_args) for source in sources]
    befores = [] if isinstance(ckpt, list) else _befores(ckpt, len(sources), progress)
    of_run = None if isinstance(ckpt, list) else seen(ckpt)
    views = [view_for_evaluation(one, labels.images, size, of_run) for one in loaded]
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
    from odcft.backbone.load import load_backbone

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
    from odcft.run.folder import BACKBONES

    members = [str(Path(ckpt) / name) for name in BACKBONES if (Path(ckpt) / name).is_dir()]
    return members if len(members) > 1 else [ckpt]


def _features(loaded: "Loaded", labels: "Labelled", view: "View", progress: Any) -> tuple[np.ndarray, dict[int, str]]:
    """Backbone features (N, F) of all images, zero where one cannot be read; and those: number to reason."""
    import torch

    from odcft.data.batches import Crops
    from odcft.data.feature_extraction import extract

    backbone = loaded.backbone
    if backbone.fixed_size and view.size != backbone.size:
        raise OdcftError(f"{backbone.arch} takes images of {backbone.size} pixels only, not {view.size}.")
    if not backbone.takes(view.size):
        raise OdcftError(f"{backbone.arch} cannot look at images of {view.size} pixels. Try --size {backbone.size}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    crops = Crops(labels.images, view)
    features, bad = extract(backbone.to(device).eval(), crops, 128, 0, device, progress)
    return features.cpu().numpy(), bad
