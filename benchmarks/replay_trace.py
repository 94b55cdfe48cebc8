"""Replay a recorded trace of an ODC memory, and count where our memory differs.

    python benchmarks/replay_trace.py TRACE.npz --variant paper|official [--ranks N] [--json]

The trace holds the inputs init_features (N, D), init_labels (N), indices (T, B), features (T, B, D) and the results:
labels_after (T, B), centroids (one before the first step and one after each refresh), class_weights, change_ratio,
final_labels, final_features. A trace without inputs uses those of the official trace next to it.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from odcft.clustering import odc
from odcft.distributed import dist, ownership
from odcft.distributed.launch import run_ranks
from odcft.plan import fill_autos
from odcft.recipe import MemoryRecipe, Recipe


def read_trace(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a trace, with the inputs from the official trace next to it if it has none."""
    trace = dict(np.load(path))
    if "indices" not in trace:
        trace = {**np.load(path.with_name(path.name.replace("paper", "official"))), **trace}
        if "class_weights" not in np.load(path):
            trace.pop("class_weights"), trace.pop("counts")
    return trace


def replay(path: Path, variant: str) -> dict[str, float]:
    """Run the trace through this rank's share of the memory; return the differences over all ranks."""
    trace = read_trace(path)
    N, interval, steps = len(trace["init_labels"]), int(trace["centroid_interval"]), len(trace["indices"])
    mine = list(ownership.my_images(N))
    K = trace["centroids"].shape[1]
    recipe = MemoryRecipe(
        clusters=K,
        variant=variant,
        momentum=float(trace["momentum"]),
        centroid_interval=interval,
        min_cluster=int(trace.get("min_cluster", -1)),
        dtype="float32",
    )
    state = odc.start(
        torch.from_numpy(trace["init_features"][mine]),
        torch.from_numpy(trace["init_labels"][mine]),
        fill_autos(Recipe(memory=recipe)),
    )

    mismatches, weight_error = 0, 0.0
    centroid_error = np.abs(state.memory.centroids_KD.numpy() - trace["centroids"][0]).max()
    for step in range(steps):
        index_B = trace["indices"][step]
        own_B = ownership.is_mine(index_B)
        row_B = torch.from_numpy(ownership.row_of(index_B[own_B]))
        odc.update(state, row_B, torch.from_numpy(trace["features"][step][own_B]), step)
        mismatches += int((state.memory.labels_S[row_B].numpy() != trace["labels_after"][step][own_B]).sum())
        if (step + 1) % interval == 0 and (step + 1) // interval < len(trace["centroids"]):
            error = np.abs(state.memory.centroids_KD.numpy() - trace["centroids"][(step + 1) // interval]).max()
            centroid_error = max(centroid_error, error)
        # A trace without weights is compared with their definition: 1 / sqrt(N_c), from the labels counted again.
        counts_K = torch.bincount(state.memory.labels_S, minlength=K)
        dist.all_sum_(counts_K)
        defined = 1 / np.sqrt(np.maximum(counts_K.numpy(), 1))
        expected = trace["class_weights"][step] if "class_weights" in trace else defined / defined.sum()
        weights = odc.targets(state, row_B)[1].numpy()
        weight_error = max(weight_error, np.abs(weights / weights.sum() - expected).max())

    mismatches += int((state.memory.labels_S.numpy() != trace["final_labels"][mine]).sum())
    figures = torch.tensor(
        [
            np.abs(state.memory.features_SD.numpy() - trace["final_features"][mine]).max(),
            centroid_error,
            weight_error,
        ]
    )
    total = torch.tensor(mismatches)
    dist.all_sum_(total)
    worst = dist.gather_rows(figures.unsqueeze(0)).amax(0).tolist()
    return {
        "label_mismatches": int(total),
        "max_feature_error": worst[0],
        "max_centroid_error": worst[1],
        "max_weight_error": worst[2],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--variant", choices=["paper", "official"], required=True)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="no effect: the output is always JSON")
    args = parser.parse_args()
    if args.ranks > 1 and "RANK" not in os.environ:
        sys.exit(run_ranks(args.ranks))
    dist.start(torch.device("cpu"))
    figures = replay(args.trace, args.variant)
    if dist.rank() == 0:
        print(json.dumps(figures))
    dist.exit_process(0)


if __name__ == "__main__":
    main()
