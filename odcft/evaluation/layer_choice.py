"""Run the protocols on every layer of a network, and choose one without looking at the test images.

Published tables give each network the layer that is best on the test set; that flatters, so it is only shown beside.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from odcft.backbone.layers import LAST
from odcft.errors import OdcftError
from odcft.evaluation.protocols import ON_IMAGES, Split, class_numbers, evaluate_arrays
from odcft.evaluation.results_table import METRICS

LAYERS = ("last", "all", "best")
CHOOSING = ("svm", "knn")  # protocols that choose a layer; the others take that of the first of these
FOLDS = 3  # of the cross-validation that chooses it


def check_layers(layers: str) -> str:
    """Return `layers` if it is one of LAYERS.

    Raises:
        OdcftError: it is not.
    """
    if layers not in LAYERS:
        raise OdcftError(f"--layers {layers}: choose last, all or best.")
    return layers


def evaluate_layers(
    splits: Mapping[str, Split], protocols: Sequence[str], layers: str, progress: Any = None, suffix: str = ""
) -> dict[str, Any]:
    """Run every protocol on every layer.

    Args:
        splits: features by layer, in the order of the network.
        protocols: some of PROTOCOLS.
        layers: which layer the results are of: `last`, or with `best` the one that cross-validation on the training
            images prefers; `all` is `last`, with the table of all layers beside it.
        progress: where to report.
        suffix: of the titles of progress bars.

    Returns:
        The dict of `evaluate_arrays`; if there are several layers, each protocol also has its `layer`, `per_layer` (its
        figure on the test images and `cv`, the one of cross-validation on the training images) and `best_on_test` (the
        layer and figure that published tables give).
    """
    protocols = [name for name in protocols if name not in ON_IMAGES]
    if layers == "last":
        return evaluate_arrays(splits[LAST], protocols, progress, suffix)
    choosing = [name for name in protocols if name in CHOOSING]
    everywhere = choosing if layers == "best" and choosing else protocols  # the others wait until a layer is chosen
    by_layer = {
        name: evaluate_arrays(split, everywhere, progress, f" of {name}{suffix}") for name, split in splits.items()
    }
    figures = {protocol: _figures(protocol, splits, by_layer) for protocol in by_layer[LAST]}
    best = {protocol: _best(figures[protocol], "cv") for protocol in CHOOSING if protocol in figures}
    usual = next(iter(best.values()), LAST) if layers == "best" else LAST
    others = [name for name in protocols if name not in everywhere]
    results = evaluate_arrays(splits[usual], others, progress, f" of {usual}{suffix}") if others else {}
    results = {protocol: {**result, "layer": usual} for protocol, result in results.items()}
    for protocol, by_name in figures.items():
        metric = METRICS[protocol][1]
        layer = best.get(protocol, usual) if layers == "best" else LAST
        published = _best(by_name, metric)
        results[protocol] = {
            **by_layer[layer][protocol],
            "layer": layer,
            "per_layer": by_name,
            "best_on_test": {"layer": published, metric: by_name[published][metric]},
        }
    return {protocol: results[protocol] for protocol in METRICS if protocol in results}


def _figures(
    protocol: str, splits: Mapping[str, Split], by_layer: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """A protocol's figure for each layer; and, if it chooses a layer, that of cross-validation."""
    metric = METRICS[protocol][1]
    found = {}
    for name, split in splits.items():
        result = by_layer[name][protocol]
        found[name] = {metric: result[metric]}
        if protocol in CHOOSING:
            found[name]["cv"] = result["cv"] if "cv" in result else _cross_validated(split, protocol, metric)
    return found


def _best(figures: Mapping[str, Mapping[str, float]], which: str) -> str:
    return max(figures, key=lambda name: figures[name][which])


def _cross_validated(split: Split, protocol: str, metric: str) -> float:
    """The mean figure of a protocol with each third of the training images held out in turn."""
    from sklearn.model_selection import StratifiedKFold

    features, targets = split.train_features, split.train_targets
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(features, class_numbers(targets))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about classes with fewer images than folds
        inner = [Split(features[fit], targets[fit], features[held], targets[held]) for fit, held in folds]
    return float(np.mean([evaluate_arrays(one, [protocol])[protocol][metric] for one in inner]))
