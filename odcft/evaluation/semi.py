"""Semi-supervised classification: all layers are fine-tuned with 1 % and 10 % of the training labels.

The published setting (OpenSelfSup) was made for ImageNet, where 1 % are 12,811 images. With a few hundred labels it
would take a handful of steps, so they get the `quick` setting: smaller batches, milder crops, and steps enough.

Shapes: N images, B batch, F features, C classes.
"""

import math
from collections.abc import Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odcft import seeds
from odcft.backbone.network import Backbone
from odcft.data.batches import Crops, TrainingBatches, TrainingOrder
from odcft.data.decoded_cache import make_cache
from odcft.data.feature_extraction import extract, to_float
from odcft.data.images import Images
from odcft.data.view import View
from odcft.distributed import dist, ownership
from odcft.errors import OdcftError
from odcft.evaluation.labels import LabelledImages
from odcft.evaluation.protocols import class_numbers
from odcft.optim import make_optimizer, set_lr
from odcft.plan import loader_workers
from odcft.precision import has_bfloat16
from odcft.progress import Progress
from odcft.recipe import AugmentRecipe, OptimRecipe

PERCENTS = (1, 10)  # of the training labels
DROPS, FACTOR = (0.6, 0.8), 0.2  # the learning rate is multiplied by FACTOR after these shares of the steps
EPOCHS, BATCH = 20, 256  # published
FEW_IMAGES = 10_000  # labelled images below which the quick setting is used: fewer than in 1 % of ImageNet
QUICK_STEPS, QUICK_BATCH = 300, 32
TOP = 5  # top-5 is measured too where there are more classes than this
TEST_BATCH = 128  # images per forward pass of the test
_NO_JITTER: dict[str, float] = dict.fromkeys(("rotation", "brightness", "contrast", "saturation", "hue", "gray"), 0.0)


@dataclass(frozen=True)
class Setting:
    """How a network is fine-tuned with labels.

    Attributes:
        name: "published" or "quick".
        epochs: over the labelled images.
        batch: images per step, over all ranks.
        smallest_crop: the share of an image's area that a random crop keeps at least.
        optimizer: sgd, with momentum 0.9; or adamw for transformers, which SGD does not suit.
        lr: learning rate of the backbone. Published results take the best of 0.001, 0.01 and 0.1 on the test images.
        head_lr: the head's, as a multiple; published results take the best of 1, 10 and 100 likewise.
        weight_decay: of all layers.
    """

    name: str
    epochs: int
    batch: int
    smallest_crop: float
    optimizer: str = "sgd"
    lr: float = 0.01
    head_lr: float = 10.0
    weight_decay: float = 5e-4


