"""Is a backbone good? Features once, then each protocol as a function of arrays.

Shapes: N images, F features, C classes.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from odcft.errors import OdcftError

if TYPE_CHECKING:
    from odcft.backbone import Loaded
    from odcft.data import Images
    from odcft.inputs import View

PROTOCOLS = ("svm", "knn")
_FIGURE = {"svm": ("SVM mAP", "mAP"), "knn": ("kNN top-1", "top1")}


@dataclass
class Split:
    """Features and targets of training and test images: what every protocol takes.

    Targets are (N, C) of 1, 0 and -1.
    """

    train_features: np.ndarray
    train_targets: np.ndarray
    test_features: np.ndarray
    test_targets: np.ndarray


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


def evaluate_arrays(split: Split, protocols: list[str]) -> dict[str, Any]:
    """Every protocol on the same features.

    Args:
        split: of features and targets.
        protocols: of PROTOCOLS.

    Returns:
        A dict a protocol (INTERFACE: evaluate --json), with `scores` (svm) and `predicted` (knn) of the test images.

    Raises:
        OdcftError: several labels an image where a protocol needs one.
    """
    results: dict[str, Any] = {}
    if "svm" in protocols:
        from odcft.evaluation.svm import voc07_svm

        results["svm"] = voc07_svm(split.train_features, split.train_targets, split.test_features, split.test_targets)
    if "knn" in protocols:
        from odcft.evaluation.knn import knn

        train_N, test_N = _one_class(split.train_targets), _one_class(split.test_targets)
        results["knn"] = knn(split.train_features, train_N, split.test_features, test_N)
    return results


def evaluate_file(path: Path, protocols: list[str]) -> dict[str, Any]:
    """`evaluate_arrays` on an .npz of train_features, train_targets, test_features, test_targets.

    Targets may be (N, C) of 1, 0, -1, or (N,) class numbers.
    """
    try:
        with np.load(path) as arrays:  # refuses pickled objects
            split = Split(*(arrays[n] for n in ("train_features", "train_targets", "test_features", "test_targets")))
    except (OSError, ValueError, KeyError) as error:
        raise OdcftError(
            f"{path} is not an .npz with train_features, train_targets, test_features and test_targets ({error})."
        ) from None
    if split.train_targets.ndim == 1:
        classes = np.unique(split.train_targets)
        split.train_targets = (split.train_targets[:, None] == classes).astype(np.int64)
        split.test_targets = (split.test_targets[:, None] == classes).astype(np.int64)
    return evaluate_arrays(split, protocols)


def evaluate(
    ckpt: str | list[str],
    data: str,
    test: str | None,
    protocols: list[str],
    arch: str | None = None,
    size: int | None = None,
    input: str | None = None,
    allow_partial: bool = False,
    progress: Any = None,
    arch_args: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Every protocol on the features of labelled images.

    Args:
        ckpt: what `load_backbone` takes. A RUN is evaluated beside the checkpoint it came from, where that is still
            there. Several are evaluated side by side, and each alone.
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
        several members this is of all of them side by side, and `members` has the same of each.
    """
    from odcft.backbone import load_backbone
    from odcft.evaluation.labels import labelled
    from odcft.inputs import seen_as
    from odcft.log import Progress

    progress = progress or Progress()
    labels = labelled(data, test)
    sources, (origins, taken) = (ckpt, ([], {})) if isinstance(ckpt, list) else (_sources(ckpt), _origins(ckpt))
    loaded = [load_backbone(source, arch, input, allow_partial, arch_args=arch_args) for source in sources]
    views = [view_of(one, labels.images, size) for one in loaded]
    for view in dict.fromkeys(views):
        progress.say(f"Images      {len(labels.images):,} in {labels.images.source} · {seen_as(view)}")
    if labels.images.skipped:
        progress.say(f"Not read    {labels.images.not_read()}")
    after_splits = [_features(one, labels, view, progress) for one, view in zip(loaded, views, strict=True)]
    before_splits = [
        _features(load_backbone(origin, **taken, member=member), labels, view, progress)
        for member, (origin, view) in enumerate(zip(origins, views, strict=False))
    ]

    def compared(after_split: Split, before_split: Split | None) -> dict[str, Any]:
        after = evaluate_arrays(after_split, protocols)
        if before_split is None:
            return after
        before = evaluate_arrays(before_split, protocols)
        return {**after, "before": before, "change": _changes(before, after, after_split.test_targets)}

    results = compared(_side_by_side(after_splits), _side_by_side(before_splits) if before_splits else None)
    if len(sources) > 1:
        results["members"] = [
            {"source": source, **compared(split, before_splits[m] if before_splits else None)}
            for m, (source, split) in enumerate(zip(sources, after_splits, strict=True))
        ]
    return {**results, "classes": labels.classes, "view": vars(views[0])}


