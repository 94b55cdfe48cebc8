"""Features of a backbone for evaluation and `embed`: extracted once, then taken from a cache.

Shapes: N images, S of them on this rank, F features.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from odcft.backbone.layers import LAST, LayerFeatures
from odcft.backbone.network import Backbone
from odcft.data.batches import Crops
from odcft.data.feature_extraction import extract
from odcft.data.images import Images
from odcft.data.view import View
from odcft.distributed import dist, ownership
from odcft.errors import OdcftError
from odcft.evaluation import feature_cache
from odcft.plan import loader_workers
from odcft.precision import has_bfloat16
from odcft.progress import Progress

BATCH = 128  # images per forward pass


@dataclass
class Features:
    """What a backbone gives for a set of images.

    Attributes:
        layers: layer to (N, F), in the order of the network, `last` at the end; zeros for unreadable images. Rank 0
            has them; others may have none.
        unreadable: image number to reason.
        cached: whether they were known already.
    """

    layers: dict[str, np.ndarray]
    unreadable: dict[int, str]
    cached: bool = False


def features_of(
    backbone: Backbone,
    images: Images,
    view: View,
    progress: Progress,
    *,
    all_layers: bool = False,
    keep: bool = True,
    contents: bytes | None = None,
    alone: bool = False,
) -> Features:
    """Extract the features of all images, on all ranks together, or take them from the cache.

    On a GPU that has bfloat16 the network runs in it, as in training.

    Args:
        backbone: the network; it is moved to this rank's device.
        images: the images.
        view: how they are resized and cropped.
        progress: where to report.
        all_layers: the features of all layers, not only of the last.
        keep: use the cache.
        contents: what `contents_of` gave for these images, if it was called already.
        alone: only this rank is here: it extracts the features of all images itself, and waits for nobody.

    Raises:
        OdcftError: the network cannot process images of that size.
    """
    backbone.resize(view.size)
    if not backbone.accepts_size(view.size):
        raise OdcftError(f"{backbone.arch} cannot process images of {view.size} pixels. Try --size {backbone.size}.")
    device = dist.this_device()
    half = device.type != "cpu" and has_bfloat16(device)
    backbone = backbone.to(device).eval()
    network = LayerFeatures(backbone, view.size) if all_layers else backbone
    widths = {LAST: backbone.width}
    if isinstance(network, LayerFeatures):
        widths = dict(zip(network.names, network.widths, strict=True))

    key, known = "", None
    if keep and contents is None:
        contents = feature_cache.contents_of(images, progress, alone=alone)
    if keep and (alone or dist.rank() == 0):  # the other ranks may have another disk
        key = feature_cache.key(backbone, contents or b"", view, "bfloat16" if half else "float32")
        known = feature_cache.read(key, widths, len(images))
    if not alone:
        dist.wait_for_all()
    if known is not None if alone else float(dist.all_sum(torch.tensor(float(known is not None), device=device))):
        return Features(*(known or ({}, {})), cached=True)

    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        features_NF, unreadable = _extract(network, Crops(images, view), device, progress, alone)
    if not features_NF.shape[1]:  # not one image could be read
        features_NF = features_NF.new_zeros(len(images), backbone.width)
        return Features({LAST: features_NF.numpy()}, unreadable)
    tensors = network.split(features_NF) if isinstance(network, LayerFeatures) else {LAST: features_NF}
    if keep and (alone or dist.rank() == 0):
        feature_cache.write(key, tensors, unreadable)
    return Features({name: tensor.numpy() for name, tensor in tensors.items()}, unreadable)


def _extract(
    network: torch.nn.Module, crops: Crops, device: torch.device, progress: Progress, alone: bool
) -> tuple[Tensor, dict[int, str]]:
    """Features (N, F) of all images on the host, and why some cannot be read."""
    host, workers = torch.device("cpu"), loader_workers(device)  # all layers of a large set would not fit on a GPU
    features_SF, unreadable = extract(network, crops, BATCH, workers, device, progress, alone=alone, on=host)
    if alone:
        return features_SF, unreadable
    return ownership.in_dataset_order(features_SF, len(crops.images)), dist.gather_dict(unreadable)
