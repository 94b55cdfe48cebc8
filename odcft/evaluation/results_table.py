"""The results of an evaluation as a table for people, and as the dict that `--json` prints."""

import math
from typing import Any

import numpy as np

METRICS = {"svm": ("SVM mAP", "mAP"), "knn": ("kNN top-1", "top1")}


def table_lines(results: dict[str, Any]) -> list[str]:
    """The results as a table, before and after if there are both, followed by the classes left out of the mean."""
    rows = []
    compared = "before" in results
    if compared:
        rows.append(f"  {'':<12}{'before':>8}{'after':>8}    change (95 % interval)")
    for protocol, (title, name) in METRICS.items():
        if protocol in results:
            value = results[protocol][name]
            row = f"  {title:<12}{value:>{8 if compared else 7}.1f}"
            if compared:
                change = results["change"][protocol]
                row = f"  {title:<12}{results['before'][protocol][name]:>8.1f}{value:>8.1f}"
                row += f"    {change['change']:+.1f}  ({change['low']:+.1f} … {change['high']:+.1f})"
            rows.append(row)
    left_out = results.get("svm", {}).get("left_out", {})
    if left_out:
        total = len(results["svm"]["per_class"])
        rows.append(f"  SVM mAP is the mean over {total - len(left_out):,} of {total:,} classes. Left out:")
        rows += [f"    {name}: {reason}" for name, reason in list(left_out.items())[:10]]
        rows += [f"    and {len(left_out) - 10:,} more" if len(left_out) > 10 else ""][: len(left_out) > 10]
    return rows


def summary(results: dict[str, Any]) -> str:
    """One line that says how many classes and images the results come from."""
    images = f"{results['train_images']:,} images to train on, {results['test_images']:,} to test on"
    return f"Figures     {len(results['classes']):,} classes, {images}"


def json_values(results: Any) -> Any:
    """The results as plain Python numbers, NaN as null, without the arrays that only the intervals need."""
    if isinstance(results, dict):
        return {str(name): json_values(value) for name, value in results.items() if name not in ("scores", "predicted")}
    if isinstance(results, (list, tuple)):
        return [json_values(value) for value in results]
    if isinstance(results, np.generic):
        results = results.item()
    return None if isinstance(results, float) and not math.isfinite(results) else results
