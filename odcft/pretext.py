"""Pretext tasks: a checkpoint to start from where there is none.

So far rotation prediction (Gidaris et al., ICLR 2018).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odcft.augment import augment_batch
from odcft.backbone import Backbone
from odcft.data import Crops, Images, TrainingOrder, loader, step_seed
from odcft.features import to_float
from odcft.log import Progress
from odcft.optim import lr_at
from odcft.recipe import AugmentRecipe, OptimRecipe


def train_rotation(
    images: Images,
    arch: str,
    size: int,
    out: Path,
    augment: AugmentRecipe,
    optim: OptimRecipe,
    seed: int,
    progress: Progress,
) -> float:
    """Train a backbone to tell by which of 0, 90, 180 and 270 degrees an image was turned, and save it.

    Args:
        images: unlabelled.
        arch: a timm name; it starts from random weights.
        size: pixels.
        out: the .pth to write: a dict with `arch`, `state_dict` (with a 4-way `fc`) and `epoch`, as training code saves
            it.
        augment: applied before the turn.
        optim: epochs, batch_size, lr and so on; the head fields play no part.
        seed: of weights and order.
        progress: where to speak.

    Returns:
        The share of turns told right over the last epoch, on augmented training images: 0..1, by chance 0.25.
    """
    torch.manual_seed(step_seed(seed, 3))
    backbone = Backbone(arch)
    head = nn.Linear(backbone.width, 4)
    network = nn.Sequential(backbone, head).train()
    optimizer = torch.optim.SGD(
        network.parameters(), lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay
    )
    order = TrainingOrder(len(images), optim.batch_size, optim.epochs, seed)
    crops = Crops(images, size, 1.0, augment, seed)
    right = seen = 0
    with progress.phase("Rotation", len(order) * order.batch) as advance:
        for step, batch in enumerate(loader(crops, order, 0, torch.device("cpu"))):
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, order.steps_per_epoch, optim)
            generator = torch.Generator().manual_seed(step_seed(seed, 4, step))
            pixels = augment_batch(to_float(batch.pixels, torch.device("cpu")), augment, generator)
            turn_B = torch.randint(4, (len(pixels),), generator=generator)
            logits_B4 = network(turned(pixels, turn_B))
            loss = F.cross_entropy(logits_B4, turn_B)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step >= order.steps - order.steps_per_epoch:
                right += int((logits_B4.argmax(1) == turn_B).sum())
                seen += len(turn_B)
            advance(len(pixels), f"loss {float(loss.detach()):.2f}")
    state = {**backbone.net.state_dict(), "fc.weight": head.weight.detach(), "fc.bias": head.bias.detach()}
    torch.save({"epoch": optim.epochs, "arch": arch, "state_dict": {f"module.{k}": v for k, v in state.items()}}, out)
    return right / max(1, seen)


def turned(images: Tensor, turn_B: Tensor) -> Tensor:
    """Turn each image by so many quarters: (B, C, H, W) square images and (B,) of 0..3 to (B, C, H, W)."""
    four_4BCHW = torch.stack([torch.rot90(images, k, (2, 3)) for k in range(4)])
    return four_4BCHW[turn_B, torch.arange(len(images))]
