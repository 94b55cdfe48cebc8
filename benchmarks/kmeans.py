"""Compare our K-Means with faiss.Kmeans: same data, iterations and seed, alternating in one process.

    python benchmarks/kmeans.py --images 50000 --clusters 1000 --dim 256 [--noise 1.0] [--json]

The data resemble what K-Means sees in odcft: non-negative features of unit length, like the output of the neck, drawn
around as many centres as there are clusters. `--noise` sets how far they scatter: at 1, an image is as far from its
centre as the centres are from one another. `--features FILE.npz` (array `features`) uses real features instead.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from odcft.clustering.kmeans import assign, kmeans


def clustered_features(images: int, clusters: int, dim: int, noise: float) -> torch.Tensor:
    """Random features (images, dim) around as many centres as clusters, float32 of unit length."""
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(clusters, dim, generator=draw)
    features = centres[torch.randint(clusters, (images,), generator=draw)]
    return F.normalize((features + noise * torch.randn(images, dim, generator=draw)).relu_(), dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--clusters", type=int, default=1_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--noise", type=float, default=1.0)
    parser.add_argument("--features", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="no effect: the output is always JSON")
    args = parser.parse_args()
    import faiss  # noqa: TID251 - this script compares with it

    if args.features:
        features = torch.from_numpy(np.load(args.features)["features"]).float()
    else:
        features = clustered_features(args.images, args.clusters, args.dim, args.noise)
    ours_s, faiss_s = [], []
    for seed in range(args.runs):
        began = time.perf_counter()
        ours = kmeans(features, args.clusters, seed, args.iterations)
        ours_s.append(time.perf_counter() - began)
        began = time.perf_counter()
        # All rows, like ours: by default faiss samples 256 per cluster.
        theirs = faiss.Kmeans(
            features.shape[1], args.clusters, niter=args.iterations, seed=seed, max_points_per_centroid=2**31 - 1
        )
        theirs.train(features.numpy())
        faiss_s.append(time.perf_counter() - began)
    objectives = [float(assign(features, c)[1].sum()) for c in (ours, torch.from_numpy(theirs.centroids))]
    figures = {
        "ours_s": statistics.median(ours_s),
        "faiss_s": statistics.median(faiss_s),
        "ratio": statistics.median(a / b for a, b in zip(ours_s, faiss_s, strict=True)),
        "ours_objective": objectives[0],
        "faiss_objective": objectives[1],
        "objective_ratio": objectives[0] / objectives[1],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
