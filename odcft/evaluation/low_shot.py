"""Low-shot VOC07: the linear SVMs of svm.py, trained on only k images of each class.

The protocol is that of Goyal et al. 2019: for each k, five draws; in each, every class has its own k images and C - 1
times as many without it (19 for VOC). Published results choose the cost that is best on the test images, an oracle;
here it is chosen on the training images that a draw has left over, and the oracle's result is returned beside it. The
published draws have no recorded seed, so they cannot be repeated; ours can.

Shapes: N images, F features, C classes, D draws. A target is 1 (present), 0 (absent) or -1 (difficult).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from odcft.errors import OdcftError
from odcft.evaluation.svm import (
    COSTS,
    average_precision,
    for_each_class,
    in_span_of_first,
    linear_svm,
    quiet_liblinear,
    sparse,
    unit_length,
    unmeasurable_classes,
)

SHOTS = (1, 2, 4, 8, 16, 32, 64, 96)  # k; VOC07's rarest class has 96 training images
DRAWS = 5
MAX_SCORES = 1 << 29  # test images x classes x draws x values of k: 2 GB


def low_shot(
    train_NF: np.ndarray,
    train_NC: np.ndarray,
    test_NF: np.ndarray,
    test_NC: np.ndarray,
    *,
    shots: Sequence[int] = SHOTS,
    costs: Sequence[float] = COSTS,
    seed: int = 0,
    left_out: Mapping[int, str] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Train the SVMs on a few images of each class, for several numbers of images.

    A class counts under the same conditions as for the SVM on all images. A k counts if every such class has at least k
    training images, so that the mean over classes means the same for every k.

    Args:
        train_NF, test_NF: float, finite.
        train_NC, test_NC: targets.
        shots: values of k.
        costs: values of the SVM's C, of which one is chosen for each k.
        seed: of the draws.
        left_out: classes not to count, besides those that cannot be measured, and why.
        advance: called with the number of classes just finished.

    Returns:
        `mAP` in 0..100, the mean of `per_k`, the mean over draws and classes for each k; `per_class`, the mean over k
        and draws, None for a class that does not count; `costs` chosen for each k; `oracle`, the same with the cost
        that is best on the test images; `draws`, `seed`; `too_few`, the k that do not count; `left_out`, the classes
        that do not count; and `scores`, (D, N, C) of the test images for each k.

    Raises:
        OdcftError: no class counts.
    """
    measured, reasons = _measured_classes(train_NC, test_NC, left_out or {})
    rarest = int((train_NC[:, measured] == 1).sum(0).min())
    ks = [k for k in shots if k <= rarest]
    if len(ks) * DRAWS * test_NC.size > MAX_SCORES:
        raise OdcftError(
            f"--protocol low-shot: {test_NC.shape[1]:,} classes and {test_NC.shape[0]:,} test images are too many. "
            "Give fewer, or choose --protocol linear."
        )
    train, test = in_span_of_first(unit_length(train_NF), unit_length(test_NF))
    advance(len(reasons))
    rows = DRAWS * sum(ks) * train_NC.shape[1]  # that one cost is fitted to
    work = rows * train.shape[1] * len(measured) / 2  # twice as fast as the cross-validation of svm.py
    tables = []  # of each class: average precision on left-over training images and on test images (2, k, D, costs)
    for table in for_each_class(_precisions, (train, train_NC, test, test_NC, ks, costs, seed), measured, work):
        tables.append(table)
        advance(1)
    validated, tested = np.stack(tables).swapaxes(0, 1)
    chosen, oracle = _best(validated), _best(tested)
    # One cost serves all classes, so it is known only now: fit again with it, a small part of the work, for the scores.
    scores_kDNC = np.zeros((len(ks), DRAWS, *test_NC.shape), np.float32)
    arguments = (train, train_NC, test, ks, [costs[best] for best in chosen], seed)
    for c, scores in zip(measured, for_each_class(_scores, arguments, measured, work=0), strict=True):
        scores_kDNC[..., c] = scores
    place = {c: i for i, c in enumerate(measured)}
    shown = [place.get(c) for c in range(train_NC.shape[1])]
    return {
        **_summary(tested, chosen, ks, costs, shown),
        "oracle": _summary(tested, oracle, ks, costs, shown),
        "draws": DRAWS,
        "seed": seed,
        "too_few": {str(k): f"a class has only {rarest} training images" for k in shots if k > rarest},
        "left_out": reasons,
        "scores": dict(zip(map(str, ks), scores_kDNC, strict=True)),
    }


