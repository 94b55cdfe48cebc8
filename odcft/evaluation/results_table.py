"""The results of an evaluation as a table for people, and as the dict that `--json` prints."""

import math
from typing import Any

import numpy as np

METRICS = {  # protocol to its title and its main figure
    "svm": ("SVM mAP", "mAP"),
    "low_shot": ("Low-shot mAP", "mAP"),
    "linear": ("Linear top-1", "top1"),
    "knn": ("kNN top-1", "top1"),
    "clusters": ("Cluster acc.", "accuracy"),
}
DETAILS: dict[str, list[tuple[str, tuple[str, ...], int]]] = {  # protocol to further figures: title, keys, decimals
    "low_shot": [("  best cost*", ("oracle", "mAP"), 1)],
    "linear": [("  logistic", ("logistic", "top1"), 1)],
    "clusters": [("  purity", ("purity",), 1), ("  NMI", ("nmi",), 2)],
}


def table_lines(results: dict[str, Any]) -> list[str]:
    """The results as a table, before and after if there are both, followed by what explains the figures."""
    rows = []
    compared = "before" in results
    if compared:
        rows.append(f"  {'':<12}{'before':>8}{'after':>8}    change (95 % interval)")
    for protocol, (title, name) in METRICS.items():
        if protocol in results:
            row = _row(results, protocol, title, (name,), 1)
            if compared:
                row += "  ({low:+.1f} … {high:+.1f})".format(**results["change"][protocol])
            rows.append(row)
            rows += [
                _row(results, protocol, *detail)
                for detail in DETAILS.get(protocol, [])
                if detail[1][0] in results[protocol]
            ]
    return rows + _notes(results)


def _row(results: dict[str, Any], protocol: str, title: str, keys: tuple[str, ...], decimals: int) -> str:
    """One figure: before, after and change; or the figure alone."""

    def figure(protocols: dict[str, Any]) -> float:
        value = protocols[protocol]
        for key in keys:
            value = value[key]
        return value

    after = figure(results)
    if "before" not in results:
        return f"  {title:<12}{after:>7.{decimals}f}"
    before = figure(results["before"])
    return f"  {title:<12}{before:>8.{decimals}f}{after:>8.{decimals}f}    {after - before:+.{decimals}f}"


def _notes(results: dict[str, Any]) -> list[str]:
    """Figures for each k, and which classes are left out of a mean."""
    notes = []
    if "low_shot" in results:
        low_shot = results["low_shot"]
        notes.append(f"  Low-shot mAP by images per class: {_by_k(low_shot['per_k'])}")
        if low_shot["too_few"]:
            notes.append(f"    not with {', '.join(low_shot['too_few'])}: {next(iter(low_shot['too_few'].values()))}")
        notes.append("  * with the cost that is best on the test images, as in published results")
    if len(results.get("knn", {}).get("per_k", {})) > 1:
        notes.append(f"  kNN top-1 by neighbours: {_by_k(results['knn']['per_k'])}")
    if run := results.get("clusters", {}).get("run"):
        notes.append(
            f"  Clusters of the run: NMI {run['nmi']:.2f}, purity {run['purity']:.1f}, accuracy {run['accuracy']:.1f} "
            f"({run['k']:,} clusters of {run['images']:,} images)"
        )
    for protocol in ("svm", "low_shot"):
        if protocol in results and (protocol == "svm" or "svm" not in results):  # both leave out the same
            left_out, total = results[protocol]["left_out"], len(results[protocol]["per_class"])
            names = [f"    {name}: {reason}" for name, reason in list(left_out.items())[:10]]
            if left_out:
                title = METRICS[protocol][0]
                notes.append(f"  {title} is the mean over {total - len(left_out):,} of {total:,} classes. Left out:")
                notes += [*names, f"    and {len(left_out) - 10:,} more"][: len(left_out) if len(left_out) < 11 else 11]
    return notes


def _by_k(per_k: dict[str, float]) -> str:
    return " · ".join(f"{k}: {value:.1f}" for k, value in per_k.items())


def summary(results: dict[str, Any]) -> str:
    """One line that says how many classes and images the results come from."""
    images = f"{results['train_images']:,} images to train on, {results['test_images']:,} to test on"
    return f"Figures     {len(results['classes']):,} classes, {images}"


def json_values(results: Any) -> Any:
    """The results as plain Python numbers, NaN as null, without the arrays that only the intervals need."""
    if isinstance(results, dict):
        return {
            str(name): json_values(value)
            for name, value in results.items()
            if name not in ("scores", "predicted", "correct")
        }
    if isinstance(results, (list, tuple)):
        return [json_values(value) for value in results]
    if isinstance(results, np.generic):
        results = results.item()
    return None if isinstance(results, float) and not math.isfinite(results) else results
