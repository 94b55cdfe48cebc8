"""What an evaluation says: lines for people, and the dict that `--json` prints."""

import math
from typing import Any

import numpy as np

FIGURES = {"svm": ("SVM mAP", "mAP"), "knn": ("kNN top-1", "top1")}


def lines(results: dict[str, Any]) -> list[str]:
    """The table of an evaluation: figures, before and after where there are both; below, the classes left out."""
    rows = []
    compared = "before" in results
    if compared:
        rows.append(f"  {'':<12}{'before':>8}{'after':>8}    change (95 % interval)")
    for protocol, (title, name) in FIGURES.items():
        if protocol in results:
            figure = results[protocol][name]
            row = f"  {title:<12}{figure:>{8 if compared else 7}.1f}"
            if compared:
                change = results["change"][protocol]
                row = f"  {title:<12}{results['before'][protocol][name]:>8.1f}{figure:>8.1f}"
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
    """What the figures come from, in a line."""
    images = f"{results['train_images']:,} images to learn from, {results['test_images']:,} to test on"
    return f"Figures     {len(results['classes']):,} classes, {images}"


def public(results: Any) -> Any:
    """The results as plain numbers, without the arrays that only the intervals need: what `--json` prints."""
    if isinstance(results, dict):
        return {str(name): public(value) for name, value in results.items() if name not in ("scores", "predicted")}
    if isinstance(results, (list, tuple)):
        return [public(value) for value in results]
    if isinstance(results, np.generic):
        results = results.item()
    return None if isinstance(results, float) and not math.isfinite(results) else results
