"""What is minimised: the weighted cross-entropy of eq. 1, and the losses of CODC's members on rotated and mixed copies.

Shapes: B batch, K clusters.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from odcft.model.neck_and_head import Output
from odcft.model.views import Views
from odcft.plan import CODCPlan
from odcft.recipe import MemberRecipe


def losses(
    outputs: list[Output], codc: CODCPlan, label_B: Tensor, weight_K: Tensor, views: Views
) -> tuple[Tensor, Tensor]:
    """The loss to minimise, and the loss to log.

    Args:
        outputs: one for each member.
        codc: the weights of the members' losses.
        label_B: (B,) labels from the joint memory.
        weight_K: (K,) loss weights of the clusters.
        views: what the members saw.

    Returns:
        The sum of the members' losses, each with the member's weights: for one plain member eq. 1 with the weights of
        sec. 3.2, sum(w l) / sum(w) over this rank's batch. And the mean over the members of this cross-entropy, before
        the members' own weights, so that it can be compared with ln K.
    """
    terms, cluster_losses = [], []
    for output, member in zip(outputs, codc.members, strict=True):
        cluster_loss = F.cross_entropy(output.logits_BK.float(), label_B, weight_K)  # eq. 1
        terms += [member.cluster * cluster_loss] if member.cluster else []
        terms += _losses_of_copies(output, member, label_B, weight_K, views)
        cluster_losses.append(cluster_loss.detach())
    if len(terms) == 1:
        return terms[0], cluster_losses[0]
    return torch.stack(terms).sum(), torch.stack(cluster_losses).mean()


def _losses_of_copies(
    output: Output, member: MemberRecipe, label_B: Tensor, weight_K: Tensor, views: Views
) -> list[Tensor]:
    """The weighted losses of one member on rotated and mixed copies; empty for a plain member."""
    terms = []
    if member.rotation:
        assert output.rotation_logits_B4 is not None
        assert views.quarters_B is not None
        terms.append(member.rotation * F.cross_entropy(output.rotation_logits_B4.float(), views.quarters_B))
    if member.mixup:
        assert output.mixed_logits_BK is not None
        assert views.partner_B is not None
        logits_BK = output.mixed_logits_BK.float()
        one = F.cross_entropy(logits_BK, label_B, weight_K)
        other = F.cross_entropy(logits_BK, label_B.index_select(0, views.partner_B), weight_K)
        terms.append(member.mixup * (views.share * one + (1 - views.share) * other))
    return terms
