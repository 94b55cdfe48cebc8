"""Collaborative ODC: several networks share one clustering and so constrain each other.

The slides of Zhan et al. ("Collaborative Online Deep Clustering") name the members and what they reach: DC, ROT (also
predicts rotations), CLS (classifies mixed images by the clustering). They do not give the mechanism, so this one is
ours:

- The samples memory holds the members' compact features side by side, each of unit length over the square root of
  their number: every member has the same say in what is near. From there on it is ODC: one K-Means, one label an image,
  updated in every step.
- The label supervises the head of every member. A member with `rotation` also tells by how many quarters a copy of the
  image was turned; one with `mixup` also classifies mixtures of two images by both labels.

One member without either is ODC, bit for bit; so is every run of ODC and DC a run with one member here.

Shapes: B batch, K clusters, F backbone, D a member's embedding, M members.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from odcft.clustering.odc import begin_epoch, compact, draw, neck, restore, start, stored, targets, update
from odcft.data.augmentation import turned
from odcft.model import Output
from odcft.recipe import CODCRecipe, MemberRecipe

__all__ = ["begin_epoch", "compact", "draw", "neck", "restore", "start", "stored", "targets", "update"]


@dataclass
class Copies:
    """Changed copies of a batch, for members that learn from such."""

    turned: Tensor | None = None  # (B, 3, H, H)
    turn_B: Tensor | None = None  # by how many quarters
    mixed: Tensor | None = None  # (B, 3, H, W)
    partner_B: Tensor | None = None  # with which image of the batch
    share: float = 1.0  # of the image itself


def side_by_side(features: list[Tensor]) -> Tensor:
    """The members' features as one: M of (B, D), as they leave their necks, to (B, M * D). One stays as it is."""
    if len(features) == 1:
        return features[0]
    return torch.cat([F.normalize(features_BD.float(), dim=1, eps=1e-10) for features_BD in features], 1)


def copies(images: Tensor, recipe: CODCRecipe, generator: torch.Generator) -> Copies:
    """The copies that some member learns from.

    Args:
        images: (B, 3, H, W) float, augmented.
        recipe: its members, and `alpha` of mixup's Beta distribution.
        generator: of the draws, on the CPU.

    Returns:
        Turned copies (Gidaris et al., ICLR 2018) and mixed ones (Zhang et al., ICLR 2018), each where one is wanted.
    """
    assert isinstance(recipe.members, list)
    made, device = Copies(), images.device
    if any(member.rotation for member in recipe.members):
        made.turn_B = torch.randint(4, (len(images),), generator=generator).to(device, non_blocking=True)
        made.turned = turned(images, made.turn_B)
    if any(member.mixup for member in recipe.members):
        made.partner_B = torch.randperm(len(images), generator=generator).to(device, non_blocking=True)
        made.share = _beta(recipe.alpha, generator)
        made.mixed = made.share * images + (1 - made.share) * images.index_select(0, made.partner_B)
    return made


def _beta(alpha: float, generator: torch.Generator) -> float:
    """A draw from Beta(alpha, alpha), on the host (Jöhnk's way: torch's own takes no generator)."""
    while True:
        x, y = (torch.rand(2, generator=generator, dtype=torch.float64) ** (1 / alpha)).tolist()
        if 0 < x + y <= 1:
            return x / (x + y)


def losses(
    outputs: list[Output], recipe: CODCRecipe, label_B: Tensor, weight_K: Tensor, made: Copies
) -> tuple[Tensor, Tensor]:
    """What is minimised, and what is shown of it.

    Args:
        outputs: of each member.
        recipe: the members' weights.
        label_B: (B,) labels from the joint memory.
        weight_K: (K,) weights of the clusters.
        made: the copies the members were shown.

    Returns:
        The sum of the members' losses, each with its weights (eq. 1 for one plain member); and the mean cross-entropy
        of the members' clusterings, without weights, so that it can be held against ln K.
    """
    assert isinstance(recipe.members, list)
    terms, clusterings = [], []
    for output, member in zip(outputs, recipe.members, strict=True):
        clustering, rest = _of_member(output, member, label_B, weight_K, made)
        terms += [member.cluster * clustering, *rest] if member.cluster else rest
        clusterings.append(clustering.detach())
    if len(terms) == 1:
        return terms[0], clusterings[0]
    return torch.stack(terms).sum(), torch.stack(clusterings).mean()


def _of_member(
    output: Output, member: MemberRecipe, label_B: Tensor, weight_K: Tensor, made: Copies
) -> tuple[Tensor, list[Tensor]]:
    rest = []
    if member.rotation:
        assert output.turn_logits_B4 is not None
        assert made.turn_B is not None
        rest.append(member.rotation * F.cross_entropy(output.turn_logits_B4.float(), made.turn_B))
    if member.mixup:
        assert output.mixed_logits_BK is not None
        assert made.partner_B is not None
        logits_BK = output.mixed_logits_BK.float()
        one = F.cross_entropy(logits_BK, label_B, weight_K)
        other = F.cross_entropy(logits_BK, label_B.index_select(0, made.partner_B), weight_K)
        rest.append(member.mixup * (made.share * one + (1 - made.share) * other))
    return F.cross_entropy(output.logits_BK.float(), label_B, weight_K), rest
