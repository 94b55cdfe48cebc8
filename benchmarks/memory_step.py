"""Compare the time of one ODC memory step with that of the one matrix product it needs.

    python benchmarks/memory_step.py --images 1281167 --clusters 10000 --dim 256 --batch 512 [--ranks W] [--json]

A step is `odc.update`: blend the batch into the samples memory, move it to its nearest centroids, keep sums and
counts, refresh the centroids every tenth step (its time is spread over the interval), look for small clusters. The
product is B x D times D x K and its argmax. Both are timed alternately in one process; the results are medians.
`--small S` starts with that share of the clusters small: `first_step_ms` is then the step that handles them all.
On a machine that others use too, `--cpu-time` counts this process's time on the processor instead of the time that
passes (of all its threads together).
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time

import torch

from odcft.clustering import odc
from odcft.clustering.clusters import Clusters
from odcft.clustering.memory import VARIANTS
from odcft.clustering.small_clusters import is_small
from odcft.distributed import dist, ownership
from odcft.distributed.launch import run_ranks
from odcft.plan import fill_autos
from odcft.recipe import MemoryRecipe, Recipe

INTERVAL = 10  # steps between two refreshes of the centroids, as in the paper


def start(args: argparse.Namespace) -> Clusters:
    """Fill a memory with random features in place, so that nothing of size N is allocated but the memory itself."""
    owned = len(ownership.my_images(args.images))
    draw = torch.Generator().manual_seed(dist.rank())
    dtype = {"float16": torch.float16, "float32": torch.float32}[args.dtype]
    features_SD = torch.empty(owned, args.dim, dtype=dtype)
    for rows in features_SD.split(65536):
        rows.copy_(torch.randn(rows.shape, generator=draw))
    small = int(args.small * args.clusters)
    labels_S = torch.empty(owned, dtype=torch.int32)
    for rows in labels_S.split(1 << 20):
        rows.copy_(torch.randint(small, args.clusters, rows.shape, generator=draw))
    if small:  # a dozen images for each of the first clusters, below the threshold of 20
        spread = torch.arange(small, dtype=torch.int32).repeat_interleave(max(1, 12 // dist.world_size()))
        labels_S[: len(spread)] = spread
    recipe = MemoryRecipe(
        clusters=args.clusters,
        variant=args.variant,
        centroid_interval=INTERVAL,
        dtype=args.dtype,
        min_cluster=args.min_cluster,
    )
    return odc.start(features_SD, labels_S, fill_autos(Recipe(memory=recipe)))


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Time the steps of this rank; return milliseconds and bytes."""
    before = _resident()
    state = start(args)
    memory = state.memory
    draw = torch.Generator().manual_seed(100 + dist.rank())
    S, batch = len(memory.labels_S), args.batch // dist.world_size()

    def inputs() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randint(S, (batch,), generator=draw), torch.randn(batch, args.dim, generator=draw).relu_()

    clock = time.process_time if args.cpu_time else time.perf_counter
    figures: dict[str, float] = {}
    steps, products = [], []
    for step in range(args.steps + INTERVAL):
        row_B, features_BD = inputs()
        dist.barrier()
        began = clock()
        odc.update(state, row_B, features_BD, step)
        took = clock() - began
        if step == 0:
            figures["first_step_ms"] = 1e3 * took
            small_K = is_small(memory.sizes_K, args.min_cluster, VARIANTS[args.variant])
            figures["small_after_first_step"] = int(small_K.sum())
        began = clock()
        (features_BD @ memory.centroids_KD.T).argmax(1)
        if step >= INTERVAL:
            steps.append(took)
            products.append(clock() - began)
    # One step of an interval has the refresh: the median of the other steps, plus a tenth of what the refresh adds.
    refreshing = [t for i, t in enumerate(steps) if (i + 1) % INTERVAL == 0]
    plain = [t for i, t in enumerate(steps) if (i + 1) % INTERVAL]
    plain_s = statistics.median(plain)
    step_s = plain_s + max(0.0, statistics.median(refreshing) - plain_s) / INTERVAL
    product_s = statistics.median(products)
    return {
        "step_ms": 1e3 * step_s,
        "matmul_ms": 1e3 * product_s,
        "ratio": step_s / product_s,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
        "memory_bytes": S * args.dim * memory.features_SD.element_size() + S * 4,
        **figures,
    }


def _resident() -> int:
    """Resident memory of this process in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--clusters", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--batch", type=int, default=512, help="over all ranks")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float32")
    parser.add_argument("--variant", choices=["paper", "official"], default="paper")
    parser.add_argument("--small", type=float, default=0.0, help="share of the clusters that start small")
    parser.add_argument(
        "--min-cluster", type=int, help="default: 20, or a quarter of the images per cluster if that is less"
    )
    parser.add_argument("--cpu-time", action="store_true", help="time on the processor, not time that passes")
    parser.add_argument("--json", action="store_true", help="no effect: the output is always JSON")
    args = parser.parse_args()
    if args.min_cluster is None:
        args.min_cluster = min(20, args.images // args.clusters // 4)
    if args.ranks > 1 and "RANK" not in os.environ:
        sys.exit(run_ranks(args.ranks))
    dist.start(torch.device("cpu"))
    torch.set_grad_enabled(False)
    figures = measure(args)
    if dist.rank() == 0:
        print(json.dumps(figures))
    dist.exit_process(0)


if __name__ == "__main__":
    main()
