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
        The weighted sum of the members' losses (eq. 1 for one plain member); and the mean cross-entropy of the members
        with the pseudo-labels, without the members' weights, so that it can be compared with ln K.
    """
    terms, clusterings = [], []
    for output, member in zip(outputs, codc.members, strict=True):
        clustering = F.cross_entropy(output.logits_BK.float(), label_B, weight_K)  # eq. 1
        terms += [member.cluster * clustering] if member.cluster else []
        terms += _losses_of_copies(output, member, label_B, weight_K, views)
        clusterings.append(clustering.detach())
    if len(terms) == 1:
        return terms[0], clusterings[0]
    return torch.stack(terms).sum(), torch.stack(clusterings).mean()


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
