"""Which rank owns which image: with W ranks, rank r owns image i if i % W == r, and keeps it in its row i // W.

No other module knows this rule. Images are numbered as in the dataset, rows as in the tensors of one rank. Where a
function takes one number, it also takes an integer tensor of them.
"""

from typing import TypeVar, overload

import torch
import torch.distributed
from torch import Tensor

from odcft.distributed import dist

PIECE = 65536  # images handled at a time when some are removed

Index = TypeVar("Index", int, Tensor)


def my_images(count: int) -> range:
    """The images this rank owns among `count`, in row order."""
    return range(dist.rank(), count, dist.world_size())


@overload
def is_mine(image: int) -> bool: ...
@overload
def is_mine(image: Tensor) -> Tensor: ...
def is_mine(image: int | Tensor) -> bool | Tensor:
    """Whether this rank owns an image."""
    return image % dist.world_size() == dist.rank()


def row_of(image: Index) -> Index:
    """The row in which its owner keeps an image."""
    return image // dist.world_size()


def image_of(row: Index, rank: int | None = None, ranks: int | None = None) -> Index:
    """The image in a row: the inverse of `row_of`.

    Args:
        row: of a rank's tensors.
        rank: whose row it is; this rank's by default.
        ranks: how many ranks share the images; as many as there are now by default. A snapshot may be from another
            number of ranks.
    """
    return row * (dist.world_size() if ranks is None else ranks) + (dist.rank() if rank is None else rank)


def in_dataset_order(rows: Tensor, count: int) -> Tensor:
    """The rows of all ranks, ordered by image. Ranks may take any time to get here.

    Args:
        rows: (S, ...), of this rank, in row order.
        count: N, the number of images on all ranks.

    Returns:
        (N, ...), the same on every rank.
    """
    if dist.world_size() == 1:
        return rows
    dist.wait_for_all()
    gathered = dist.gather_rows(rows)
    order = torch.cat([torch.arange(r, count, dist.world_size()) for r in range(dist.world_size())]).to(rows.device)
    return torch.empty_like(gathered).index_copy_(0, order, gathered)


def remove_images(rows: Tensor, left_out: set[int], count: int) -> Tensor:
    """The rows of this rank after some images are removed: the others are renumbered, so most change their rank.

    Args:
        rows: (S, D), of this rank, in row order; a rank whose images could not be read at all may have D = 0.
        left_out: the images to remove, the same on every rank.
        count: N, the number of images on all ranks before.

    Returns:
        (S', D), of this rank, in the new row order.
    """
    ranks, width = dist.world_size(), torch.tensor([rows.shape[1]], device=rows.device)
    if ranks > 1:
        torch.distributed.all_reduce(width, torch.distributed.ReduceOp.MAX)
    if rows.shape[1] < int(width):
        rows = rows.new_zeros(len(rows), int(width))
    pieces, first_new = [], 0  # `first_new`: the new number of the first image kept in a piece
    for start in range(0, count, PIECE):
        images = range(start, min(start + PIECE, count))
        mine = rows[-(-(start - dist.rank()) // ranks) : -(-(images.stop - dist.rank()) // ranks)]
        order = torch.tensor([image for r in range(ranks) for image in images if image % ranks == r])
        kept = torch.tensor([image for image in images if image not in left_out], dtype=torch.int64)
        piece = dist.gather_rows(mine)[torch.argsort(order)][kept - start]  # ordered by image
        pieces.append(piece[(dist.rank() - first_new) % ranks :: ranks].clone())
        first_new += len(kept)
    return torch.cat(pieces)
