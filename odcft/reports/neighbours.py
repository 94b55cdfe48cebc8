"""The nearest neighbours of images before and after fine-tuning: among a sample, by cosine similarity of features.

Shapes: M images of the sample, F features, T neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from odcft.backbone.layers import LAST
from odcft.backbone.load import Loaded, load_backbone
from odcft.data.images import Images
from odcft.errors import OdcftError
from odcft.evaluation.features import features_of
from odcft.evaluation.starting_checkpoint import SCHEMES, find_starting_checkpoints, load_options_of, view_of_run
from odcft.plan import view_for_evaluation
from odcft.progress import Progress
from odcft.run.folder import BACKBONES
from odcft.text import short_repr

TOP = 6  # neighbours shown
ROWS = 1024  # compared at a time


@dataclass
class Neighbours:
    """Neighbours of the images of a sample.

    Attributes:
        rows: of the images in the sample (M,), as the run numbers them.
        after: for each, the rows of its neighbours, the nearest first (M, T); `before` likewise, None if unknown.
        why_no_before: why it is unknown.
        kept: the mean share of an image's neighbours that it had before, too; None without `before`.
    """

    rows: np.ndarray
    after: np.ndarray
    before: np.ndarray | None
    why_no_before: str = ""

    @property
    def kept(self) -> float | None:
        """The mean share of the neighbours after that were neighbours before."""
        if self.before is None:
            return None
        return float(np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(self.after, self.before, strict=True)]))


def before_and_after(
    run: Path, images: Images, rows: np.ndarray, progress: Progress, *, alone: bool = False
) -> Neighbours | None:
    """Find the neighbours among some images, with the backbone of a RUN and with the checkpoint it was started from.

    The features come from the cache where they are known.

    Args:
        run: the RUN, complete.
        images: those it was trained on.
        rows: of the sample, ascending.
        progress: where to report.
        alone: whether only this one of several processes is here.

    Returns:
        None if fewer than two images of the sample can be read.

    Raises:
        OdcftError: the backbone of the RUN cannot be loaded.
    """
    sample = images.take(rows)
    names = [name for name in BACKBONES if (run / name).is_dir()]
    if not names:
        raise OdcftError(f"{run} has no backbone.")
    after = [load_backbone(str(run / name)) for name in names]
    ckpts, why = find_starting_checkpoints(str(run), len(after))
    before: list[Loaded] = []
    try:
        for ckpt, one in zip(ckpts, after, strict=False):  # no checkpoints if they are not known
            _refuse_other_network(ckpt, one)
        before = [
            load_backbone(ckpt, **load_options_of(str(run), member, len(ckpts)), member=member, fetch=False)
            for member, ckpt in enumerate(ckpts)
        ]
    except OdcftError as error:
        why = str(error).rstrip(".")
    features, unreadable = [], set()
    view = view_for_evaluation(after[0], sample, None, view_of_run(str(run)))
    for networks in (after, before):
        found = [features_of(one.backbone, sample, view, progress, alone=alone) for one in networks]
        unreadable |= {i for one in found for i in one.unreadable}
        features.append([one.layers[LAST] for one in found])
    good = np.array([i for i in range(len(rows)) if i not in unreadable], dtype=np.int64)
    if len(good) < 2:
        return None
    nearest = [rows[good][_nearest(_joined(parts)[good])] if parts else None for parts in features]
    assert nearest[0] is not None
    return Neighbours(rows[good], nearest[0], nearest[1], why)


def _refuse_other_network(ckpt: str, after: Loaded) -> None:
    """Refuse a name in run.json that is of another network than the RUN's: it could be of any size."""
    arch = ckpt.rpartition(":")[2].partition(".")[0]
    if ckpt.partition(":")[0] in SCHEMES and arch != after.backbone.arch.partition(".")[0] and arch != "alexnet":
        raise OdcftError(f"run.json says {short_repr(ckpt, quotes=False)}, but the backbone is {after.backbone.arch}")


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Features of several networks side by side, each of unit length."""
    return np.concatenate([_unit(part) for part in parts], axis=1)


def _unit(features_MF: np.ndarray) -> Any:
    features_MF = np.nan_to_num(features_MF.astype(np.float32), posinf=0.0, neginf=0.0)
    return features_MF / np.maximum(np.linalg.norm(features_MF, axis=1, keepdims=True), 1e-12)


def _nearest(features_MF: np.ndarray) -> np.ndarray:
    """The indices (M, T) of the nearest others of each row, the nearest first."""
    features_MF = _unit(features_MF)
    top = min(TOP, len(features_MF) - 1)
    found = []
    for start in range(0, len(features_MF), ROWS):
        cosine = features_MF[start : start + ROWS] @ features_MF.T
        here = np.arange(len(cosine))
        cosine[here, start + here] = -np.inf
        some = np.argpartition(-cosine, top - 1, axis=1)[:, :top]
        order = np.argsort(-np.take_along_axis(cosine, some, 1), axis=1, kind="stable")
        found.append(np.take_along_axis(some, order, 1))
    return np.concatenate(found)
