"""Nearest neighbours: a test image gets the class that its nearest training images vote for.

Shapes: N images, F features.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

K = 20  # neighbours
TEMPERATURE = 0.07  # of the votes, exp(cosine / T) (Wu et al. 2018; DINO)


def knn(
    train_NF: np.ndarray, train_N: np.ndarray, test_NF: np.ndarray, test_N: np.ndarray, k: int = K
) -> dict[str, Any]:
    """Accuracy of a weighted vote among the k most similar training images (cosine similarity).

    Args:
        train_NF, test_NF: float, finite.
        train_N, test_N: classes, integers from 0.
        k: number of neighbours; fewer if there are fewer training images.

    Returns:
        `top1` in 0..100, the `k` used, and `predicted`, the (N,) classes of the test images.
    """
    train = _unit_length(train_NF)
    test = _unit_length(test_NF)
    classes = torch.from_numpy(train_N).long()
    k = min(k, len(train))
    predicted = []
    for part in test.split(1024):
        similarity, nearest = (part @ train.T).topk(k, dim=1)
        votes = torch.zeros(len(part), int(classes.max()) + 1)
        votes.scatter_add_(1, classes[nearest], (similarity / TEMPERATURE).exp())
        predicted.append(votes.argmax(1))
    predicted_N = torch.cat(predicted).numpy()
    return {"top1": 100 * float((predicted_N == test_N).mean()), "k": k, "predicted": predicted_N}


def _unit_length(features_NF: np.ndarray) -> torch.Tensor:
    # In float64, in which the square of a float32 cannot overflow.
    return F.normalize(torch.from_numpy(features_NF.astype(np.float64)), dim=1).float()