def _measured_classes(
    train_NC: np.ndarray, test_NC: np.ndarray, left_out: Mapping[int, str]
) -> tuple[list[int], dict[int, str]]:
    """The classes that count, and why the others do not."""
    only_difficult = {
        int(c): "no training image without it that is not difficult" for c in np.flatnonzero(~(train_NC == 0).any(0))
    }
    reasons = {**only_difficult, **unmeasurable_classes(train_NC, test_NC), **left_out}
    measured = [c for c in range(train_NC.shape[1]) if c not in reasons]
    if not measured:
        raise OdcftError(
            f"--protocol low-shot: no class can be measured; the first has {reasons[0]}. Give more labelled images."
        )
    return measured, dict(sorted(reasons.items()))


def _summary(
    tested: np.ndarray, chosen: Sequence[int], ks: Sequence[int], costs: Sequence[float], shown: Sequence[int | None]
) -> dict[str, Any]:
    """The results with the costs of these numbers, one for each k."""
    means_kM = np.stack([tested[:, i, :, cost].mean(1) for i, cost in enumerate(chosen)])
    names = [str(k) for k in ks]
    return {
        "mAP": float(means_kM.mean()),
        "per_k": dict(zip(names, means_kM.mean(1).tolist(), strict=True)),
        "per_class": [None if i is None else float(means_kM[:, i].mean()) for i in shown],
        "costs": {name: float(costs[cost]) for name, cost in zip(names, chosen, strict=True)},
    }


def _best(precisions: np.ndarray) -> list[int]:
    """For each k, the number of the cost with the best mean over classes and draws; the first of equally good ones.

    Draws that leave nothing to validate on are NaN. A k with only such draws takes the cost of the k before it.
    """
    best: list[int] = []
    for table in precisions.swapaxes(0, 1):
        usable = table[np.isfinite(table[..., 0])]
        best.append(int(usable.mean(0).argmax()) if len(usable) else (best or [0])[-1])
    return best


def draw_rows(target_N: np.ndarray, k: int, classes: int, seed: int, draw: int, c: int) -> np.ndarray:
    """Rows of k images of class c and of (classes - 1) k images without it (or all there are), ascending.

    Difficult images are never drawn.
    """
    random = np.random.default_rng((seed, draw, k, c))
    present, absent = np.flatnonzero(target_N == 1), np.flatnonzero(target_N == 0)
    without = random.choice(absent, min(len(absent), (classes - 1) * k), replace=False)
    return np.sort(np.concatenate([random.choice(present, k, replace=False), without]))


def _precisions(
    c: int,
    train_NF: np.ndarray,
    train_NC: np.ndarray,
    test_NF: np.ndarray,
    test_NC: np.ndarray,
    ks: Sequence[int],
    costs: Sequence[float],
    seed: int,
) -> np.ndarray:
    """Average precision (2, k, D, costs) in 0..100 of class c: on the training images left over, and on the test."""
    targets, certain = train_NC[:, c], test_NC[:, c] != -1
    table = np.full((2, len(ks), DRAWS, len(costs)), np.nan)
    for i, k in enumerate(ks):
        for draw in range(DRAWS):
            rows = draw_rows(targets, k, train_NC.shape[1], seed, draw, c)
            left_over = np.setdiff1d(np.flatnonzero(targets != -1), rows)
            weights_FJ, bias_J = _fit(train_NF[rows], targets[rows], costs)
            found_N, found = test_NC[certain, c] == 1, targets[left_over] == 1
            scores_NJ = test_NF[certain] @ weights_FJ + bias_J
            table[1, i, draw] = [100 * average_precision(found_N, scores) for scores in scores_NJ.T]
            if found.any() and not found.all():
                scores_NJ = train_NF[left_over] @ weights_FJ + bias_J
                table[0, i, draw] = [100 * average_precision(found, scores) for scores in scores_NJ.T]
    return table


def _scores(
    c: int,
    train_NF: np.ndarray,
    train_NC: np.ndarray,
    test_NF: np.ndarray,
    ks: Sequence[int],
    costs: Sequence[float],
    seed: int,
) -> np.ndarray:
    """Scores (k, D, N) of the test images for class c, with one cost for each k."""
    scores = np.zeros((len(ks), DRAWS, len(test_NF)), np.float32)
    for i, (k, cost) in enumerate(zip(ks, costs, strict=True)):
        for draw in range(DRAWS):
            rows = draw_rows(train_NC[:, c], k, train_NC.shape[1], seed, draw, c)
            weights_FJ, bias_J = _fit(train_NF[rows], train_NC[rows, c], [cost])
            scores[i, draw] = test_NF @ weights_FJ[:, 0] + bias_J[0]
    return scores


def _fit(rows_BF: np.ndarray, target_B: np.ndarray, costs: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Weights (F, J) and biases (J,) of one SVM for each of J costs."""
    rows, sign = sparse(rows_BF), np.where(target_B == 1, 1, -1)
    with quiet_liblinear():
        fitted = [linear_svm(cost, len(rows_BF)).fit(rows, sign) for cost in costs]
    return np.stack([one.coef_[0] for one in fitted], 1), np.array([one.intercept_[0] for one in fitted])
