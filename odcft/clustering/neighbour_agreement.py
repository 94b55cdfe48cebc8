"""How alike two augmented views of the same images are in a space of features, by their nearest neighbours."""

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 1024  # compared at a time


def neighbour_agreement(one_NF: Tensor, other_NF: Tensor, k: int = 10) -> float:
    """The share of an image's k nearest neighbours (by cosine) in one view that are its nearest in the other view too.

    Args:
        one_NF, other_NF: float features of two augmented views of the same images.
        k: neighbours, at most N - 1.

    Returns:
        The mean over all images, 0..1. Random features would give k / (N - 1).
    """
    if len(one_NF) != len(other_NF) or not 0 < k < len(one_NF):
        raise ValueError(f"k is {k} for {len(one_NF)} and {len(other_NF)} images")
    views = [F.normalize(view_NF, dim=1) for view_NF in (one_NF, other_NF)]
    common = torch.zeros((), dtype=torch.int64, device=one_NF.device)
    for row_B in torch.arange(len(one_NF), device=one_NF.device).split(ROWS):
        near = []
        for view_NF in views:
            similarity_BN = view_NF[row_B] @ view_NF.T
            similarity_BN.scatter_(1, row_B.unsqueeze(1), -torch.inf)
            near.append(similarity_BN.topk(k, dim=1).indices)
        common += (near[0].unsqueeze(2) == near[1].unsqueeze(1)).sum()
    return int(common) / (k * len(one_NF))
