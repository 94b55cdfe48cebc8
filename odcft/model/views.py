"""What the members see of a batch: the augmented images, and rotated or mixed copies for the losses that need them.

Shapes: B batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from odcft.data.augmentation import rotate_quarters
from odcft.plan import CODCPlan


class Views(NamedTuple):
    """A batch as the members see it: the augmented images, and copies for the losses that need them."""

    images: Tensor  # (B, 3, H, W), RGB in 0..1
    rotated: Tensor | None = None  # (B, 3, H, H)
    quarters_B: Tensor | None = None  # by how many quarter turns each was rotated
    mixed: Tensor | None = None  # (B, 3, H, W)
    partner_B: Tensor | None = None  # which image of the batch each was mixed with
    share: float = 1.0  # weight of the image itself in the mixture

    def parts(self, number: int) -> list["Views"]:
        """Consecutive parts of the batch, equally large to within one image; partners are still of the whole batch."""
        if number == 1:
            return [self]
        pieces = [tensor.tensor_split(number) if isinstance(tensor, Tensor) else [tensor] * number for tensor in self]
        return [Views(*of_one) for of_one in zip(*pieces, strict=True)]


def with_copies(images: Tensor, codc: CODCPlan, generator: torch.Generator) -> Views:
    """Add the copies that any member needs.

    Args:
        images: (B, 3, H, W) float, augmented.
        codc: the members, and `alpha` of mixup's Beta distribution.
        generator: for the random draws, on the CPU.

    Returns:
        Rotated copies (Gidaris et al., ICLR 2018) and mixed ones (Zhang et al., ICLR 2018), each only if needed.
    """
    views, device = Views(images), images.device
    if any(member.rotation for member in codc.members):
        quarters_B = torch.randint(4, (len(images),), generator=generator).to(device, non_blocking=True)
        views = views._replace(rotated=rotate_quarters(images, quarters_B), quarters_B=quarters_B)
    if any(member.mixup for member in codc.members):
        partner_B = torch.randperm(len(images), generator=generator).to(device, non_blocking=True)
        share = _beta(codc.alpha, generator)
        mixed = share * images + (1 - share) * images.index_select(0, partner_B)
        views = views._replace(mixed=mixed, partner_B=partner_B, share=share)
    return views


def _beta(alpha: float, generator: torch.Generator) -> float:
    """A draw from Beta(alpha, alpha), on the host (Jöhnk's method: torch's own takes no generator)."""
    while True:
        x, y = (torch.rand(2, generator=generator, dtype=torch.float64) ** (1 / alpha)).tolist()
        if 0 < x + y <= 1:
            return x / (x + y)
