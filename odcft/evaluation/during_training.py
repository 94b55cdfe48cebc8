"""Nearest-neighbour accuracy on labelled images now and then while a run trains, and the best epoch's backbone."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from odcft.backbone.layers import LAST
from odcft.backbone.network import Backbone
from odcft.backbone.timm_folder import write_timm
from odcft.data.custom_reader import Reader
from odcft.data.view import View
from odcft.distributed import dist
from odcft.errors import OdcftError
from odcft.evaluation.features import features_of
from odcft.evaluation.knn import knn
from odcft.evaluation.labels import LabelledImages, load_labelled_images, without_unreadable
from odcft.evaluation.protocols import class_numbers
from odcft.progress import Progress
from odcft.run.folder import BEST_BACKBONES
from odcft.run.run_json import about_run


def load_images_to_evaluate(data: str, reader: Reader | None = None) -> LabelledImages:
    """The labelled images of `--eval`: one half is learned from, the other tested on.

    Raises:
        OdcftError: kNN cannot be measured on them.
    """
    labels = load_labelled_images(data, None, reader=reader)
    class_numbers(labels.targets[labels.targets.any(1)])
    return labels


@dataclass
class EpochEvaluation:
    """Evaluates the backbones of a run, side by side, at the ends of some epochs.

    Labels never reach training: no random number is drawn, and batch norm keeps its statistics.

    Attributes:
        labels: the images, and which are tested on.
        every: epochs between two evaluations; the last epoch is always evaluated.
        epochs: of the run.
        backbones: in training.
        view: how training sees images without augmentation.
        out: the RUN; the best epoch's backbones are kept in its `backbone_best`.
    """

    labels: LabelledImages
    every: int
    epochs: int
    backbones: Sequence[Backbone]
    view: View
    out: Path

    def after_epoch(self, epoch: int, lines: Sequence[Mapping[str, Any]], say: Callable[[str], None]) -> dict[str, Any]:
        """Evaluate if it is due; all ranks call this together.

        Args:
            epoch: how many epochs are done.
            lines: of metrics.jsonl so far: they hold the earlier figures.
            say: called if something went wrong.

        Returns:
            {"knn": accuracy in 0..100}; {} if none was due, or on other ranks than the first.
        """
        if epoch % self.every and epoch < self.epochs:
            return {}
        training = [backbone.training for backbone in self.backbones]
        try:
            found = [
                features_of(backbone, self.labels.images, self.view, Progress(quiet=True), keep=False)
                for backbone in self.backbones
            ]
        finally:
            for backbone, mode in zip(self.backbones, training, strict=True):
                backbone.train(mode)
        if dist.rank() > 0:
            return {}
        try:
            labels = without_unreadable(self.labels, {i: why for one in found for i, why in one.unreadable.items()})
        except OdcftError as error:
            say(f"Warning     Epoch {epoch} was not evaluated: {error}")
            return {}
        features = [one.layers[LAST] for one in found]
        rows = np.concatenate([one / (np.linalg.norm(one, axis=1, keepdims=True) + 1e-5) for one in features], axis=1)
        train, test = labels.train_rows, labels.test_rows
        if not np.isfinite(rows).all():
            say(f"Warning     Epoch {epoch} was not evaluated: the backbone gives features that are not finite.")
            return {}
        class_N = class_numbers(labels.targets[np.concatenate([train, test])])
        result = knn(rows[train], class_N[: len(train)], rows[test], class_N[len(train) :])
        earlier = [line["knn"] for line in lines if isinstance(line.get("knn"), int | float)]
        if result["top1"] > max(earlier, default=-1.0):
            self._keep_best(epoch)
        return {"knn": result["top1"]}

    def _keep_best(self, epoch: int) -> None:
        names = BEST_BACKBONES[: len(self.backbones)]
        for member, (backbone, name) in enumerate(zip(self.backbones, names, strict=True)):
            copy = deepcopy(backbone).cpu().eval()
            copy.set_view(self.view)
            write_timm(copy, self.out / name, {**about_run(self.out, member), "epochs": epoch})
