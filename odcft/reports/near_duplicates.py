"""Groups of nearly identical images, by the cosine of their whitened features: exact, in blocks of bounded memory.

Shapes: N images, F features, L images that are kept so far.

One image of each group is kept, and every other one is at least as similar to it as the threshold says. So groups do
not grow in chains, and no pair of images is ever stored.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from odcft.data.images import Images
from odcft.data.view import View
from odcft.plan import cores_of_rank
from odcft.reports.contact_sheets import SIDE, Cell, Row, draw_sheet, thumbnails
from odcft.text import count_of

BLOCK, KEPT_BLOCK = 1024, 8192  # images compared at a time, with as many kept ones: a matrix of 32 MB
PIECE = 1 << 14  # rows that are transformed at a time
SMOOTHING = 1e-3  # share of the largest variance below which a direction is noise
SHORT = 128  # coordinates by which most pairs are ruled out
ROUNDING = 1e-4  # of a cosine in float32, far more than it can be off: for the comparison that only rules out
SHOWN, PAGE_GROUPS = 8, 12  # images of a group on a sheet; groups on a page


@dataclass
class Groups:
    """Which images are nearly identical to which.

    Attributes:
        kept_N: for each image the index of the one that is kept of its group; itself if it is kept or alone.
        similarity_N: to that one, float32; 1 for itself.
    """

    kept_N: np.ndarray
    similarity_N: np.ndarray

    @property
    def left(self) -> int:
        """How many images are left if one of each group is kept."""
        return int((self.kept_N == np.arange(len(self.kept_N))).sum())

    def lists(self) -> list[list[int]]:
        """The groups of two or more, the largest first: the kept image, then the others, the most similar first."""
        order = np.lexsort((-self.similarity_N, self.kept_N != np.arange(len(self.kept_N)), self.kept_N))
        ends: np.ndarray = np.flatnonzero(np.diff(self.kept_N[order])) + 1
        groups = [group.tolist() for group in np.split(order, ends) if len(group) > 1]
        return sorted(groups, key=lambda group: (-len(group), group[0]))


def whitened(features_NF: np.ndarray) -> Tensor:
    """Features with their mean subtracted and all directions scaled to equal variance, at unit length, float32 (N, F).

    The plain cosines of a network are all close to 1, and the few directions in which images differ most (bright or
    dark, plain or busy) decide them. Scaled, the details count in which only copies agree. Directions with less than
    SMOOTHING of the largest variance are noise, and are scaled less.
    """
    features = torch.from_numpy(np.array(features_NF, np.float32))  # a copy, changed in place
    N, F = features.shape
    sums = [piece.double().sum(0) for piece in features.split(PIECE)]
    features -= (torch.stack(sums).sum(0) / N).float()
    covariance_FF = torch.zeros(F, F, dtype=torch.float64)
    for piece in features.split(PIECE):
        covariance_FF += (piece.T @ piece).double() / N
    variance_F, directions_FF = torch.linalg.eigh(covariance_FF)
    smooth_F = (variance_F.clamp(min=0) + SMOOTHING * variance_F[-1].clamp(min=1e-30)).sqrt()
    scaled_FF = (directions_FF / smooth_F).float().flip(1).contiguous()  # the largest variance first
    for piece in features.split(PIECE):
        piece.copy_(piece @ scaled_FF)
        piece.div_(piece.norm(dim=1, keepdim=True).clamp(min=1e-12))
    return features


def find_groups(
    unit_NF: Tensor,
    threshold: float,
    first: Sequence[int] | np.ndarray | None = None,
    advance: Callable[[int], object] = lambda count: None,
) -> Groups:
    """Find the groups. The result is that of comparing each image with all that were kept before it.

    Args:
        unit_NF: of unit length, or 0; float32.
        threshold: the least cosine of an image in a group to the one that is kept.
        first: all indices in the order in which images are preferred as the kept one; their own order by default.
        advance: called with the number of images done.
    """
    N, threshold = len(unit_NF), min(threshold, 1 - 1e-6)  # the cosine of equal vectors is 1 but for rounding
    order = torch.arange(N) if first is None else torch.from_numpy(np.array(first, np.int64))
    kept_N: np.ndarray = np.arange(N)
    similarity_N: np.ndarray = np.ones(N, np.float32)
    short_NP = _short(unit_NF)
    kept: list[Tensor] = []  # indices, at most KEPT_BLOCK in each
    for rows_B in order.split(BLOCK):
        best_B, which_B = torch.full((len(rows_B),), -2.0), torch.zeros(len(rows_B), dtype=torch.int64)
        for other_L in kept:
            _compare(unit_NF, short_NP, rows_B, other_L, threshold, best_B, which_B)
        new = _first_of_each(unit_NF, rows_B, threshold, best_B, which_B)
        joined = torch.ones(len(rows_B), dtype=torch.bool)
        joined[new] = False
        kept_N[rows_B[joined].numpy()] = which_B[joined].numpy()
        similarity_N[rows_B[joined].numpy()] = best_B[joined].clamp(max=1).numpy()
        fresh = rows_B[new]
        if kept and len(kept[-1]) + len(fresh) <= KEPT_BLOCK:
            kept[-1] = torch.cat([kept[-1], fresh])
        elif len(fresh):
            kept.append(fresh)
        advance(len(rows_B))
    return Groups(kept_N, similarity_N)


def _short(unit_NF: Tensor) -> Tensor | None:
    """A projection (N, P + 1) in which products are never below the cosines; None where it would save nothing.

    The first columns are the first P coordinates, the last is the length of the rest: of two vectors, the rests have at
    most the product of their lengths as product. `whitened` puts the directions that matter most first.
    """
    N, F = unit_NF.shape
    if F < 2 * SHORT or N < 2 * BLOCK:
        return None
    rests = [piece[:, SHORT:].norm(dim=1, keepdim=True) for piece in unit_NF.split(PIECE)]
    return torch.cat([unit_NF[:, :SHORT], torch.cat(rests)], 1)


def _compare(
    unit_NF: Tensor,
    short_NP: Tensor | None,
    rows_B: Tensor,
    other_L: Tensor,
    threshold: float,
    best_B: Tensor,
    which_B: Tensor,
) -> None:
    """Update the most similar kept image of each row, among those that reach the threshold; the first if several do."""
    here = torch.arange(len(rows_B))
    if short_NP is not None:
        possible = short_NP[rows_B] @ short_NP[other_L].T >= threshold - ROUNDING
        here, other_L = torch.nonzero(possible.any(1))[:, 0], other_L[possible.any(0)]
        if not len(here):
            return
    cosine = unit_NF[rows_B[here]] @ unit_NF[other_L].T
    value, place = cosine.max(1)
    better = (value >= threshold) & (value > best_B[here])
    best_B[here[better]] = value[better]
    which_B[here[better]] = other_L[place[better]]


def _first_of_each(unit_NF: Tensor, rows_B: Tensor, threshold: float, best_B: Tensor, which_B: Tensor) -> Tensor:
    """Go through a block in order: rows that reach no kept image are kept; return which. Others join the best one."""
    cosine = unit_NF[rows_B] @ unit_NF[rows_B].T
    pairs = (cosine >= threshold).triu(1)
    new = torch.ones(len(rows_B), dtype=torch.bool)
    new[best_B >= threshold] = False
    for row in torch.nonzero(pairs.any(1))[:, 0].tolist():
        if not new[row]:
            continue
        later = torch.nonzero(pairs[row])[:, 0]
        better = later[cosine[row, later] > best_B[later]]
        best_B[better] = cosine[row, better]
        which_B[better] = rows_B[row]
        new[later] = False
    return torch.nonzero(new)[:, 0]


def draw_pages(
    groups: Sequence[Sequence[int]], similarity_N: np.ndarray, images: Images, indices: np.ndarray, view: View
) -> Iterator[Image.Image]:
    """Pages of groups, one at a time: the kept image on the left, the others with their similarity.

    Args:
        groups: as from `Groups.lists`.
        similarity_N: of each image to the kept one.
        images: the set.
        indices: of the rows of `similarity_N` in the set.
        view: how they are decoded.
    """
    starts = range(0, len(groups), PAGE_GROUPS)
    threads = 1 if images.reader is not None else cores_of_rank()
    for page, start in enumerate(starts, 1):
        some = [group[:SHOWN] for group in groups[start : start + PAGE_GROUPS]]
        pictures = thumbnails(images, [int(indices[row]) for group in some for row in group], view, threads=threads)
        rows = [
            Row(
                f"group {start + n} · {count_of(len(groups[start + n - 1]), 'image')}",
                [
                    Cell(pictures.get(int(indices[row])), "kept" if not i else f"{similarity_N[row]:.4f}")
                    for i, row in enumerate(group)
                ],
            )
            for n, group in enumerate(some, 1)
        ]
        title = f"Nearly identical images, {page} of {len(starts)} · similarity to the one that is kept"
        yield draw_sheet(title, rows, SHOWN, SIDE)