def setting_for(images: int, transformer: bool = False) -> Setting:
    """The setting for so many labelled images."""
    other: dict[str, Any] = {"optimizer": "adamw", "lr": 1e-4, "weight_decay": 0.05} if transformer else {}
    if images >= FEW_IMAGES:
        return Setting("published", EPOCHS, BATCH, 0.08, **other)
    batch = min(QUICK_BATCH, images)
    return Setting("quick", max(EPOCHS, math.ceil(QUICK_STEPS / (images // batch))), batch, 0.2, **other)


def draw_labelled(class_N: np.ndarray, percent: float, seed: int) -> np.ndarray:
    """Draw the images whose labels are used: the same share of every class, rounded, and at least one of each.

    Args:
        class_N: classes of the training images, integers from 0.
        percent: of the images; those of a smaller percentage are among those of a larger one.
        seed: the draw depends on it and on the number of images of each class only.

    Returns:
        Their positions in `class_N`, ascending.
    """
    drawn = []
    for c in np.unique(class_N):
        rows = np.flatnonzero(class_N == c)
        order = torch.randperm(len(rows), generator=seeds.generator(seed, "labels", int(c))).numpy()
        drawn.append(rows[order[: max(1, round(len(rows) * percent / 100))]])
    return np.sort(np.concatenate(drawn))


@dataclass
class LabelledSets:
    """Images to train and to test on, all readable; the same on every rank.

    Attributes:
        images: all of them.
        train_rows, test_rows: image numbers, ascending.
        train_N, test_N: their classes, integers from 0.
    """

    images: Images
    train_rows: np.ndarray
    train_N: np.ndarray
    test_rows: np.ndarray
    test_N: np.ndarray


def sets_of(labels: LabelledImages) -> LabelledSets:
    """The images that rank 0 trains and tests on: only rank 0 knows which of them cannot be read.

    Raises:
        OdcftError: an image with no label, or with several.
    """
    mine = {0: (labels.train_rows, labels.test_rows)} if dist.rank() == 0 else {}
    train, test = dist.gather_dict(mine)[0]
    train_N, test_N = (class_numbers(labels.targets[rows], "semi") for rows in (train, test))
    return LabelledSets(labels.images, train, train_N, test, test_N)


def semi(
    backbones: Sequence[Backbone],
    sets: LabelledSets,
    view: View,
    progress: Progress,
    *,
    percents: Sequence[int] = PERCENTS,
    seed: int = 0,
    suffix: str = "",
) -> dict[str, Any]:
    """Fine-tune all layers with a few labels, and test. All ranks call this together, and share the work.

    Args:
        backbones: several are fine-tuned as one network, with a single classifier on their features side by side. They
            are not changed.
        sets: the images.
        view: how test images are resized and cropped; training takes random crops of the same size, and flips them.
        progress: where to report.
        percents: of the labels, ascending.
        seed: of the draws of images, of the classifier's weights, and of the order and crops of the images.
        suffix: of the titles of progress bars.

    Returns:
        `top1` (0..100) with the largest share of the labels; `seed`; and `per_fraction`, for each share ("1%"): `top1`,
        `top5` if there are more than TOP classes, `images` (labels used), `setting`, `few` (whether some class has
        fewer than one image in that share, so that one was taken), and the `predicted` classes (N,) of the test images.

    Raises:
        OdcftError: too few labelled images for so many processes, or the training diverges.
    """
    found = {}
    for percent in percents:
        rows = draw_labelled(sets.train_N, percent, seed)
        if len(rows) < 2 * dist.world_size():
            raise OdcftError(
                f"--protocol semi: {percent} % of the labels are {len(rows)} images, fewer than 2 for each of "
                f"{dist.world_size()} processes. Use fewer, or give more labelled images."
            )
        setting = setting_for(len(rows), any(backbone.is_transformer for backbone in backbones))
        network = _train(backbones, sets, rows, view, setting, seed, progress, f"Semi {percent} %{suffix}")
        logits_NC = _test(network, sets, view, progress, f"Test {percent} %{suffix}")
        smallest = int(np.bincount(sets.train_N)[np.unique(sets.train_N)].min())
        found[f"{percent}%"] = {
            **_figures(logits_NC, sets.test_N),
            "images": len(rows),
            "setting": vars(setting),
            "few": smallest * percent < 100,
        }
    return {"top1": list(found.values())[-1]["top1"], "seed": seed, "per_fraction": found}


class _Classifier(nn.Module):
    """Backbones side by side, and a linear layer on their features."""

    def __init__(self, backbones: Sequence[Backbone], classes: int) -> None:
        super().__init__()
        self.backbones = nn.ModuleList(deepcopy(backbone) for backbone in backbones)
        self.head = nn.Linear(sum(backbone.width for backbone in backbones), classes)
        nn.init.normal_(self.head.weight, 0, 0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), RGB in 0..1, to logits (B, C)."""
        return self.head(torch.cat([backbone(images) for backbone in self.backbones], 1))


def _train(
    backbones: Sequence[Backbone],
    sets: LabelledSets,
    rows: np.ndarray,
    view: View,
    setting: Setting,
    seed: int,
    progress: Progress,
    title: str,
) -> _Classifier:
    """A classifier trained on these positions of the training images, in evaluation mode."""
    device, images = dist.this_device(), sets.images.take(sets.train_rows[rows])
    class_N = torch.from_numpy(sets.train_N[rows]).long()
    augment = AugmentRecipe(crop_scale=(setting.smallest_crop, 1.0), **_NO_JITTER)
    order = TrainingOrder(len(images), max(1, setting.batch // dist.world_size()), setting.epochs, seed)
    crops = Crops(images, view, augment, seed, cache=make_cache(images, view))
    batches = TrainingBatches(crops, order, loader_workers(device), device)
    with seeds.seeded_init(seed, "semi head"):
        network = _Classifier(backbones, int(sets.train_N.max()) + 1).to(device)
        for parameter in network.parameters():
            parameter.requires_grad_(True)
        optimizer = make_optimizer(network.backbones.parameters(), network.head.parameters(), _optim(setting))
        model = dist.data_parallel(network.train(), device, [network])
        with closing(batches), progress.phase(title, order.images_left()) as advance:
            for step in range(order.steps):
                if step % order.steps_per_epoch == 0:
                    epoch = batches.of_epoch(step)
                batch = next(epoch)
                for index, reason in batch.unreadable.items():
                    raise OdcftError(f"{images.path(index)} can no longer be read: {reason.rstrip('.')}.")
                set_lr(optimizer, setting.lr * FACTOR ** sum(step >= share * order.steps for share in DROPS))
                with _autocast(device):
                    logits_BC = model(to_float(batch.pixels, device))
                loss = F.cross_entropy(logits_BC.float(), class_N[batch.index_B].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                advance(len(batch.index_B) * dist.world_size())
    return network.eval()


def _test(network: _Classifier, sets: LabelledSets, view: View, progress: Progress, title: str) -> np.ndarray:
    """The logits (N, C) of the test images, on every rank."""
    device, images = dist.this_device(), sets.images.take(sets.test_rows)
    with _autocast(device):
        crops, workers = Crops(images, view), loader_workers(device)
        logits_SC, unreadable = extract(network, crops, TEST_BATCH, workers, device, progress, title)
    for index, reason in dist.gather_dict(unreadable).items():
        raise OdcftError(f"{images.path(index)} can no longer be read: {reason.rstrip('.')}.")
    logits_NC = ownership.in_dataset_order(logits_SC, len(images)).cpu().numpy()
    if not np.isfinite(logits_NC).all():
        raise OdcftError(
            "--protocol semi: training with the labels diverged, and the network gives NaN. Its weights do not suit "
            "this protocol; use svm or knn."
        )
    return logits_NC


def _figures(logits_NC: np.ndarray, test_N: np.ndarray) -> dict[str, Any]:
    """Accuracies in 0..100, and the classes predicted."""
    best = np.argsort(-logits_NC, axis=1, kind="stable")[:, :TOP]
    correct = best == test_N[:, None]
    figures: dict[str, Any] = {"top1": 100 * float(correct[:, 0].mean()), "predicted": best[:, 0]}
    return figures | ({"top5": 100 * float(correct.any(1).mean())} if logits_NC.shape[1] > TOP else {})


def _optim(setting: Setting) -> OptimRecipe:
    return OptimRecipe(
        optimizer=setting.optimizer,  # type: ignore[arg-type]
        lr=setting.lr,
        head_lr=setting.head_lr,
        momentum=0.9,
        head_momentum=0.9,
        weight_decay=setting.weight_decay,
    )


def _autocast(device: torch.device) -> torch.autocast:
    half = device.type != "cpu" and has_bfloat16(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=half)
