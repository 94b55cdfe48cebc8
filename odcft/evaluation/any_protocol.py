"""`evaluate` with any protocols: those that need labels, `unlabelled`, or both in one call."""

from collections.abc import Sequence
from typing import Any

from odcft.evaluation.comparison import evaluate
from odcft.evaluation.protocols import UNLABELLED, with_labels
from odcft.evaluation.results_table import report_lines
from odcft.evaluation.unlabelled_comparison import evaluate_unlabelled
from odcft.evaluation.unlabelled_table import unlabelled_lines


def evaluate_any(
    ckpt: str | Sequence[str],
    data: str,
    test: str | None,
    protocols: Sequence[str],
    *,
    layers: str = "last",
    per_class: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Run these protocols.

    Args:
        ckpt, data, test, layers, per_class: as for `comparison.evaluate`.
        protocols: as `check_protocols` returns them.
        options: what both `comparison.evaluate` and `evaluate_unlabelled` take.

    Returns:
        What these return, the latter as `unlabelled`; how many images have no label is then `unlabelled_images`.
        Empty on all ranks but the first.

    Raises:
        OdcftError: as they do.
    """
    labelled = with_labels(protocols, features=False, test=test, layers=layers)
    found = evaluate_unlabelled(ckpt, data, **options) if UNLABELLED in protocols else {}
    results = evaluate(ckpt, data, test, labelled, layers=layers, per_class=per_class, **options) if labelled else {}
    if not found:
        return results
    return results | ({"unlabelled_images": results["unlabelled"]} if results else {}) | {"unlabelled": found}


def all_lines(results: dict[str, Any], protocols: Sequence[str]) -> list[str]:
    """What `evaluate` prints of these results."""
    if UNLABELLED not in protocols:
        return report_lines(results)
    labelled = report_lines(results | {"unlabelled": results["unlabelled_images"]}) if len(protocols) > 1 else []
    return labelled + unlabelled_lines(results["unlabelled"])
