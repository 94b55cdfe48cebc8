"""The results of an evaluation as a table for people, and as the dict that `--json` prints."""

import math
from typing import Any

import numpy as np

METRICS = {  # protocol to its title and its main figure
    "svm": ("SVM mAP", "mAP"),
    "low_shot": ("Low-shot mAP", "mAP"),
    "linear": ("Linear top-1", "top1"),
    "knn": ("kNN top-1", "top1"),
    "semi": ("Semi 10 %", "top1"),
    "clusters": ("Cluster acc.", "accuracy"),
}
DETAILS: dict[str, list[tuple[str, tuple[str, ...], int]]] = {  # protocol to further figures: title, keys, decimals
    "low_shot": [("  best cost*", ("oracle", "mAP"), 1)],
    "linear": [("  logistic", ("logistic", "top1"), 1)],
    "semi": [
        ("  top-5", ("per_fraction", "10%", "top5"), 1),
        ("  with 1 %", ("per_fraction", "1%", "top1"), 1),
        ("  … top-5", ("per_fraction", "1%", "top5"), 1),
    ],
    "clusters": [("  purity", ("purity",), 1), ("  NMI", ("nmi",), 2)],
}


def report_lines(results: dict[str, Any]) -> list[str]:
    """All that `evaluate` prints at its end."""
    from odcft.evaluation.per_class import per_class_lines
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
        for one in compared:
            said = verdict_line(one["change"], tested, reference["source"])
            lines.append(f"{one['source']}: {said[0].lower()}{said[1:]}")
    if "per_class" in results:
        for one in results.get("columns", [results]):
            lines += [f"{one['source']} by class:" if "source" in one else "By class:", *per_class_lines(one)]
    if "change" in results and "columns" not in results:
        lines.append(verdict_line(results["change"], tested, "the checkpoint it was started from"))
    return lines


def table_lines(results: dict[str, Any]) -> list[str]:
    """The results as a table, before and after if there are both, followed by what explains the figures."""
    if "columns" in results:
        return _side_by_side(results["columns"])
    rows = []
    compared = "before" in results
    if compared:
        rows.append(f"  {'':<12}{'before':>8}{'after':>8}    change (95 % interval)")
    for protocol, (title, name) in METRICS.items():
        if protocol in results:
            rows.append(_row(results, protocol, title, (name,), 1))
            rows += [
                _row(results, protocol, *detail)
                for detail in DETAILS.get(protocol, [])
                if _figure(results[protocol], detail[1]) is not None
            ]
    return rows + _layer_rows(results) + _notes(results)


def _row(results: dict[str, Any], protocol: str, title: str, keys: tuple[str, ...], decimals: int) -> str:
    """One figure: before, after and change, with its interval if it has one; or the figure alone."""
    after = _figure(results[protocol], keys)
    if "before" not in results:
        return f"  {title:<12}{after:>7.{decimals}f}"
    before = _figure(results["before"][protocol], keys)
    row = f"  {title:<12}{before:>8.{decimals}f}{after:>8.{decimals}f}    {after - before:+.{decimals}f}"
    change = results["change"][protocol] if keys == (METRICS[protocol][1],) else None
    if keys[-1] == "top1" and keys[0] == "per_fraction":
        change = _figure(results["change"][protocol], keys[:-1])
    return row + ("  ({low:+.1f} … {high:+.1f})".format(**change) if change else "")


def _figure(values: Any, keys: tuple[str, ...]) -> Any:
    """What is under these keys; None if nothing is."""
    for key in keys:
        if key not in values:
            return None
        values = values[key]
    return values


