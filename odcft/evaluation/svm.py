"""VOC07 SVM: one linear SVM per class on frozen features, scored by mean average precision.

The protocol is that of Goyal et al. 2019, as OpenSelfSup runs it.

Shapes: N images, F features, C classes. A target is 1 (present), 0 (absent) or -1 (difficult).
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from odcft.distributed import stop_signals
from odcft.errors import OdcftError

COSTS = (1.0, 10.0, 100.0, *(0.5**k for k in range(4, 20)))
DUAL_ROWS = 10_000  # with more rows, the primal solver: the same optimum, far faster with more rows than features
PARALLEL_ABOVE = 8e6  # rows x features x classes: 10 to 20 s of work, so processes, which take 2 s to start, pay off
FOLDS = 3  # of the cross-validation; fewer if the class has fewer images


def voc07_svm(
    train_NF: np.ndarray,
    train_NC: np.ndarray,
    test_NF: np.ndarray,
    test_NC: np.ndarray,
    costs: tuple[float, ...] = COSTS,
    left_out: Mapping[int, str] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Train and test one SVM per class, with its cost chosen by three-fold cross-validation.

    Features are scaled to unit length. Difficult images count as negatives in training and are left out of the test.
    A class with two training images is cross-validated in two folds. A class with fewer, or that no test image has (or
    all have), cannot be measured and is left out of the mean.

    Args:
        train_NF, test_NF: float, finite.
        train_NC, test_NC: targets.
        costs: values of the SVM's C to try for each class.
        left_out: classes not to count, besides those that cannot be measured, and why.
        advance: called with the number of classes just finished.

    Returns:
        `mAP` in 0..100 over the classes that count; `per_class` average precisions in 0..100 and the `costs` chosen,
        None for a class that does not count; `left_out`, the classes that do not count and why; `cv`, the mean average
        precision of the cross-validation on the training images; and the `scores` (N, C) of the test images, zero for a
        class that does not count.

    Raises:
        OdcftError: no class counts.
    """
    reasons = {**unmeasurable_classes(train_NC, test_NC), **(left_out or {})}
    C = train_NC.shape[1]
    if len(reasons) == C:
        raise OdcftError(
            f"--protocol svm: no class can be measured; the first has {reasons[0]}. "
            "Give more labelled images, or choose --protocol knn."
        )
    train, test = in_span_of_first(unit_length(train_NF), unit_length(test_NF))

    measured = [c for c in range(C) if c not in reasons]
    advance(len(reasons))
    fitted = for_each_class(_fit, (train, train_NC, test, costs), measured, train.size * len(measured))
    per_class: list[float | None] = [None] * C
    chosen: list[float | None] = [None] * C
    scores_NC, validated = np.zeros((len(test), C)), []
    for c, (cost, precision, scores) in zip(measured, fitted, strict=True):
        certain = test_NC[:, c] != -1
        per_class[c] = 100 * average_precision(test_NC[certain, c] == 1, scores[certain])
        chosen[c], scores_NC[:, c] = cost, scores
        validated.append(100 * precision)
        advance(1)
    return {
        "mAP": float(np.mean([per_class[c] for c in measured])),
        "per_class": per_class,
        "costs": chosen,
        "left_out": dict(sorted(reasons.items())),
        "cv": float(np.mean(validated)),
        "scores": scores_NC,
    }


def unmeasurable_classes(train_NC: np.ndarray, test_NC: np.ndarray) -> dict[int, str]:
    """The classes that no SVM can be trained or tested for, and why."""
    reasons = {}
    for c in range(train_NC.shape[1]):
        present, tested = train_NC[:, c] == 1, test_NC[test_NC[:, c] != -1, c] == 1
        if present.sum() < 2:
            reasons[c] = f"{_no_or_1(present.sum())} training image, but 2 are needed"
        elif (~present).sum() < 2:
            reasons[c] = f"{_no_or_1((~present).sum())} training image without it, but 2 are needed"
        elif not tested.any():
            reasons[c] = "no test image"
        elif tested.all():
            reasons[c] = "no test image without it"
    return reasons


def average_precision(present_N: np.ndarray, scores_N: np.ndarray) -> float:
    """Area under the precision envelope at all recall points (VOC 2010 and later), 0..1."""
    return average_precision_of_ranking(present_N[np.argsort(-scores_N, kind="stable")])


