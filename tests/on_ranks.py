"""What tests/test_ranks.py runs on one process or two: `python on_ranks.py RANKS CASE OUT`."""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from odcft import dist
from odcft.errors import OdcftError
from odcft.kmeans import kmeans
from odcft.launch import relaunch
from odcft.memory import VARIANTS, new_memory, set_centroids
from odcft.methods import odc
from odcft.recipe import MemoryRecipe, Recipe
from odcft.small_clusters import handle_small_clusters

N, K, D = 403, 9, 8  # not a multiple of two


def features_and_labels():
    draw = torch.Generator().manual_seed(0)
    labels_N = torch.randint(K, (N,), generator=draw)
    labels_N[labels_N > 5] = 2  # one huge cluster and three empty ones
    return torch.randn(N, D, generator=draw).relu(), labels_N


def mine(rows):
    return rows[list(dist.owned(N))]


def small_clusters():
    features_ND, labels_N = features_and_labels()
    memory = new_memory(mine(features_ND), mine(labels_N), K)
    memory.sizes_K = dist.all_sum(memory.counts_K)
    set_centroids(memory, dist.all_sum(memory.sums_KD))
    handle_small_clusters(memory, 30, VARIANTS["paper"], torch.Generator().manual_seed(1))
    return {
        "labels": dist.in_dataset_order(memory.labels_S, N),
        "centroids": memory.centroids_KD,
        "sizes": memory.sizes_K,
    }


def clustering():
    return {"centroids": kmeans(mine(features_and_labels()[0]), K, 3)}


def steps():
    features_ND, labels_N = features_and_labels()
    recipe = Recipe(memory=MemoryRecipe(clusters=K, min_cluster=20, centroid_interval=3, dtype="float32"))
    state = odc.start(mine(features_ND), mine(labels_N), recipe)
    draw = torch.Generator().manual_seed(5)
    for step in range(40):
        index_B = torch.randint(N, (32,), generator=draw)
        features_BD = torch.randn(32, D, generator=draw).relu()
        own_B = index_B % dist.world_size() == dist.rank()
        odc.update(state, index_B[own_B] // dist.world_size(), features_BD[own_B], step)
    memory = state.memory
    return {
        "labels": dist.in_dataset_order(memory.labels_S, N),
        "sums": dist.all_sum(memory.sums_KD),
        "sizes": memory.sizes_K,
    }


def error_on_one():
    if dist.rank() == 1:
        raise OdcftError("rank 1 has run out of luck.")
    dist.barrier()  # would wait for ever
    return {}


if __name__ == "__main__":
    ranks, case, out = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    if ranks > 1 and "RANK" not in os.environ:
        sys.exit(relaunch(ranks))
    dist.start(torch.device("cpu"))
    try:
        tensors = globals()[case]()
    except OdcftError as error:
        print(f"odcft: {error}", file=sys.stderr)
        sys.exit(2)
    if dist.rank() == 0:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out)
    dist.stop()
