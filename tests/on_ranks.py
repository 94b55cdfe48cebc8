"""What tests of tests/distributed run on one process or several: `python on_ranks.py RANKS CASE OUT`."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from step_counters import Counters

from odcft import train
from odcft.clustering import odc
from odcft.clustering import small_clusters as small_clusters_module
from odcft.clustering.kmeans import kmeans
from odcft.clustering.memory import VARIANTS, new_memory, set_centroids
from odcft.clustering.small_clusters import handle_small_clusters
from odcft.distributed import dist, ownership, stop_signals
from odcft.distributed.launch import run_ranks
from odcft.errors import OdcftError
from odcft.model import members
from odcft.plan import fill_autos
from odcft.recipe import MemoryRecipe, Recipe, load_recipe
from odcft.train import fine_tune

N, K, D = 403, 9, 8  # not a multiple of two


def features_and_labels():
    draw = torch.Generator().manual_seed(0)
    labels_N = torch.randint(K, (N,), generator=draw)
    labels_N[labels_N > 5] = 2  # one huge cluster and three empty ones
    return torch.randn(N, D, generator=draw).relu(), labels_N


def mine(rows):
    return rows[list(ownership.my_images(N))]


def small_clusters():
    features_ND, labels_N = features_and_labels()
    memory = new_memory(mine(features_ND), mine(labels_N), K)
    memory.sizes_K = dist.all_sum(memory.counts_K)
    set_centroids(memory, dist.all_sum(memory.sums_KD))
    handle_small_clusters(memory, 30, VARIANTS["paper"], torch.Generator().manual_seed(1))
    return {
        "labels": ownership.in_dataset_order(memory.labels_S, N),
        "centroids": memory.centroids_KD,
        "sizes": memory.sizes_K,
    }


def clustering():
    return {"centroids": kmeans(mine(features_and_labels()[0]), K, 3)}


def leaving():
    """Some images leave, and a rank that could read none of its own does not know how wide features are."""
    features_ND, _ = features_and_labels()
    left_out = {0, 7, 8, 9, 100, 402}
    ownership.PIECE = 64
    rows = ownership.remove_images(mine(features_ND), left_out, N)
    left = [i for i in range(N) if i not in left_out]
    assert torch.equal(rows, features_ND[left][list(ownership.my_images(len(left)))])
    nothing = mine(features_ND)[:, :0] if dist.rank() == 1 else mine(features_ND)
    assert ownership.remove_images(nothing, left_out, N).shape == rows.shape
    return {"rows": ownership.in_dataset_order(rows, len(left))}


def steps():
    features_ND, labels_N = features_and_labels()
    plan = fill_autos(Recipe(memory=MemoryRecipe(clusters=K, min_cluster=20, centroid_interval=3, dtype="float32")))
    state = odc.start(mine(features_ND), mine(labels_N), plan)
    draw = torch.Generator().manual_seed(5)
    for step in range(40):
        index_B = torch.randint(N, (32,), generator=draw)
        features_BD = torch.randn(32, D, generator=draw).relu()
        own_B = index_B % dist.world_size() == dist.rank()
        odc.update(state, ownership.row_of(index_B[own_B]), features_BD[own_B], step)
    memory = state.memory
    return {
        "labels": ownership.in_dataset_order(memory.labels_S, N),
        "sums": dist.all_sum(memory.sums_KD),
        "sizes": memory.sizes_K,
    }


def error_on_one():
    if dist.rank() == 1:
        raise OdcftError("rank 1 has run out of luck.")
    dist.barrier()  # would wait for ever
    return {}


def goes_on():
    """One rank is asked to stop, and another time meets a step that is not finite: all do the same."""
    folder, first, last = Path(sys.argv[3]).parent, dist.rank() == 0, dist.rank() == dist.world_size() - 1
    quick = ["optim.batch_size=6", "optim.epochs=3", "neck.hidden=16", "neck.dim=8", "neck.dropout=0.5"]
    quiet = ["log.tensorboard=false", "log.report=false", "log.snapshot_share=1", "log.interval=1"]
    recipe = load_recipe("small", [*quick, *quiet, "optim.skip_non_finite=1"])

    def go(name, **options):
        fine_tune(str(folder / "c.pth"), str(folder / "images"), folder / name, recipe, **options)
        weights = load_file(folder / name / "backbone" / "model.safetensors")
        metrics = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        return weights, [[line[name] for name in ("step", "loss", "change_ratio")] for line in metrics]

    def asked(step, *args):
        if step == 2 and last:
            os.kill(os.getpid(), signal.SIGTERM)
        return lr_at(step, *args)

    def broken(images, *args):
        calls.append(1)
        return augment_batch(images, *args) * (float("nan") if len(calls) == 4 and last else 1)

    lr_at, augment_batch, calls = train.lr_at, members.augment_batch, []
    whole, figures = go("whole")
    train.lr_at = asked
    with stop_signals.handling_signals(), contextlib.suppress(stop_signals.Stopped):
        go("parts")
        raise AssertionError("did not stop")
    train.lr_at = lr_at
    parts, figures_of_parts = go("parts", resume=True)
    members.augment_batch = broken
    skipped, figures_of_skipped = go("skipped")
    return (
        {
            "parts_equal_whole": torch.tensor(all(torch.equal(parts[name], whole[name]) for name in whole)),
            "figures_equal": torch.tensor(figures == figures_of_parts),
            "skipped_is_finite": torch.tensor(all(tensor.isfinite().all() for tensor in skipped.values())),
            "steps_of_skipped": torch.tensor([step for step, *_ in figures_of_skipped]),
        }
        if first
        else {}
    )


def counts():
    """What each step of a run counts: a line (refilled, collectives, bytes, reads) for each, by method."""
    folder, counters, refilled, lines = Path(sys.argv[3]).parent, Counters(), [], []
    quick = ["optim.batch_size=8", "optim.epochs=2", "neck.hidden=24", "neck.dim=8", "data.size=32"]
    quick += ["memory.clusters=6", "memory.min_cluster=4", "memory.centroid_interval=4", "dc.pca=6"]
    quick += [
        "log.interval=1000",
        "log.tensorboard=false",
        "log.report=false",
        "log.snapshot_minutes=1000",
        "optim.lr=0.05",
    ]
    handle, split, set_lr, result = odc.handle_small_clusters, small_clusters_module._split_largest, train.set_lr, {}

    def handle_and_note(*args):
        refilled.append(handle(*args))

    def split_on_the_host(*args):
        with counters.on_host_copies():
            return split(*args)

    def begin_step(*args):
        lines.append([sum(refilled), *counters.take()])  # of the step before
        refilled.clear()
        set_lr(*args)

    odc.handle_small_clusters, small_clusters_module._split_largest = handle_and_note, split_on_the_host
    train.set_lr = begin_step
    for name in ("odc", "dc", "codc", "instances"):
        lines.clear()
        method = "odc" if name == "instances" else name
        ckpts = [str(folder / "c.pth")] * (2 if method == "codc" else 1)
        recipe = load_recipe(
            "odc_small", [*quick, f"method={method}", f"memory.instance_share={(name == 'instances') / 2}"]
        )
        with counters.counting():
            fine_tune(ckpts, str(folder / "images"), folder / f"{name}-{dist.world_size()}", recipe)
        result[name] = torch.tensor(lines)
    return result


def wire():
    """What a memory step counts, by the number of images and of small clusters."""
    counters, result, whole = Counters(), {}, small_clusters_module._split_largest
    K, D = 40, 8

    def split_on_the_host(*args):
        with counters.on_host_copies():
            return whole(*args)

    small_clusters_module._split_largest = split_on_the_host
    for images in (10_000, 1_000_000):
        for small in (0, 1, 15):
            settings = MemoryRecipe(clusters=K, min_cluster=20, centroid_interval=2, dtype="float32")
            mine = torch.tensor(ownership.my_images(images))
            features_SD = torch.randn(len(mine), D, generator=torch.Generator().manual_seed(dist.rank()))
            state = odc.start(features_SD, small + mine % (K - small), fill_autos(Recipe(memory=settings)))
            row_B, lines = torch.arange(16), []
            with counters.counting():
                for step in range(4):
                    counters.take()
                    odc.update(state, row_B + 16 * step, features_SD[:16].flip(0), step)
                    lines.append(counters.take())
            assert int(state.memory.sizes_K.min()) > 20
            result[f"{images} {small}"] = torch.tensor(lines)
    return result


if __name__ == "__main__":
    ranks, case, out = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    if ranks > 1 and "RANK" not in os.environ:
        sys.exit(run_ranks(ranks))
    dist.start(torch.device("cpu"))
    try:
        tensors = globals()[case]()
    except OdcftError as error:
        print(f"odcft: {error}", file=sys.stderr)
        dist.exit_process(2)
    if dist.rank() == 0:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out)
    dist.exit_process(0)
