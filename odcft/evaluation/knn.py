"""Nearest neighbours: a test image gets the class that its nearest training images vote for.

Shapes: N images, F features, k neighbours, B test images at a time, C classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from odcft.distributed import accelerator

K = 20  # neighbours of the accuracy called `top1`
KS = (10, 20, 100, 200)  # the numbers of neighbours that are usually reported (DINO)
TEMPERATURE = 0.07  # of the votes, exp(cosine / T) (Wu et al. 2018; DINO)
DECIMALS = 12  # of similarities: fewer than float64 has, so that identical images are equally similar
TRAIN_ROWS, TEST_ROWS = 16_384, 1024  # compared at a time: 128 MB of similarities


def knn(
    train_NF: np.ndarray,
    train_N: np.ndarray,
    test_NF: np.ndarray,
    test_N: np.ndarray,
    k: int = K,
    ks: Sequence[int] = KS,
) -> dict[str, Any]:
    """Accuracy of a weighted vote among the most similar training images (cosine similarity, in float64).

    Args:
        train_NF, test_NF: float, finite.
        train_N, test_N: classes, integers from 0.
        k: number of neighbours; fewer if there are fewer training images.
        ks: other numbers of neighbours; those above the number of training images are left out.

    Returns:
        `top1` in 0..100, the `k` used, `per_k` (top1 for each number of neighbours), and `predicted`, the (N,) classes
        of the test images by k neighbours.
    """
    k = min(k, len(train_NF))
    every_k = sorted({k, *(one for one in ks if one <= len(train_NF))})
    device = torch.device(accelerator.kind())
    similarity, nearest = _most_similar(train_NF, test_NF, every_k[-1], device)
    classes = torch.from_numpy(train_N).long().to(device)
    predicted = {one: _vote(similarity[:, :one], classes, nearest[:, :one]) for one in every_k}
    per_k = {str(one): 100 * float((class_N == test_N).mean()) for one, class_N in predicted.items()}
    return {"top1": per_k[str(k)], "k": k, "per_k": per_k, "predicted": predicted[k]}


def _most_similar(train_NF: np.ndarray, test_NF: np.ndarray, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Similarity and row (N, k) of the k training images most similar to each test image, the most similar first."""
    best: list[tuple[Tensor, Tensor]] = []  # of each block of test images
    tests = [_unit_length(test_NF[start : start + TEST_ROWS], device) for start in range(0, len(test_NF), TEST_ROWS)]
    for start in range(0, len(train_NF), TRAIN_ROWS):
        train = _unit_length(train_NF[start : start + TRAIN_ROWS], device)
        for number, test_BF in enumerate(tests):
            similarity, row = (test_BF @ train.T).round_(decimals=DECIMALS).topk(min(k, len(train)), dim=1)
            row += start
            if start == 0:
                best.append((similarity, row))
                continue
            similarity, row = (torch.cat(pair, 1) for pair in zip(best[number], (similarity, row), strict=True))
            similarity, order = similarity.topk(min(k, similarity.shape[1]), dim=1)
            best[number] = similarity, row.gather(1, order)
    return torch.cat([similarity for similarity, _ in best]), torch.cat([row for _, row in best])


def _vote(similarity_Nk: Tensor, classes: Tensor, nearest_Nk: Tensor) -> np.ndarray:
    """The class (N,) with most votes; the lowest of several with equally many."""
    predicted = []
    for similarity, nearest in zip(similarity_Nk.split(TEST_ROWS), nearest_Nk.split(TEST_ROWS), strict=True):
        votes_BC = similarity.new_zeros(len(nearest), int(classes.max()) + 1)
        votes_BC.scatter_add_(1, classes[nearest], (similarity / TEMPERATURE).exp())
        predicted.append(votes_BC.argmax(1))
    return torch.cat(predicted).cpu().numpy()


def _unit_length(features_BF: np.ndarray, device: torch.device) -> Tensor:
    # In float64 the square of a float32 cannot overflow, and rounding does not decide which image is nearest.
    if features_BF.dtype != np.float32:  # converted on the device: it is half as much to move
        features_BF = features_BF.astype(np.float64)
    return F.normalize(torch.from_numpy(np.ascontiguousarray(features_BF)).to(device).double(), dim=1)
