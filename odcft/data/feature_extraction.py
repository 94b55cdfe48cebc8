"""Features of images, extracted once, for the memories and for evaluation alike."""

from collections.abc import Callable

import torch
from torch import Tensor

from odcft.data.batches import Crops, in_order, loader
from odcft.distributed import dist, ownership
from odcft.progress import Progress


@torch.no_grad()
def extract(
    network: Callable[[Tensor], Tensor],
    crops: Crops,
    batch: int,
    workers: int,
    device: torch.device,
    progress: Progress,
    title: str = "Features",
    dtype: torch.dtype = torch.float32,
    stop: Callable[[], object] = lambda: None,
) -> tuple[Tensor, dict[int, str]]:
    """Features of the images this rank owns, in row order, without augmentation.

    Args:
        network: images (B, 3, H, W) float in 0..1 on the device to features (B, D); put it in evaluation mode first.
        crops: without `augment`.
        batch: images at a time.
        workers: loader processes.
        device: where the network is.
        progress: shows how far it is.
        title: the name of this phase.
        dtype: of the result.
        stop: asked before every batch; the rest is left out once it says so.

    Returns:
        (S, D) on the device, rows of unreadable images zero; and those images: number to reason, of this rank.
    """
    assert crops.augment is None
    owned = ownership.owned(len(crops.images))
    unreadable: dict[int, str] = {}
    features_SD: Tensor | None = None
    with progress.phase(title, len(owned)) as advance:
        for part in loader(crops, in_order(owned, batch), workers, device):
            if stop():
                break
            unreadable.update(part.unreadable)
            if len(part.index_B):
                images = to_float(part.pixels, device)
                features_BD = network(images).float()
                if features_SD is None:
                    features_SD = torch.zeros(len(owned), features_BD.shape[1], dtype=dtype, device=device)
                row_B = (part.index_B // dist.world_size()).to(device, non_blocking=True)
                features_SD[row_B] = features_BD.to(dtype)
            advance(len(part.index_B) + len(part.unreadable))
    if features_SD is None:  # not one image of this rank's could be read
        features_SD = torch.zeros(len(owned), 0, dtype=dtype, device=device)
    return features_SD, unreadable


def to_float(pixels: Tensor, device: torch.device) -> Tensor:
    """(B, 3, H, W) uint8 in 0..255, anywhere, to float in 0..1 on the device."""
    return pixels.to(device, non_blocking=True).to(torch.float32).div_(255)
