"""Jigsaw puzzles (Noroozi and Favaro, ECCV 2016)."""

from contextlib import nullcontext
from itertools import permutations

import torch
from torch import Tensor, nn

from odcft.backbone.network import Backbone
from odcft.data.augmentation import augment_batch
from odcft.data.sources import Images
from odcft.errors import OdcftError
from odcft.plan import Plan


class Jigsaw(nn.Module):
    """In which order were the patches laid (Noroozi and Favaro, ECCV 2016)?

    3 x 3 patches and 100 orders as there, from 96 pixels on. Smaller images are cut into 2 x 2, and all 24 orders are
    asked for: a ninth of 32 pixels is 10, less a gap too little to see anything in.

    Against shortcuts: each patch is cut from a random place in its cell, so that edges do not run on; is normalised by
    its own mean and spread; and its colours are jittered or dropped (`augment`) by themselves.
    """

    weight_C = None

    def __init__(self, backbone: Backbone, images: Images, size: int, plan: Plan) -> None:
        super().__init__()
        self.backbone, self.augment = backbone, plan.augment
        self.side = 3 if size >= 96 else 2
        patch = size // self.side * 7 // 8
        if not backbone.takes(patch):
            raise OdcftError(
                f"{backbone.arch} cannot look at patches of {patch} pixels, which jigsaw cuts from images of {size}. "
                "Take rotation, a larger --set data.size, or another --arch."
            )
        self.order_CP: Tensor
        self.register_buffer("order_CP", orders(self.side**2, 100 if self.side == 3 else 24), persistent=False)
        self.head = nn.ModuleDict(
            {
                "patch": nn.Linear(backbone.width, 256),
                "all": nn.Sequential(
                    nn.BatchNorm1d(256 * self.side**2),
                    nn.ReLU(),
                    nn.Linear(256 * self.side**2, len(self.order_CP)),
                ),
            }
        )

    def forward(self, images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, H), RGB in 0..1, to logits (B, C) and answers (B,)."""
        generator = torch.Generator().manual_seed(seed)
        B, P = len(images), self.side**2
        patches = cut(images, self.side, generator)  # (B * P, 3, h, h)
        patches = augment_batch(patches, self.augment, generator)
        mean, spread = patches.mean((2, 3), keepdim=True), patches.std((2, 3), keepdim=True)
        patches = (patches - mean) / (spread + 0.02)  # a patch of sky stays one, its noise is not blown up
        answer_B = torch.randint(len(self.order_CP), (B,), generator=generator).to(images.device, non_blocking=True)
        # On a CPU in float32: on maps of one pixel torch 2.13's bfloat16 convolutions leave uninitialised memory in
        # the gradients of filter taps that see only padding.
        exact = images.device.type == "cpu"
        with torch.autocast("cpu", enabled=False) if exact else nullcontext():
            features_MF = self.backbone.net(patches)
        features_BPF = self.head["patch"](features_MF).view(B, P, -1)
        laid_BPF = features_BPF.gather(1, self.order_CP[answer_B].unsqueeze(2).expand_as(features_BPF))
        return self.head["all"](laid_BPF.flatten(1)), answer_B


def cut(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """A patch from each cell of a side x side grid, at a random place in the cell: (B, C, H, H) to (B * P, C, h, h).

    Patches have 7 / 8 of the cell's side (Noroozi and Favaro: 64 of 75 pixels): no gap, or up to a quarter of the cell.
    """
    B, C, H, _ = images.shape
    cell = H // side
    patch = cell * 7 // 8
    corner_B2P = torch.randint(cell - patch + 1, (B, 2, side * side), generator=generator)
    place = torch.arange(side * side)
    corner_B2P += cell * torch.stack([place // side, place % side])
    span = torch.arange(patch)
    rows, columns = (corner_B2P.unsqueeze(3) + span).to(images.device, non_blocking=True).unbind(1)  # (B, P, h) each
    batch = torch.arange(B, device=images.device).view(B, 1, 1, 1)
    patches = images.permute(0, 2, 3, 1)[batch, rows.unsqueeze(3), columns.unsqueeze(2)]  # (B, P, h, h, C)
    return patches.permute(0, 1, 4, 2, 3).reshape(-1, C, patch, patch)


def orders(patches: int, count: int) -> Tensor:
    """Orders of the patches that are told apart most easily: each is the farthest (Hamming) from those before it.

    Args:
        patches: P.
        count: how many, at most P!.

    Returns:
        (count, P) int64, the first in place.
    """
    every = torch.tensor(list(permutations(range(patches))))
    chosen = [0]
    distance = torch.full((len(every),), patches + 1)
    while len(chosen) < min(count, len(every)):
        distance = torch.minimum(distance, (every != every[chosen[-1]]).sum(1))
        chosen.append(int(distance.argmax()))
    return every[chosen]