def average_precision_of_ranking(present_N: np.ndarray) -> float:
    """Average precision of images already sorted by score, highest first."""
    hits = np.cumsum(present_N)
    precision = hits / np.arange(1, len(present_N) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[present_N].sum() / max(1, hits[-1]))


def for_each_class(
    function: Callable[..., Any], arguments: tuple[Any, ...], classes: Sequence[int], work: float
) -> Iterable[Any]:
    """The results of function(c, *arguments) for these classes, in order; computed by several processes if worth it.

    `work` is rows x features x classes of the SVM's cross-validation, or what takes as long.
    """
    from joblib import Parallel, cpu_count, delayed

    # Processes, not threads: threads would share liblinear's random numbers, and no two runs would be the same.
    jobs = min(cpu_count(), len(classes)) if work > PARALLEL_ABOVE else 1
    calls = (delayed(_call)(function, jobs > 1, c, *arguments) for c in classes)
    return Parallel(n_jobs=jobs, return_as="generator")(calls)


def _call(function: Callable[..., Any], in_worker: bool, *arguments: Any) -> Any:
    if in_worker:
        stop_signals.ignore_signals_in_worker()
    return function(*arguments)


def linear_svm(cost: float, rows: int) -> Any:
    """The SVM of the protocol, to be fitted to this many rows."""
    from sklearn.svm import LinearSVC

    return LinearSVC(
        C=cost,
        class_weight={1: 2, -1: 1},
        intercept_scaling=1.0,
        penalty="l2",
        loss="squared_hinge",
        tol=1e-4,
        dual=rows <= DUAL_ROWS,
        max_iter=2000,
        random_state=0,
    )


@contextmanager
def quiet_liblinear() -> Iterator[None]:
    """Fit without checks of finite numbers, and without the warning of an SVM that has not converged."""
    from sklearn import config_context
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(), config_context(assume_finite=True, skip_parameter_validation=True):
        warnings.simplefilter("ignore", ConvergenceWarning)  # the protocol stops at 2,000 iterations, converged or not
        yield


def sparse(rows_BF: np.ndarray) -> Any:
    """The rows as a sparse matrix, although they are full: liblinear copies either kind, a sparse one much faster."""
    from scipy.sparse import csr_matrix

    return csr_matrix(rows_BF)


def _fit(
    c: int, train: np.ndarray, train_NC: np.ndarray, test: np.ndarray, costs: tuple[float, ...]
) -> tuple[float, float, np.ndarray]:
    """Choose the cost of class c by cross-validation; return it, its precision and the scores of the test images."""
    from sklearn.metrics import average_precision_score
    from sklearn.model_selection import StratifiedKFold

    sign = np.where(train_NC[:, c] == 1, 1, -1)
    splitter = StratifiedKFold(min(FOLDS, int((sign == 1).sum()), int((sign == -1).sum())))
    folds = [(sparse(train[fit]), sign[fit], train[held], sign[held]) for fit, held in splitter.split(train, sign)]

    def precision(cost: float, fit: Any, fit_N: np.ndarray, held_NF: np.ndarray, held_N: np.ndarray) -> float:
        svm = linear_svm(cost, len(train)).fit(fit, fit_N)
        return average_precision_score(held_N, svm.decision_function(held_NF))

    with quiet_liblinear():
        means = [np.mean([precision(cost, *fold) for fold in folds]) for cost in costs]
        cost = costs[int(np.argmax(means))]  # the first of several equally good ones
        scores = linear_svm(cost, len(train)).fit(train, sign).decision_function(test)
        return float(cost), float(max(means)), scores


def unit_length(features_NF: np.ndarray) -> np.ndarray:
    """The features in float64, each divided by its length (plus 1e-5, as the reference scripts have it)."""
    features_NF = features_NF.astype(np.float64)
    return features_NF / (np.linalg.norm(features_NF, axis=1, keepdims=True) + 1e-5)


def in_span_of_first(train_NF: np.ndarray, test_NF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in coordinates of the space that the training rows span, if these are fewer than the features.

    An SVM's weights lie in that space, so every fit takes the same steps on N instead of F numbers an image.
    """
    if train_NF.shape[1] <= len(train_NF):
        return train_NF, test_NF
    basis_FN = np.linalg.qr(train_NF.T)[0]
    return train_NF @ basis_FN, test_NF @ basis_FN


def _no_or_1(count: int) -> str:
    return "1" if count else "no"
