"""Compare our K-Means with faiss.Kmeans: same data, iterations and seed, alternating in one process.

    python benchmarks/kmeans.py --images 50000 --clusters 1000 --dim 256 [--noise 1.0] [--json]
    python benchmarks/kmeans.py --images 1281167 --clusters 10000 --iterations 2 --runs 1 --without-faiss

The data resemble what K-Means sees in odcft: non-negative features of unit length, like the output of the neck, drawn
around as many centres as there are clusters. `--noise` sets how far they scatter: at 1, an image is as far from its
centre as the centres are from one another. `--features FILE.npz` (array `features`) uses real features instead, and so
does `--features FOLDER` of `init-memory`. Where other processes share the cores, compare the processor's time (`cpu`).
`--without-faiss` measures ours alone, and the most memory that it takes: features included, as a multiple of them.
"""

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from odcft.clustering.kmeans import assign, kmeans


def clustered_features(images: int, clusters: int, dim: int, noise: float) -> torch.Tensor:
    """Random features (images, dim) around as many centres as clusters, float32 of unit length."""
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(clusters, dim, generator=draw)
    features = centres[torch.randint(clusters, (images,), generator=draw)]
    return F.normalize((features + noise * torch.randn(images, dim, generator=draw)).relu_(), dim=1)


def read_features(path: Path) -> torch.Tensor:
    """Real features (N, D) as float32: from an .npz file, or from a folder that `init-memory` wrote."""
    if path.is_dir():
        return load_file(path / "memory.safetensors")["features"].float()
    return torch.from_numpy(np.load(path)["features"]).float()


def timed(work: Callable) -> tuple[torch.Tensor, float, float]:
    """What `work` returns, its seconds, and the seconds of all cores that it took."""
    began, cpu = time.perf_counter(), time.process_time()
    return work(), time.perf_counter() - began, time.process_time() - cpu


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes: its memory now, or the most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def alone(features: torch.Tensor, args: argparse.Namespace) -> dict[str, float]:
    """Time and memory of ours."""
    kmeans(features[:100], 2, 0, 1)  # loads what torch loads late
    ctypes.CDLL(None).malloc_trim(0)  # memory that is free is not counted as there already
    Path("/proc/self/clear_refs").write_text("5")  # resets the most memory
    before, runs = resident("VmRSS"), []
    for seed in range(args.runs):
        runs.append(timed(lambda seed=seed: kmeans(features, args.clusters, seed, args.iterations))[1:])
    added, of_features = resident("VmHWM") - before, features.numel() * features.element_size()
    return {
        "ours_s": statistics.median(seconds for seconds, _ in runs),
        "ours_cpu_s": statistics.median(cpu for _, cpu in runs),
        "features_bytes": of_features,
        "peak_bytes": of_features + added,
        "peak_ratio": 1 + added / of_features,
    }


def against_faiss(features: torch.Tensor, args: argparse.Namespace) -> dict[str, float]:
    """Time and objective of ours and of faiss."""
    import faiss  # noqa: TID251 - this script compares with it

    def theirs(seed: int) -> torch.Tensor:
        # All rows, like ours: by default faiss samples 256 per cluster.
        clustering = faiss.Kmeans(
            features.shape[1], args.clusters, niter=args.iterations, seed=seed, max_points_per_centroid=2**31 - 1
        )
        clustering.train(features.numpy())
        return torch.from_numpy(clustering.centroids)

    runs = []  # of each seed: seconds, processor's seconds and objective, of ours and of faiss
    for seed in range(args.runs):
        for work in (lambda seed=seed: kmeans(features, args.clusters, seed, args.iterations), partial(theirs, seed)):
            centroids, seconds, cpu = timed(work)
            runs.append((seconds, cpu, float(assign(features, centroids)[1].double().sum())))
    ours, others = runs[::2], runs[1::2]
    ratios = [[a / b for a, b in zip(mine, other, strict=True)] for mine, other in zip(ours, others, strict=True)]
    middle = [[statistics.median(column) for column in zip(*rows, strict=True)] for rows in (ours, others, ratios)]
    return {
        "ours_s": middle[0][0],
        "faiss_s": middle[1][0],
        "ratio": middle[2][0],
        "ours_cpu_s": middle[0][1],
        "faiss_cpu_s": middle[1][1],
        "cpu_ratio": middle[2][1],
        "ours_objective": middle[0][2],
        "faiss_objective": middle[1][2],
        "objective_ratio": statistics.mean(ratio[2] for ratio in ratios),
        "objective_ratios": [ratio[2] for ratio in ratios],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--clusters", type=int, default=1_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--noise", type=float, default=1.0)
    parser.add_argument("--features", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--without-faiss", action="store_true")
    parser.add_argument("--json", action="store_true", help="no effect: the output is always JSON")
    args = parser.parse_args()
    if args.features:
        features = read_features(args.features)
    else:
        features = clustered_features(args.images, args.clusters, args.dim, args.noise)
    print(json.dumps(alone(features, args) if args.without_faiss else against_faiss(features, args)))


if __name__ == "__main__":
    main()
