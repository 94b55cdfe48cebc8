"""Features of random views of images, for the measures that need no labels: extracted once, then kept in the cache.

Shapes: N images, V views of each, B images of a batch, F features.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from odcft import seeds
from odcft.backbone.network import Backbone
from odcft.data.augmentation import augment_batch
from odcft.data.batches import Crops, make_loader
from odcft.data.feature_extraction import to_float
from odcft.data.images import Images
from odcft.data.view import View
from odcft.distributed import dist, ownership
from odcft.evaluation import feature_cache
from odcft.plan import loader_workers
from odcft.precision import has_bfloat16
from odcft.progress import Progress
from odcft.recipe import AugmentRecipe

BATCH = 128  # images augmented together: other batches would draw other views
# Those of the recipe `small`, with which the runs of the calibration were trained: other views have other thresholds.
AUGMENT = AugmentRecipe(
    crop_scale=(0.2, 1.0), flip=0.5, rotation=2, brightness=0.16, contrast=0.16, saturation=0.4, hue=0.2, gray=0.2
)


@torch.no_grad()
def random_views(backbone: Backbone, images: Images, view: View, count: int, progress: Progress) -> np.ndarray:
    """Features of random views (AUGMENT) of every image: the same views for every network and number of ranks.

    Args:
        backbone: on this rank's device, resized to the view and in eval mode, as `features_of` leaves it.
        images: the images, all of which can be read.
        view: its size and range are used; a random crop takes the place of its own.
        count: V.
        progress: where to report.

    Returns:
        (N, V, F) float32 on rank 0; others may have nothing.
    """
    device, names = dist.this_device(), [f"random view {number}" for number in range(count)]
    half = device.type != "cpu" and has_bfloat16(device)
    key, known, contents = "", None, feature_cache.contents_of(images, progress)
    if dist.rank() == 0:
        key = feature_cache.key(backbone, contents, view, f"{'bfloat16' if half else 'float32'} {AUGMENT!r}")
        known = feature_cache.read(key, dict.fromkeys(names, backbone.width), len(images))
    if float(dist.all_sum(torch.tensor(float(known is not None), device=device))):
        return np.stack([known[0][name] for name in names], 1) if known else np.zeros((0, count, backbone.width))
    found = {}
    batches = ownership.my_images(-(-len(images) // BATCH))
    mine = sum(min(BATCH, len(images) - BATCH * number) for number in batches)
    with progress.phase("Random views", count * mine) as advance:
        for number, name in enumerate(names):
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                found[name] = _view(backbone, Crops(images, view, AUGMENT, seed=number), advance)
    if dist.rank() == 0:
        feature_cache.write(key, found, {})
    return np.stack([found[name].numpy() for name in names], 1)


def _view(backbone: Backbone, crops: Crops, advance: Callable[..., None]) -> Tensor:
    """The features (N, F) of one view of each image. Ranks own whole batches, so any number of them draws alike."""
    device, N = dist.this_device(), len(crops.images)
    starts = range(0, N, BATCH)
    owned = ownership.my_images(len(starts))
    batches = [[(0, i) for i in range(starts[number], min(starts[number] + BATCH, N))] for number in owned]
    features_SBF = torch.zeros(len(owned), BATCH, backbone.width, device=device)
    for row, batch in enumerate(make_loader(crops, batches, loader_workers(device), device)):
        generator = seeds.generator(crops.seed, "augmentation", 0, owned[row])
        images = augment_batch(to_float(batch.pixels, device), AUGMENT, generator)
        features_SBF[row, batch.index_B - starts[owned[row]]] = backbone(images).float()
        advance(len(images) + len(batch.unreadable))
    return ownership.in_dataset_order(features_SBF.cpu(), len(starts)).flatten(0, 1)[:N]