def _notes(results: dict[str, Any]) -> list[str]:
    """Figures for each k, and which classes are left out of a mean."""
    notes = []
    if "low_shot" in results:
        low_shot = results["low_shot"]
        notes.append(f"  Low-shot mAP by images per class: {_by_k(low_shot['per_k'])}")
        if low_shot["too_few"]:
            why = next(iter(low_shot["too_few"].values()))
            notes.append(f"    left out: {', '.join(low_shot['too_few'])}, because {why}")
        notes.append("  * with the SVM cost that is best on the test images, as published results choose it")
    if len(results.get("knn", {}).get("per_k", {})) > 1:
        notes.append(f"  kNN top-1 by neighbours: {_by_k(results['knn']['per_k'])}")
    notes += _semi_notes(results["semi"]["per_fraction"]) if "semi" in results else []
    if run := results.get("clusters", {}).get("run"):
        notes.append(
            f"  Clusters of the RUN: NMI {run['nmi']:.2f}, purity {run['purity']:.1f}, accuracy {run['accuracy']:.1f} "
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


def _semi_notes(fractions: dict[str, Any]) -> list[str]:
    """With how many labels, and how, the network was fine-tuned."""
    notes = []
    for name, result in fractions.items():
        how = result["setting"]
        rates = f"learning rate {how['lr']:g} (head: {how['head_lr']:g} times as high), divided by 5"
        notes.append(
            f"  Semi {name[:-1]} %: {result['images']:,} labels, {how['name']} setting: {how['epochs']:,} epochs, "
            f"batches of {how['batch']}, {how['optimizer'].upper()}, {rates} after 60 % and after 80 % of the steps"
        )
        if result["few"]:
            notes.append(f"    one image of each class where {name[:-1]} % would be less than one")
    return notes


def _by_k(per_k: dict[str, float]) -> str:
    return " · ".join(f"{k}: {value:.1f}" for k, value in per_k.items())


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
    for column in columns:
        layers = {title: column[protocol].get("layer") for protocol, title, _ in metrics}
        if any(layers.values()):
            chosen = ", ".join(f"{title} of {layer}" for title, layer in layers.items() if layer)
            rows.append(f"  {column['source']}: {chosen}")
    return rows


def _layer_rows(results: dict[str, Any]) -> list[str]:
    """The figures of all layers, and which of them each protocol's result is of."""
    rows = []
    for protocol, (title, name) in METRICS.items():
        layers = results.get(protocol, {}).get("per_layer")
        if not layers or "layer" not in results[protocol]:
            continue
        before = results.get("before", {}).get(protocol, {}).get("per_layer", {})
        chosen = " · cv: by cross-validation on the training images" if "cv" in next(iter(layers.values())) else ""
        rows.append(f"  {title} of every layer{', before and after' if before else ''}{chosen}")
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
            f"    {f'{when}: ' if when else ''}the {title} above is that of {_layer(chosen)}; on the test images "
            f"{_layer(best['layer'])} is best ({best[name]:.1f}), which published tables give"
        )
    return rows


def _layer(name: str) -> str:
    return "the last layer" if name == "last" else name


def summary(results: dict[str, Any]) -> str:
    """One line that says how many classes and images the results come from."""
    images = f"{results['train_images']:,} images to train on, {results['test_images']:,} to test on"
    if left_out := results.get("images", 0) - results["train_images"] - results["test_images"]:
        images += f", {left_out:,} left out" if left_out > 0 else ""
    seen = f" · {results['view']['size']} pixels" if "view" in results else ""
    return f"Figures     {len(results['classes']):,} classes, {images}{seen}"


def _holds_arrays(value: Any) -> bool:
    """Whether it is an array, or a dict of them, and not the figures of a class that happens to have such a name."""
    return isinstance(value, np.ndarray) or (
        isinstance(value, dict) and all(isinstance(one, np.ndarray) for one in value.values())
    )


def json_values(results: Any) -> Any:
    """The results as plain Python numbers, NaN as null, without the arrays that only the intervals need."""
    if isinstance(results, dict):
        return {
            str(name): json_values(value)
            for name, value in results.items()
            if not (name in ("scores", "predicted", "correct") and _holds_arrays(value))
        }
    if isinstance(results, (list, tuple)):
        return [json_values(value) for value in results]
    if isinstance(results, np.generic):
        results = results.item()
    return None if isinstance(results, float) and not math.isfinite(results) else results
