"""Measure what ODC adds to a training step, compared with supervised training of the same network.

    python benchmarks/step_overhead.py --arch resnet18 --size 64 --clusters 1000 [--batch 128] [--json]

Backbone, neck, head, augmentation, loader and optimizer are the same. Supervised training reads fixed labels and unit
weights; ODC reads labels and weights from its memory and updates it. Steps alternate; the results are medians.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from odcft.backbone.network import Backbone
from odcft.clustering import odc
from odcft.data.augmentation import augment_batch
from odcft.data.batches import Crops, TrainingOrder, make_loader
from odcft.data.feature_extraction import to_float
from odcft.data.sources import find_images
from odcft.data.view import View
from odcft.model.neck_and_head import Model, make_neck
from odcft.optim import make_optimizer
from odcft.plan import fill_autos
from odcft.recipe import AugmentRecipe, MemoryRecipe, NeckRecipe, OptimRecipe, Recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--images", type=int, default=100_000, help="number of rows in the memory")
    parser.add_argument("--steps", type=int, default=30, help="number of steps of each kind")
    parser.add_argument("--json", action="store_true", help="no effect: the output is always JSON")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    neck_recipe = NeckRecipe()
    backbone = Backbone(args.arch)
    network = Model(backbone, make_neck(backbone.width, neck_recipe), neck_recipe.dim, args.clusters)
    network = network.to(device, memory_format=torch.channels_last).train()
    optimizer = make_optimizer(network.body(), network.head.parameters(), OptimRecipe())
    labels_S = torch.randint(args.clusters, (args.images,), device=device)
    features_SD = torch.randn(args.images, neck_recipe.dim, device=device)
    plan = fill_autos(Recipe(memory=MemoryRecipe(clusters=args.clusters, dtype="float32")))
    state = odc.start(features_SD, labels_S, plan)
    weight_K = torch.ones(args.clusters, device=device)

    def step(number: int, batch, with_memory: bool) -> None:
        row_B = batch.index_B.to(device) * 997 % args.images
        image_B = augment_batch(to_float(batch.pixels, device), AugmentRecipe(), torch.Generator().manual_seed(number))
        features_BD, logits_BK, *_ = network(image_B.contiguous(memory_format=torch.channels_last))
        targets = odc.targets(state, row_B) if with_memory else (labels_S[row_B], weight_K)
        loss = F.cross_entropy(logits_BK, *targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if with_memory:
            odc.update(state, row_B, features_BD.detach(), number)
        if device.type == "cuda":
            torch.cuda.synchronize()

    times: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        draw = np.random.default_rng(0)
        for i in range(2 * args.batch):
            pixels = draw.integers(0, 255, (args.size + 16, args.size + 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(Path(folder, f"{i:04d}.jpg"))
        crops = Crops(find_images(folder), View(args.size), AugmentRecipe())
        order = TrainingOrder(2 * args.batch, args.batch, epochs=args.steps + 3, seed=0)
        batches = iter(make_loader(crops, order, 0, device))
        for number in range(args.steps + 3):
            for with_memory in (True, False) if number % 2 else (False, True):
                began = time.perf_counter()
                step(number, next(batches), with_memory)
                if number >= 3:
                    times[with_memory].append(time.perf_counter() - began)
    odc_s, supervised_s = statistics.median(times[True]), statistics.median(times[False])
    # Compare pair by pair, so that a machine that slows down slows both.
    ratio = statistics.median(a / b for a, b in zip(times[True], times[False], strict=True))
    print(json.dumps({"odc_ms": 1e3 * odc_s, "supervised_ms": 1e3 * supervised_s, "ratio": ratio}))


if __name__ == "__main__":
    main()
