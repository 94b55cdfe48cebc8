"""Linear classification: one linear classifier on each layer's frozen features, scored by top-1 accuracy.

Two ways to train it. The published schedule (OpenSelfSup, multi-head), made for a million images: SGD over 90 epochs.
And, for small sets, logistic regression fitted until it converges, as strong as its cost, chosen by cross-validation,
allows. The published features come from random crops; cached ones, as here, from one centre crop.

Shapes: N images, F features, B batch, C classes.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from odcft.distributed import accelerator

EPOCHS, STEPS = 90, (30, 60)  # the learning rate is divided by 10 after the epochs STEPS
BATCH, LR, MOMENTUM, WEIGHT_DECAY = 256, 0.01, 0.9, 1e-4  # with Nesterov's momentum
LOGISTIC_ROWS = 20_000  # training images above which logistic regression would take too long
LOGISTIC_COSTS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # scikit-learn's C, for features of unit variance


def linear(
    train: Mapping[str, np.ndarray],
    train_N: np.ndarray,
    test: Mapping[str, np.ndarray],
    test_N: np.ndarray,
    *,
    epochs: int = EPOCHS,
    seed: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Train and test a linear classifier on each layer.

    Args:
        train, test: features (N, F) of each layer, in the same order; float, finite.
        train_N, test_N: classes, integers from 0; at least two different ones in training.
        epochs: of the published schedule.
        seed: of the weights and of the order of the images.
        advance: called with 1 after each epoch, and after each layer's logistic regression.

    Returns:
        `top1` in 0..100 of the last layer by the published schedule, `per_layer` that of every layer, and `seed`;
        `predicted`, the classes (N,) of the test images by the last layer. `logistic`: `top1`, `per_layer`, the `costs`
        chosen and `predicted` of logistic regression, unless there are more than LOGISTIC_ROWS training images.
    """
    layers = {layer: _Layer(train[layer], test[layer]) for layer in train}
    by_layer = _train_by_sgd(layers, train_N, epochs, seed, advance)
    results = {**_accuracies(by_layer, test_N), "seed": seed}
    if len(train_N) <= LOGISTIC_ROWS:
        fitted = {}
        for name, layer in layers.items():
            fitted[name] = _logistic_regression(layer, train_N)
            advance(1)
        costs = {layer: cost for layer, (_, cost) in fitted.items()}
        results["logistic"] = {
            **_accuracies({layer: one for layer, (one, _) in fitted.items()}, test_N),
            "costs": costs,
        }
    return results


def count_of_steps(layers: int, rows: int, epochs: int = EPOCHS) -> int:
    """How often `linear` calls `advance` with this many layers and training images."""
    return epochs + (layers if rows <= LOGISTIC_ROWS else 0)


def _accuracies(predicted: Mapping[str, np.ndarray], test_N: np.ndarray) -> dict[str, Any]:
    per_layer = {layer: 100 * float((class_N == test_N).mean()) for layer, class_N in predicted.items()}
    last = list(predicted)[-1]
    return {"top1": per_layer[last], "per_layer": per_layer, "predicted": predicted[last]}


class _Layer:
    """Features of a layer, less their mean and divided by one scale, so that float32 holds them, however large.

    They are scaled as they are used, for no second copy of them might fit into memory. Batch normalisation would undo
    any other scale as well, except that of features too small for its epsilon.
    """

    def __init__(self, train_NF: np.ndarray, test_NF: np.ndarray) -> None:
        self.train_NF, self.test_NF = train_NF, test_NF
        self.mean_F = train_NF.mean(0, dtype=np.float64)
        largest = max(float(abs(self.mean_F).max()), *(float(abs(part).max()) for part in _parts(train_NF)))
        squares = sum(float((((part - self.mean_F) / (largest or 1)) ** 2).sum()) for part in _parts(train_NF))
        self.scale = largest * (squares / train_NF.size) ** 0.5 or 1.0

    def train(self, row_B: torch.Tensor | slice) -> torch.Tensor:
        """Training features (B, F) float32."""
        return self._scaled(self.train_NF[row_B.numpy() if isinstance(row_B, torch.Tensor) else row_B])

    def test(self) -> Iterator[torch.Tensor]:
        """Test features, some at a time."""
        return (self._scaled(part) for part in _parts(self.test_NF))

    def _scaled(self, rows_BF: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(((rows_BF - self.mean_F) / self.scale).astype(np.float32))


def _parts(rows_NF: np.ndarray) -> Iterator[np.ndarray]:
    return (rows_NF[start : start + 1024] for start in range(0, len(rows_NF), 1024))


def _train_by_sgd(
    layers: Mapping[str, _Layer], train_N: np.ndarray, epochs: int, seed: int, advance: Callable[[int], None]
) -> dict[str, np.ndarray]:
    """The classes (N,) of the test images by each layer, all layers trained on the same batches."""
    device = torch.device(accelerator.kind())
    classes = torch.from_numpy(train_N).long()
    widths = [len(layer.mean_F) for layer in layers.values()]
    heads = nn.ModuleList(_Head(width, int(classes.max()) + 1, seed) for width in widths).to(device)
    optimizer = torch.optim.SGD(heads.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [step * epochs // EPOCHS for step in STEPS])
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        # Equal parts: batch normalisation could not use a last batch of one image.
        order = torch.randperm(len(classes), generator=generator)
        for row_B in order.tensor_split(-(-len(classes) // BATCH)):
            class_B = classes[row_B].to(device)
            losses = [
                F.cross_entropy(head(layer.train(row_B).to(device)), class_B)
                for head, layer in zip(heads, layers.values(), strict=True)
            ]
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
        schedule.step()
        advance(1)
    heads.eval()
    with torch.no_grad():
        return {
            name: torch.cat([head(part.to(device)).argmax(1).cpu() for part in layer.test()]).numpy()
            for head, (name, layer) in zip(heads, layers.items(), strict=True)
        }


class _Head(nn.Module):
    """Batch normalisation without weights, and a linear layer."""

    def __init__(self, features: int, classes: int, seed: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(features, affine=False)
        self.linear = nn.Linear(features, classes)
        with torch.no_grad():
            self.linear.weight.normal_(0, 0.01, generator=torch.Generator().manual_seed(seed))
            self.linear.bias.zero_()

    def forward(self, rows_BF: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(rows_BF))


def _logistic_regression(layer: _Layer, train_N: np.ndarray) -> tuple[np.ndarray, float]:
    """The classes (N,) of the test images, and the cost, chosen by three-fold cross-validation."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import KFold
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    train_NF = scaler.fit_transform(layer.train(slice(None)).numpy())
    test_NF = scaler.transform(torch.cat(list(layer.test())).numpy())
    folds = KFold(min(3, len(train_N)), shuffle=True, random_state=0)

    def accuracy(cost: float) -> float:
        correct = 0.0
        for fit, held in folds.split(train_NF):
            if len(np.unique(train_N[fit])) > 1:  # else there is nothing to fit, and it counts as wrong
                model = LogisticRegression(C=cost).fit(train_NF[fit], train_N[fit])
                correct += (model.predict(train_NF[held]) == train_N[held]).sum()
        return float(correct)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        cost = max(LOGISTIC_COSTS, key=accuracy)  # the first, and so the smallest, of several equally good ones
        return LogisticRegression(C=cost, max_iter=1000).fit(train_NF, train_N).predict(test_NF), cost
