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

TEMPERATURE = 0.1  # of `instance_loss`


def losses(
    outputs: list[Output],
    codc: CODCPlan,
    label_B: Tensor,
    weight_K: Tensor,
    views: Views,
    whole_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss to minimise, and the loss to log.

    Args:
        outputs: one for each member.
        codc: the weights of the members' losses.
        label_B: (B,) labels from the joint memory.
        weight_K: (K,) loss weights of the clusters.
        views: what the members saw.
        whole_B: if this is a part of a batch, the labels of all of it: the losses are then shares of the batch's, and
            those of its parts add up to them.

    Returns:
        The sum of the members' losses, each with the member's weights: for one plain member eq. 1 with the weights of
        sec. 3.2, sum(w l) / sum(w) over this rank's batch. And the mean over the members of this cross-entropy, before
        the members' own weights, so that it can be compared with ln K.
    """
    terms, cluster_losses = [], []
    for output, member in zip(outputs, codc.members, strict=True):
        cluster_loss = _cross_entropy(output.logits_BK, label_B, weight_K, whole_B)  # eq. 1
        terms += [member.cluster * cluster_loss] if member.cluster else []
        terms += _losses_of_copies(output, member, label_B, weight_K, views, whole_B)
        cluster_losses.append(cluster_loss.detach())
    if len(terms) == 1:
        return terms[0], cluster_losses[0]
    return torch.stack(terms).sum(), torch.stack(cluster_losses).mean()


def instance_loss(features_BD: Tensor, entry_XD: Tensor, own_B: Tensor) -> Tensor:
    """How badly each image's features find its own entry of the samples memory among those of all images of the batch.

    The cross-entropy of the cosines divided by a temperature (instance discrimination with a memory bank, Wu et al.,
    CVPR 2018; InfoNCE, van den Oord et al., 2018).

    Args:
        features_BD: of this pass.
        entry_XD: what the memory holds of the images of the batch, on all ranks; NaN in rows that are no entry.
        own_B: (B,) int64, which of them is the image's own.
    """
    none_X = entry_XD.select(1, 0).isnan()
    entry_XD = F.normalize(entry_XD.masked_fill(none_X.unsqueeze(1), 0), dim=1, eps=1e-10)
    cosine_BX = F.normalize(features_BD.float(), dim=1, eps=1e-10) @ entry_XD.T
    return F.cross_entropy((cosine_BX / TEMPERATURE).masked_fill(none_X, -torch.inf), own_B)


def _cross_entropy(logits_BK: Tensor, label_B: Tensor, weight_K: Tensor, whole_B: Tensor | None) -> Tensor:
    """The weighted mean of the cross-entropy; of a part of a batch, times the part's share of the batch's weights."""
    mean = F.cross_entropy(logits_BK.float(), label_B, weight_K)
    if whole_B is None:
        return mean
    return mean * (weight_K.index_select(0, label_B).sum() / weight_K.index_select(0, whole_B).sum())


def _losses_of_copies(
    output: Output, member: MemberRecipe, label_B: Tensor, weight_K: Tensor, views: Views, whole_B: Tensor | None
) -> list[Tensor]:
    """The weighted losses of one member on rotated and mixed copies; empty for a plain member."""
    terms = []
    if member.rotation:
        assert output.rotation_logits_B4 is not None
        assert views.quarters_B is not None
        rotation_loss = F.cross_entropy(output.rotation_logits_B4.float(), views.quarters_B)
        share = 1 if whole_B is None else len(label_B) / len(whole_B)
        terms.append(member.rotation * share * rotation_loss)
    if member.mixup:
        assert output.mixed_logits_BK is not None
        assert views.partner_B is not None
        partner_label_B = (label_B if whole_B is None else whole_B).index_select(0, views.partner_B)
        one = _cross_entropy(output.mixed_logits_BK, label_B, weight_K, whole_B)
        other = _cross_entropy(output.mixed_logits_BK, partner_label_B, weight_K, whole_B)
        terms.append(member.mixup * (views.share * one + (1 - views.share) * other))
    return terms
