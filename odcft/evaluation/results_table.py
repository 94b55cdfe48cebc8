"""The results of an evaluation as a table for people, and as the dict that `--json` prints."""

import math
from typing import Any

import numpy as np

METRICS = {"svm": ("SVM mAP", "mAP"), "knn": ("kNN top-1", "top1")}


def report_lines(results: dict[str, Any]) -> list[str]:
    """All that `evaluate` prints at its end."""
    from odcft.evaluation.verdict import verdict_line

    members, tested = results.get("members", []), results["test_images"]
    lines = [summary(results)]
    if members:
        lines.append(f"All {len(members)} members side by side:")
    lines += table_lines(results)
    for member in members:
        lines += [f"{member['source']} alone:", *table_lines(member)]
    if "columns" in results:
        *compared, reference = results["columns"]
        lines += [f"{one['source']}: {verdict_line(one['change'], tested, reference['source'])}" for one in compared]
    elif "change" in results:
        lines.append(verdict_line(results["change"], tested, "the checkpoint it was started from"))
    return lines


def table_lines(results: dict[str, Any]) -> list[str]:
    """The results as a table, before and after if there are both, followed by layers and the classes left out."""
    columns = results.get("columns")
    if columns:
        rows = _side_by_side(columns)
    else:
        rows = _before_and_after(results) if "before" in results else _one_column(results)
        rows += _layer_rows(results)
    left_out = results.get("svm", {}).get("left_out", {})
    if left_out:
        total = len(results["svm"]["per_class"])
        rows.append(f"  SVM mAP is the mean over {total - len(left_out):,} of {total:,} classes. Left out:")
        rows += [f"    {name}: {reason}" for name, reason in list(left_out.items())[:10]]
        rows += [f"    and {len(left_out) - 10:,} more" if len(left_out) > 10 else ""][: len(left_out) > 10]
    return rows


def _one_column(results: dict[str, Any]) -> list[str]:
    return [
        f"  {title:<12}{results[protocol][name]:>7.1f}"
        for protocol, (title, name) in METRICS.items()
        if protocol in results
    ]


def _before_and_after(results: dict[str, Any]) -> list[str]:
    rows = [f"  {'':<12}{'before':>8}{'after':>8}    change (95 % interval)"]
    for protocol, (title, name) in METRICS.items():
        if protocol in results:
            before, after = results["before"][protocol][name], results[protocol][name]
            rows.append(f"  {title:<12}{before:>8.1f}{after:>8.1f}    {_interval(results['change'][protocol])}")
    return rows


def _interval(change: dict[str, float]) -> str:
    return f"{change['change']:+.1f}  ({change['low']:+.1f} … {change['high']:+.1f})"


def _side_by_side(columns: list[dict[str, Any]]) -> list[str]:
    """A row for each checkpoint, with its change against the last one."""
    wide = min(48, max(len(column["source"]) for column in columns))
    metrics = [(protocol, *METRICS[protocol]) for protocol in METRICS if protocol in columns[0]]
    rows = ["  " + " " * wide + "".join(f"  {title:>9}  {'change (95 % interval)':<24}" for _, title, _ in metrics)]
    for column in columns:
        source = column["source"] if len(column["source"]) <= wide else "…" + column["source"][1 - wide :]
        cells = ""
        for protocol, _, name in metrics:
            change = _interval(column["change"][protocol]) if "change" in column else ""
            cells += f"  {column[protocol][name]:>9.1f}  {change:<24}"
        rows.append(f"  {source:<{wide}}{cells}".rstrip())
    return rows


def _layer_rows(results: dict[str, Any]) -> list[str]:
    """The figures of all layers, and which of them each protocol's result is of."""
    rows = []
    for protocol, (title, name) in METRICS.items():
        layers = results.get(protocol, {}).get("per_layer")
        if not layers or "layer" not in results[protocol]:
            continue
        before = results.get("before", {}).get(protocol, {}).get("per_layer", {})
        rows.append(f"  {title} by layer{' (before, after)' if before else ''}; cv: on the training images")
        for layer, figures in layers.items():
            old = f"{before[layer][name]:>8.1f}" if layer in before else ""
            cv = f"  cv {figures['cv']:>5.1f}" if "cv" in figures else ""
            rows.append(f"    {layer:<24}{old}{figures[name]:>8.1f}{cv}")
        rows += _chosen_rows(results, protocol, title, name)
    return rows


def _chosen_rows(results: dict[str, Any], protocol: str, title: str, name: str) -> list[str]:
    """Which layer the figure above is of, and the one that published tables would give."""
    rows = []
    columns = [("before", results["before"]), ("after", results)] if "before" in results else [("", results)]
    for when, column in columns:
        chosen, best = column[protocol]["layer"], column[protocol]["best_on_test"]
        rows.append(
            f"    {f'{when}: ' if when else ''}{title} above is of {chosen}; chosen on the test images, as published "
            f"tables do: {best['layer']}, {best[name]:.1f}"
        )
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
