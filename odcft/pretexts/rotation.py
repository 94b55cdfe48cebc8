"""Rotation prediction (Gidaris et al., ICLR 2018)."""

import torch
from torch import Tensor, nn

from odcft.backbone.network import Backbone
from odcft.data.augmentation import augment_batch, rotate_quarters
from odcft.data.images import Images
from odcft.plan import Plan


class Rotation(nn.Module):
    """Predict by how many quarter turns an image was rotated (Gidaris et al., ICLR 2018)."""

    weight_C = None

    def __init__(self, backbone: Backbone, images: Images, size: int, plan: Plan) -> None:
        super().__init__()
        self.backbone, self.augment = backbone, plan.augment
        self.head = nn.Linear(backbone.width, 4)

    def forward(self, images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Map images (B, 3, H, H), RGB in 0..1, to logits (B, 4) and targets (B,)."""
        generator = torch.Generator().manual_seed(seed)
        images = augment_batch(images, self.augment, generator)
        turn_B = torch.randint(4, (len(images),), generator=generator).to(images.device, non_blocking=True)
        return self.head(self.backbone(rotate_quarters(images, turn_B))), turn_B