def _side_by_side(splits: list[Split]) -> Split:
    """The features of several backbones as one, each at unit length; those of a single one as they are."""
    if len(splits) == 1:
        return splits[0]

    def joined(name: str) -> np.ndarray:
        parts = [getattr(split, name) for split in splits]
        return np.concatenate([part / (np.linalg.norm(part, axis=1, keepdims=True) + 1e-5) for part in parts], axis=1)

    return Split(joined("train_features"), splits[0].train_targets, joined("test_features"), splits[0].test_targets)


def _sources(ckpt: str) -> list[str]:
    """The backbones of a RUN of several members, in their order; anything else is one by itself."""
    from odcft.folders import BACKBONES

    members = [str(Path(ckpt) / name) for name in BACKBONES if (Path(ckpt) / name).is_dir()]
    return members if len(members) > 1 else [ckpt]


def view_of(loaded: "Loaded", images: "Images", size: int | None) -> "View":
    """How labelled images are seen: as the recipe that trained the backbone says, where its file tells.

    A network that was made for larger images is not shown small ones enlarged, but whole and as they are, unless its
    file says so.

    Args:
        loaded: the backbone.
        images: those to see.
        size: the user's word.
    """
    from odcft.data import automatic_size, own_range, usual_side

    view, backbone = loaded.backbone.input.view, loaded.backbone
    if view.intensity is None:  # it was trained on images of 8 bits, or somewhere else
        view = replace(view, intensity=own_range(images)[0])
    if size is not None or loaded.told:
        return replace(view, size=size or view.size)
    size = automatic_size(view.size, backbone.fixed_size, usual_side(images))
    return replace(view, size=size, crop_fraction=1.0 if size < view.size else view.crop_fraction)


