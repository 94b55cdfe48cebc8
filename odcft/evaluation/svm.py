"""VOC07 SVM: a linear SVM a class on frozen features, mean average precision
(Goyal et al. 2019, as OpenSelfSup runs it).

Shapes: N images, F features, C classes. A target is 1 (present), 0 (absent) or -1 (difficult).
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from odcft.distributed import stop_signals
from odcft.errors import OdcftError

COSTS = (1.0, 10.0, 100.0, *(0.5**k for k in range(4, 20)))
DUAL_ROWS = 10_000  # above, the primal solver: the same optimum, and far faster where there are more rows than features
WORTH = 2e7  # rows x features x classes: about 20 seconds, where processes, which take two to start, are worth it
FOLDS = 3  # of the cross-validation; as many as there are images of the class, where these are fewer


def voc07_svm(
    train_NF: np.ndarray,
    train_NC: np.ndarray,
    test_NF: np.ndarray,
    test_NC: np.ndarray,
    costs: tuple[float, ...] = COSTS,
    left_out: Mapping[int, str] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Train on one half, test on the other; the cost of each class is chosen by three-fold cross-validation.

    Features are brought to unit length. Difficult images count as negatives in training and are left out of the test.
    A class with two training images is cross-validated in two folds. One with fewer, or that no test image has (or
    every one), cannot be measured: it is left out of the mean.

    Args:
        train_NF, test_NF: float, finite.
        train_NC, test_NC: targets.
        costs: the SVM's C, tried for each class.
        left_out: classes that are not to count, besides those that cannot be measured; and why.
        advance: called with how many more classes are done.

    Returns:
        `mAP` in 0..100 over the classes that count, `per_class` average precisions in 0..100 and `costs` chosen, None
        for a class that does not count; `left_out`, those and why; and `scores` (N, C) of the test images, zero for
        a class that does not count.

    Raises:
        OdcftError: no class counts.
    """
    from joblib import Parallel, cpu_count, delayed

    reasons = {**unmeasurable(train_NC, test_NC), **(left_out or {})}
    C = train_NC.shape[1]
    if len(reasons) == C:
        raise OdcftError(
            f"--protocol svm: no class can be measured; the first has {reasons[0]}. "
            "Give more labelled images, or choose --protocol knn."
        )
    train, test = _unit_length(train_NF), _unit_length(test_NF)

    counted = [c for c in range(C) if c not in reasons]
    advance(len(reasons))
    # Not threads: they would draw liblinear's random numbers from one stream, and no two runs would be the same.
    jobs = min(cpu_count(), len(counted)) if train.size * len(counted) > WORTH else 1
    fitted = Parallel(n_jobs=jobs, return_as="generator")(
        delayed(_fit)(train, np.where(train_NC[:, c] == 1, 1, -1), test, costs, jobs > 1) for c in counted
    )
    per_class: list[float | None] = [None] * C
    chosen: list[float | None] = [None] * C
    scores_NC = np.zeros((len(test), C))
    for c, (cost, scores) in zip(counted, fitted, strict=True):
        certain = test_NC[:, c] != -1
        per_class[c] = 100 * average_precision(test_NC[certain, c] == 1, scores[certain])
        chosen[c], scores_NC[:, c] = cost, scores
        advance(1)
    return {
        "mAP": float(np.mean([per_class[c] for c in counted])),
        "per_class": per_class,
        "costs": chosen,
        "left_out": dict(sorted(reasons.items())),
        "scores": scores_NC,
    }


def unmeasurable(train_NC: np.ndarray, test_NC: np.ndarray) -> dict[int, str]:
    """The classes that no SVM can be trained or tested for, and what each has too little of."""
    reasons = {}
    for c in range(train_NC.shape[1]):
        present, tested = train_NC[:, c] == 1, test_NC[test_NC[:, c] != -1, c] == 1
        if present.sum() < 2:
            reasons[c] = f"{_images(present.sum())} to learn from, where 2 are needed"
        elif (~present).sum() < 2:
            reasons[c] = f"{_images((~present).sum())} without it to learn from, where 2 are needed"
        elif not tested.any():
            reasons[c] = "no image to test on"
        elif tested.all():
            reasons[c] = "no image without it to test on"
    return reasons


def average_precision(present_N: np.ndarray, scores_N: np.ndarray) -> float:
    """Area under the precision envelope at all recall points (VOC 2010 and later), 0..1."""
    return ranked_precision(present_N[np.argsort(-scores_N, kind="stable")])


def ranked_precision(present_N: np.ndarray) -> float:
    """The same of images that are in the order of their scores, highest first."""
    hits = np.cumsum(present_N)
    precision = hits / np.arange(1, len(present_N) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[present_N].sum() / max(1, hits[-1]))


def _fit(
    train: np.ndarray, sign: np.ndarray, test: np.ndarray, costs: tuple[float, ...], worker: bool = False
) -> tuple[float, np.ndarray]:
    """The cost that cross-validation chooses, and the scores of the test images at that cost."""
    from scipy.sparse import csr_matrix
    from sklearn import config_context
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import average_precision_score
    from sklearn.model_selection import StratifiedKFold
    from sklearn.svm import LinearSVC

    if worker:
        stop_signals.ignore_in_worker()

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

    splitter = StratifiedKFold(min(FOLDS, int((sign == 1).sum()), int((sign == -1).sum())))
    # Sparse, though full: liblinear copies either into its own form, and this one in a third of the time.
    folds = [(csr_matrix(train[fit]), sign[fit], train[held], sign[held]) for fit, held in splitter.split(train, sign)]
    with warnings.catch_warnings(), config_context(assume_finite=True, skip_parameter_validation=True):
        warnings.simplefilter("ignore", ConvergenceWarning)  # at high costs 2,000 iterations are the protocol

        def precision(cost: float, fit: Any, fit_N: np.ndarray, held_NF: np.ndarray, held_N: np.ndarray) -> float:
            return average_precision_score(held_N, machine(cost).fit(fit, fit_N).decision_function(held_NF))

        means = [np.mean([precision(cost, *fold) for fold in folds]) for cost in costs]
        cost = costs[int(np.argmax(means))]  # the first of several that are equally good
        return float(cost), machine(cost).fit(train, sign).decision_function(test)


def _unit_length(features: np.ndarray) -> np.ndarray:
    features = features.astype(np.float64)
    return features / (np.linalg.norm(features, axis=1, keepdims=True) + 1e-5)


def _images(count: int) -> str:
    return "no image" if count == 0 else "1 image" if count == 1 else f"{count:,} images"
