"""The figures of each class: where a backbone is good, and where fine-tuning helped.

Shapes: N images, C classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from odcft.evaluation.protocols import class_numbers

TITLES = {"svm": "SVM AP", "low_shot": "low-shot AP", "linear": "linear", "knn": "kNN", "semi": "semi 10 %"}


def add_per_class(
    results: dict[str, Any], classes: Sequence[str], train_NC: np.ndarray, test_NC: np.ndarray
) -> dict[str, Any]:
    """The results with `per_class`, also in each of their `columns`, `members` and `before`.

    Args:
        results: as `evaluate` returns them.
        classes: names.
        train_NC, test_NC: targets of the images that were learned from and tested on.

    Returns:
        `per_class` maps each class to the number of images that have it (`train_images`, `test_images`) and its figure
        by protocol: average precision (`svm`, `low_shot`; None if the class does not count) or accuracy (`linear`,
        `knn`, `semi`; None without a test image), in 0..100.
    """
    results = dict(results)
    for part in ("columns", "members"):
        if part in results:
            results[part] = [add_per_class(one, classes, train_NC, test_NC) for one in results[part]]
    if "before" in results:
        results["before"] = add_per_class(results["before"], classes, train_NC, test_NC)
    figures = {protocol: _figures(protocol, results[protocol], test_NC) for protocol in TITLES if protocol in results}
    counts = zip((train_NC == 1).sum(0).tolist(), (test_NC == 1).sum(0).tolist(), strict=True)
    return results | {
        "per_class": {
            name: {"train_images": train, "test_images": test, **{one: values[c] for one, values in figures.items()}}
            for c, (name, (train, test)) in enumerate(zip(classes, counts, strict=True))
        }
    }


def _figures(protocol: str, result: dict[str, Any], test_NC: np.ndarray) -> list[float | None]:
    """A protocol's figure for each class."""
    if "per_class" in result:
        return result["per_class"]
    if protocol == "semi":
        result = list(result["per_fraction"].values())[-1]
    correct_N, class_N = result["predicted"] == class_numbers(test_NC, protocol), class_numbers(test_NC, protocol)
    of_class = [correct_N[class_N == c] for c in range(test_NC.shape[1])]
    return [100 * float(one.mean()) if len(one) else None for one in of_class]


def per_class_lines(results: dict[str, Any]) -> list[str]:
    """A row for each class; of a RUN, the figures before and after."""
    per_class, before = results["per_class"], results.get("before", {}).get("per_class", {})
    protocols = [name for name in TITLES if any(name in one for one in per_class.values())]
    wide = min(32, max(map(len, per_class)))
    cell = 17 if before else 13
    lines = [f"  {'':<{wide}}{'train':>9}{'test':>8}" + "".join(f"{TITLES[name]:>{cell}}" for name in protocols)]
    for name, row in per_class.items():
        cells = ""
        for protocol in protocols:
            values = [one[name][protocol] for one in (before, per_class) if one]
            cells += f"{' -> '.join('none' if value is None else f'{value:.1f}' for value in values):>{cell}}"
        short = name if len(name) <= wide else "…" + name[1 - wide :]
        lines.append(f"  {short:<{wide}}{row['train_images']:>9,}{row['test_images']:>8,}{cells}")
    return lines