def _features(loaded: "Loaded", labels: Any, view: "View", progress: Any) -> Split:
    """Backbone features of labelled images, as a split; images that cannot be read are left out."""
    import torch

    from odcft.data import Crops
    from odcft.features import extract
    from odcft.log import Progress

    backbone = loaded.backbone
    if backbone.fixed_size and view.size != backbone.size:
        raise OdcftError(f"{backbone.arch} takes images of {backbone.size} pixels only, not {view.size}.")
    if not backbone.takes(view.size):
        raise OdcftError(f"{backbone.arch} cannot look at images of {view.size} pixels. Try --size {backbone.size}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    crops = Crops(labels.images, view)
    features, bad = extract(backbone.to(device).eval(), crops, 128, 0, device, progress or Progress(), "Features")
    if bad:
        name, reason = labels.images.names[min(bad)], bad[min(bad)]
        if len(bad) == len(labels.images):
            raise OdcftError(f"None of the {len(bad):,} images can be read; {name}: {reason}.")
        progress.say(
            f"            {len(bad):,} unreadable and left out: {name} ({reason}){', …' if len(bad) > 1 else ''}"
        )
    good_N = np.array([i not in bad for i in range(len(labels.images))])
    train, test = labels.train_rows[good_N[labels.train_rows]], labels.test_rows[good_N[labels.test_rows]]
    rows = features.cpu().numpy()
    return Split(rows[train], labels.targets[train], rows[test], labels.targets[test])


def _origins(ckpt: str) -> tuple[list[str], dict[str, Any]]:
    """The checkpoints a RUN was started from, where they are still the same, and how it took them; else none.

    Raises:
        OdcftError: its files are there, and cannot be those of a RUN.
    """
    from odcft.description import read_json
    from odcft.folders import sha256
    from odcft.recipe import load_recipe, taken_as

    run = Path(ckpt)
    if not ((run / "run.json").is_file() and (run / "recipe.yaml").is_file()):
        return [], {}
    about, recipe = read_json(run / "run.json"), load_recipe(run / "recipe.yaml")
    arch = about.get("arch_given")
    ckpts: list[Any]
    sums: list[Any]
    ckpts, sums = (one if isinstance(one, list) else [one] for one in (about.get("checkpoint"), about.get("sha256")))
    if not all(isinstance(one, str) for one in (*ckpts, *sums, arch or "")):
        raise OdcftError(f"{run / 'run.json'} does not name a checkpoint as `odcft finetune` does. Is it damaged?")
    try:
        same = [sha256(one) for one in ckpts] == sums
    except (OSError, ValueError):
        same = False
    return (ckpts if same else []), {**taken_as(recipe), "seed": recipe.seed, "arch": arch}


def _changes(before: dict[str, Any], after: dict[str, Any], targets_NC: np.ndarray, draws: int = 200) -> dict[str, Any]:
    """By how much each figure changed, and the 95 % interval over test images drawn again (a paired bootstrap)."""
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, len(targets_NC), len(targets_NC)) for _ in range(draws)]
    changes = {}
    for protocol in set(before) & set(_FIGURE):
        name = _FIGURE[protocol][1]
        drawn = [_figure(protocol, after, targets_NC, r) - _figure(protocol, before, targets_NC, r) for r in rows]
        low, high = np.percentile(drawn, [2.5, 97.5])
        changes[protocol] = {"change": after[protocol][name] - before[protocol][name], "low": low, "high": high}
    return changes


def _figure(protocol: str, results: dict[str, Any], targets_NC: np.ndarray, rows: np.ndarray) -> float:
    if protocol == "knn":
        return 100 * float((results["knn"]["predicted"][rows] == _one_class(targets_NC[rows])).mean())
    from odcft.evaluation.svm import average_precision

    present, scores = targets_NC[rows], results["svm"]["scores"][rows]
    counted = present != -1
    return 100 * float(
        np.mean(
            [
                average_precision(present[counted[:, c], c] == 1, scores[counted[:, c], c])
                for c in range(present.shape[1])
            ]
        )
    )


def _one_class(targets_NC: np.ndarray) -> np.ndarray:
    if ((targets_NC == 1).sum(1) != 1).any():
        raise OdcftError("--protocol knn needs exactly one label an image. Leave knn away; svm takes several.")
    return (targets_NC == 1).argmax(1)


def public(results: Any) -> Any:
    """The results without the arrays that only the interval needs: what `--json` prints."""
    if isinstance(results, list):
        return [public(value) for value in results]
    if not isinstance(results, dict):
        return results
    return {name: public(value) for name, value in results.items() if name not in ("scores", "predicted")}


def table(results: dict[str, Any]) -> list[tuple[str, float | None, float, str]]:
    """Lines for people: figure, before, after, change with its interval."""
    lines = []
    for protocol, (title, name) in _FIGURE.items():
        if protocol in results:
            change = results.get("change", {}).get(protocol)
            before = results["before"][protocol][name] if change else None
            text = f"{change['change']:+.1f}  ({change['low']:+.1f} … {change['high']:+.1f})" if change else ""
            lines.append((title, before, results[protocol][name], text))
    return lines
