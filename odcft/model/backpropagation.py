"""Forward and backward pass of a batch, in one piece or (`optim.accumulate`) in several that need less memory.

Shapes: B batch, K clusters, D embedding.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from odcft.clustering.odc import EntriesToFind
from odcft.distributed import dist
from odcft.model.losses import instance_loss as loss_of_instances
from odcft.model.members import Members, joint_features
from odcft.model.views import Views


class Passed(NamedTuple):
    """What a forward and backward pass gave; all detached."""

    features_BD: Tensor  # the joint features, float32
    loss: Tensor  # that was minimised
    logged_loss: Tensor  # the clusters' part of it, to log (see `losses`)
    instance_loss: Tensor | None  # the rest, if there is any, as a whole: not multiplied by its share


def backpropagate(
    parallel_network: nn.Module,
    network: Members,
    views: Views,
    label_B: Tensor,
    weight_K: Tensor,
    to_find: EntriesToFind | None = None,
    factor: float = 1.0,
) -> Passed:
    """Run a batch through the network, and add the gradients of its loss to those of the parameters.

    Each part's loss is divided by the weights of the whole batch, so that the parts add up to the loss of the batch.
    The ranks exchange gradients once, with the last part. Batch norm sees one part at a time, as it would see the
    images of one process of several.

    Args:
        parallel_network: the network as it runs on all ranks (`on_all_ranks`).
        network: the same, unwrapped.
        views: of the batch; at least 2 images for each part.
        label_B: (B,) labels from the memory.
        weight_K: (K,) loss weights of the clusters.
        to_find: adds the instance loss with the share it says, with the entries of all ranks. With a share of 1, the
            head still learns the labels, but backbone and neck do not learn from it.
        factor: multiplies the gradients (float16: precision.LossScale).
    """
    plan, parts = network.plan, views.parts(network.plan.optim.accumulate)
    whole_B = label_B if len(parts) > 1 else None
    # A rank has fewer images if some cannot be read.
    most = plan.batch_of_rank
    entry_XD = None if to_find is None else dist.gather_filled(to_find.entry_BD, most, fill=torch.nan)
    share = 0.0 if to_find is None else to_find.share
    head_apart = share == 1
    own_B = torch.arange(len(label_B), device=label_B.device) + dist.rank() * most
    done, instance_losses = [], []
    pieces = zip(parts, label_B.tensor_split(len(parts)), own_B.tensor_split(len(parts)), strict=True)
    for part, part_label_B, part_own_B in pieces:
        with dist.exchanging_gradients(parallel_network, part is parts[-1]):
            with plan.autocast(label_B.device):
                outputs = parallel_network(part.images, part.rotated, part.mixed, head_apart)
            loss, logged_loss = network.losses(outputs, part, part_label_B, weight_K, whole_B)
            if entry_XD is not None:
                instances = loss_of_instances(outputs[0].features_BD, entry_XD, part_own_B) * (
                    len(part_own_B) / len(own_B)
                )
                loss = share * instances + (1 if head_apart else 1 - share) * loss
                instance_losses.append(instances.detach())
            (loss * factor if factor != 1 else loss).backward()
        features_BD = joint_features([output.features_BD.detach().float() for output in outputs])
        done.append((features_BD, loss.detach(), logged_loss))
    instance_loss = torch.stack(instance_losses).sum() if instance_losses else None
    if len(done) == 1:
        return Passed(*done[0], instance_loss)
    features, losses, logged_losses = zip(*done, strict=True)
    return Passed(torch.cat(features), torch.stack(losses).sum(), torch.stack(logged_losses).sum(), instance_loss)
