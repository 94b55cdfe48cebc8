"""VOC07 SVM: a linear SVM a class on frozen features, mean average precision
(Goyal et al. 2019, as OpenSelfSup runs it).

Shapes: N images, F features, C classes. A target is 1 (present), 0 (absent) or -1 (difficult).
"""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

COSTS = (1.0, 10.0, 100.0, *(0.5**k for k in range(4, 20)))
DUAL_ROWS = 10_000  # above, the primal solver: the same optimum, and far faster where there are more rows than features


def voc07_svm(
    train_NF: np.ndarray,
    train_NC: np.ndarray,
    test_NF: np.ndarray,
    test_NC: np.ndarray,
    costs: tuple[float, ...] = COSTS,
) -> dict[str, Any]:
    """Train on one half, test on the other; the cost of each class is chosen by three-fold cross-validation.

    Features are brought to unit length. Difficult images count as negatives in training and are left out of the test.

    Args:
        train_NF, test_NF: float.
        train_NC, test_NC: targets, each class present in both.
        costs: the SVM's C, tried for each class.

    Returns:
        `mAP` in 0..100, `per_class` average precisions in 0..100, `costs` chosen;
        and `scores` (N, C) of the test images.
    """
    from sklearn.exceptions import ConvergenceWarning

    train, test = _unit_length(train_NF), _unit_length(test_NF)

    def one_class(c: int) -> tuple[float, float, np.ndarray]:
        cost, scores = _fit(train, np.where(train_NC[:, c] == 1, 1, -1), test, costs)
        counted = test_NC[:, c] != -1
        return cost, average_precision(test_NC[counted, c] == 1, scores[counted]), scores

    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:  # liblinear lets go of Python's lock
        warnings.simplefilter("ignore", ConvergenceWarning)  # at high costs 2,000 iterations are the protocol
        results = list(pool.map(one_class, range(train_NC.shape[1])))
    chosen, precisions, scores = zip(*results, strict=True)
    return {
        "mAP": 100 * float(np.mean(precisions)),
        "per_class": [100 * p for p in precisions],
        "costs": list(chosen),
        "scores": np.stack(scores, axis=1),
    }


def average_precision(present_N: np.ndarray, scores_N: np.ndarray) -> float:
    """Area under the precision envelope at all recall points (VOC 2010 and later), 0..1."""
    order = np.argsort(-scores_N, kind="stable")
    hits = np.cumsum(present_N[order])
    precision = hits / np.arange(1, len(order) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[present_N[order]].sum() / max(1, hits[-1]))


def _fit(train: np.ndarray, sign: np.ndarray, test: np.ndarray, costs: tuple[float, ...]) -> tuple[float, np.ndarray]:
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.svm import LinearSVC

    def machine(cost: float) -> LinearSVC:
        return LinearSVC(
            C=cost,
            class_weight={1: 2, -1: 1},
            intercept_scaling=1.0,
            penalty="l2",
            loss="squared_hinge",
            tol=1e-4,
            dual=len(train) <= DUAL_ROWS,
            max_iter=2000,
            random_state=0,
        )

    folds = StratifiedKFold(min(3, int((sign == 1).sum()), int((sign == -1).sum())))
    means = [
        cross_val_score(machine(cost), train, sign, cv=folds, scoring="average_precision").mean() for cost in costs
    ]
    cost = float(costs[int(np.argmax(means))])
    return cost, machine(cost).fit(train, sign).decision_function(test)


def _unit_length(features: np.ndarray) -> np.ndarray:
    features = features.astype(np.float64)
    return features / (np.linalg.norm(features, axis=1, keepdims=True) + 1e-5)
