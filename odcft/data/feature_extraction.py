"""Features of all images in one pass, for the memories and for evaluation."""

from collections.abc import Callable

import torch
from torch import Tensor

from odcft.data.batches import Crops, make_loader, sequential_batches
from odcft.distributed import ownership
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
    *,
    alone: bool = False,
    on: torch.device | None = None,
) -> tuple[Tensor, dict[int, str]]:
    """Extract the features of the images that this rank owns, in the order of its rows, without augmentation.

    Args:
        network: maps images (B, 3, H, W), float in 0..1 on the device, to features (B, D); already in eval mode.
        crops: without `augment`.
        batch: images per forward pass.
        workers: data workers.
        device: where the network is.
        progress: where to show a progress bar.
        title: of the progress bar.
        dtype: of the result.
        stop: called before every batch; extraction ends early once it returns something true.
        alone: extract the features of all images on this rank: the others are not here.
        on: where to keep the features, by default on `device`; the host has room for more, but each batch waits.

    Returns:
        Features (S, D) of this rank's S images, where they are kept, with zero rows for unreadable ones; and index to
        reason for the unreadable ones.
    """
    assert crops.augment is None
    kept = on or device
    owned = range(len(crops.images)) if alone else ownership.my_images(len(crops.images))
    unreadable: dict[int, str] = {}
    features_SD: Tensor | None = None
    with progress.phase(title, len(owned)) as advance:
        for part in make_loader(crops, sequential_batches(owned, batch), workers, device):
            if stop():
                break
            unreadable.update(part.unreadable)
            if len(part.index_B):
                images = to_float(part.pixels, device)
                features_BD = network(images).float()
                if features_SD is None:
                    features_SD = torch.zeros(len(owned), features_BD.shape[1], dtype=dtype, device=kept)
                row_B = (part.index_B if alone else ownership.row_of(part.index_B)).to(kept, non_blocking=True)
                features_SD[row_B] = features_BD.to(kept, dtype)
            advance(len(part.index_B) + len(part.unreadable))
    if features_SD is None:  # no image of this rank could be read
        features_SD = torch.zeros(len(owned), 0, dtype=dtype, device=kept)
    return features_SD, unreadable


def to_float(pixels: Tensor, device: torch.device) -> Tensor:
    """Move pixels to the device, as float in 0..1: (B, 3, H, W) uint8 to float32."""
    return pixels.to(device, non_blocking=True).to(torch.float32).div_(255)
