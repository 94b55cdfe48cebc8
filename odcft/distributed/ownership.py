"""Which images a rank owns: with W ranks, rank r owns images i with i % W == r, and keeps image i at its row i // W."""

import torch
import torch.distributed
from torch import Tensor

from odcft.distributed import dist


def owned(count: int) -> range:
    """The images this rank owns among `count`, in row order."""
    return range(dist.rank(), count, dist.world_size())


def in_dataset_order(rows: Tensor, count: int) -> Tensor:
    """The rows of all ranks in the order of the images.

    Args:
        rows: (S, ...), this rank's, in row order.
        count: N, how many images there are in all.

    Returns:
        (N, ...), the same on every rank.
    """
    if dist.world_size() == 1:
        return rows
    gathered = dist.gather_rows(rows)
    order = torch.cat([torch.arange(r, count, dist.world_size()) for r in range(dist.world_size())]).to(rows.device)
    return torch.empty_like(gathered).index_copy_(0, order, gathered)


PIECE = 65536  # images at a time that travel when some leave


def without(rows: Tensor, left_out: set[int], count: int) -> Tensor:
    """The rows of this rank when some images leave: all others move up, and so most change their rank.

    Args:
        rows: (S, D), this rank's, in row order; a rank that knows none of its rows may have D = 0.
        left_out: images that leave, the same on every rank.
        count: N, how many images there were in all.

    Returns:
        (S', D), this rank's among those that are left.
    """
    ranks, width = dist.world_size(), torch.tensor([rows.shape[1]], device=rows.device)
    if ranks > 1:
        torch.distributed.all_reduce(width, torch.distributed.ReduceOp.MAX)
    if rows.shape[1] < int(width):
        rows = rows.new_zeros(len(rows), int(width))
    kept, place = [], 0
    for start in range(0, count, PIECE):
        images = range(start, min(start + PIECE, count))
        mine = rows[-(-(start - dist.rank()) // ranks) : -(-(images.stop - dist.rank()) // ranks)]
        order = torch.tensor([image for r in range(ranks) for image in images if image % ranks == r])
        stay = torch.tensor([image for image in images if image not in left_out], dtype=torch.int64)
        piece = dist.gather_rows(mine)[torch.argsort(order)][stay - start]  # in the order of the images
        kept.append(piece[(dist.rank() - place) % ranks :: ranks].clone())
        place += len(stay)
    return torch.cat(kept)
