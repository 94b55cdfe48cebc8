"""The layer that gives the images their first labels, where the recipe leaves `memory.start_layer` to `auto`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from odcft import seeds
from odcft.backbone.layers import LAST
from odcft.backbone.network import Backbone
from odcft.backbone.start_layer import pooled_layers
from odcft.clustering.neighbour_agreement import neighbour_agreement
from odcft.data.augmentation import augment_batch
from odcft.data.batches import Crops, make_loader
from odcft.data.feature_extraction import to_float
from odcft.data.images import Images
from odcft.distributed import dist
from odcft.plan import Plan, first_labels_note, loader_workers, with_start_layer
from odcft.precision import exact_products
from odcft.progress import Progress
from odcft.recipe import Recipe

IMAGES = 1000  # looked at, at most
FEWEST = 300  # with fewer, chance decides
AS_GOOD = 0.9  # of the best layer's share: chance makes a difference of a few percent
BATCH = 125  # augmented together


def decide_start_layer(
    plan: Plan, recipe: Recipe, backbones: Sequence[Backbone], images: Images, progress: Progress
) -> tuple[Plan, list[str]]:
    """Choose the deepest layer in which nearly as many of an image's neighbours as in any stay when it is augmented.

    Labels are not needed: over layers and networks, this share goes up and down with the accuracy of a labelled
    evaluation (docs/small_data.md, docs/unlabelled.md).

    Args:
        plan: whose `memory.start_layer` may be "auto".
        recipe: as the user gave it.
        backbones: on any device; one for each member.
        images: all that were found; of more than IMAGES, so many are drawn.
        progress: where to report.

    Returns:
        The plan with a layer, and notes for the user.
    """
    if plan.memory.start_layer != "auto":
        return plan, []
    kept = _kept_neighbours(backbones[0], images, plan, progress) if len(images) >= FEWEST else {}
    if not kept:
        why = f" (fewer than {FEWEST} images can be read: too few to compare layers)"
        plan = with_start_layer(plan, recipe, LAST)
        return plan, [first_labels_note(plan, why)]
    as_good = [layer for layer in kept if kept[layer] >= AS_GOOD * max(kept.values())]
    number = torch.tensor(list(kept).index(as_good[-1]), device=dist.this_device())
    dist.broadcast_(number)  # ranks may differ in the last digit
    chosen = list(kept)[int(number)]
    plan = with_start_layer(plan, recipe, chosen)
    other = "" if chosen == LAST else f", {kept[LAST]:.1%} in the last layer"
    why = f": {kept[chosen]:.1%} of an image's neighbours stay there when it is augmented{other}"
    return plan, [first_labels_note(plan, why)]


@torch.no_grad()
@exact_products()
def _kept_neighbours(backbone: Backbone, images: Images, plan: Plan, progress: Progress) -> dict[str, float]:
    """Of each layer, the share of neighbours that two random views of an image share; {} if too few are read."""
    device, training = dist.this_device(), backbone.training
    backbone.to(device).eval()
    draw = seeds.generator(plan.seed, "start layer", 0)
    sample = torch.randperm(len(images), generator=draw)[:IMAGES].sort().values
    with progress.phase("Choosing the layer to start with", 2 * len(sample), "views") as advance:
        views: list[dict[str, Tensor]] = []
        readable: list[list[int]] = []  # the images of each view
        for view in range(2):
            crops = Crops(images, plan.view, plan.augment, seed=seeds.seed(plan.seed, "start layer", 1 + view))
            batches = [[(0, index) for index in part.tolist()] for part in sample.split(BATCH)]
            found: dict[str, list[Tensor]] = {}
            readable.append([])
            for batch in make_loader(crops, batches, loader_workers(device), device):
                advance(len(batch.index_B) + len(batch.unreadable))
                if len(batch.index_B):
                    readable[-1] += batch.index_B.tolist()
                    pixels = augment_batch(to_float(batch.pixels, device), plan.augment, draw)
                    for name, features_BL in pooled_layers(backbone, pixels).items():
                        found.setdefault(name, []).append(features_BL)
            views.append({name: torch.cat(parts) for name, parts in found.items()})
    backbone.train(training)
    rows = [_rows_in_common(readable[0], readable[1]), _rows_in_common(readable[1], readable[0])]
    if len(rows[0]) < FEWEST:
        return {}
    return {name: _agreement(views[0][name][rows[0]], views[1][name][rows[1]]) for name in views[0]}


def _rows_in_common(readable: list[int], others: list[int]) -> list[int]:
    """The rows of images that could be read for the other view too: a store may fail at one time only."""
    also = set(others)
    return [row for row, image in enumerate(readable) if image in also]


def _agreement(one_NL: Tensor, other_NL: Tensor) -> float:
    mean_L = (one_NL.mean(0) + other_NL.mean(0)) / 2
    return neighbour_agreement(one_NL - mean_L, other_NL - mean_L)
