"""Jigsaw puzzles (Noroozi and Favaro, ECCV 2016)."""

from contextlib import nullcontext
from itertools import permutations

import torch
from torch import Tensor, nn

from odcft.backbone.network import Backbone
from odcft.data.augmentation import augment_batch
from odcft.data.images import Images
from odcft.errors import OdcftError
from odcft.plan import Plan


class Jigsaw(nn.Module):
    """Predict the order in which the patches of an image were shuffled (Noroozi and Favaro, ECCV 2016).

    As in the paper, there are 3 x 3 patches and 100 permutations, for images of 96 pixels or more. Smaller images are
    cut into 2 x 2 patches with all 24 permutations: a third of 32 pixels, minus the gap, is too small to show anything.

    Against shortcuts, each patch is cut from a random position in its cell, so that edges do not continue across
    patches; is normalised by its own mean and standard deviation; and is augmented separately (`augment`).
    """

    weight_C = None

    def __init__(self, backbone: Backbone, images: Images, size: int, plan: Plan) -> None:
        super().__init__()
        self.backbone, self.augment = backbone, plan.augment
        self.side = 3 if size >= 96 else 2
        patch = size // self.side * 7 // 8
        if not backbone.accepts_size(patch):
            raise OdcftError(
                f"{backbone.arch} cannot process patches of {patch} pixels, which jigsaw cuts from images of {size}. "
                "Use rotation, a larger --set data.size, or another --arch."
            )
        self.permutation_CP: Tensor
        self.register_buffer(
            "permutation_CP", distant_permutations(self.side**2, 100 if self.side == 3 else 24), persistent=False
        )
        self.head = nn.ModuleDict(
            {
                "patch": nn.Linear(backbone.width, 256),
                "all": nn.Sequential(
                    nn.BatchNorm1d(256 * self.side**2),
                    nn.ReLU(),
                    nn.Linear(256 * self.side**2, len(self.permutation_CP)),
                ),
            }
        )

    def forward(self, images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Map images (B, 3, H, H), RGB in 0..1, to logits (B, C) and targets (B,)."""
        generator = torch.Generator().manual_seed(seed)
        B, P = len(images), self.side**2
        patches = cut_patches(images, self.side, generator)  # (B * P, 3, h, h)
        patches = augment_batch(patches, self.augment, generator)
        mean, std = patches.mean((2, 3), keepdim=True), patches.std((2, 3), keepdim=True)
        patches = (patches - mean) / (
            std + 0.02
        )  # 0.02 so that the noise of a flat patch, such as sky, is not amplified
        answer_B = torch.randint(len(self.permutation_CP), (B,), generator=generator).to(
            images.device, non_blocking=True
        )
        # Always float32 on a CPU: for feature maps of one pixel, torch 2.13's bfloat16 convolutions leave uninitialised
        # memory in the gradients of filter taps that see only padding.
        on_cpu = images.device.type == "cpu"
        with torch.autocast("cpu", enabled=False) if on_cpu else nullcontext():
            features_MF = self.backbone.net(patches)
        features_BPF = self.head["patch"](features_MF).view(B, P, -1)
        shuffled_BPF = features_BPF.gather(1, self.permutation_CP[answer_B].unsqueeze(2).expand_as(features_BPF))
        return self.head["all"](shuffled_BPF.flatten(1)), answer_B


def cut_patches(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Cut a patch at a random position from each cell of a side x side grid: (B, C, H, H) to (B * P, C, h, h).

    The side of a patch is 7 / 8 of the cell's (Noroozi and Favaro: 64 of 75 pixels), so the gap between neighbouring
    patches is 0 to a quarter of a cell.
    """
    B, C, H, _ = images.shape
    cell = H // side
    patch = cell * 7 // 8
    corner_B2P = torch.randint(cell - patch + 1, (B, 2, side * side), generator=generator)
    cell_P = torch.arange(side * side)
    corner_B2P += cell * torch.stack([cell_P // side, cell_P % side])
    offset_h = torch.arange(patch)
    rows, columns = (
        (corner_B2P.unsqueeze(3) + offset_h).to(images.device, non_blocking=True).unbind(1)
    )  # (B, P, h) each
    batch = torch.arange(B, device=images.device).view(B, 1, 1, 1)
    patches = images.permute(0, 2, 3, 1)[batch, rows.unsqueeze(3), columns.unsqueeze(2)]  # (B, P, h, h, C)
    return patches.permute(0, 1, 4, 2, 3).reshape(-1, C, patch, patch)


def distant_permutations(patches: int, count: int) -> Tensor:
    """Return permutations that are easy to tell apart: each has the largest Hamming distance to those before it.

    Args:
        patches: P.
        count: how many permutations, at most P!.

    Returns:
        (count, P) int64; the first is the identity.
    """
    all_permutations = torch.tensor(list(permutations(range(patches))))
    chosen = [0]
    distance = torch.full((len(all_permutations),), patches + 1)
    while len(chosen) < min(count, len(all_permutations)):
        distance = torch.minimum(distance, (all_permutations != all_permutations[chosen[-1]]).sum(1))
        chosen.append(int(distance.argmax()))
    return all_permutations[chosen]
