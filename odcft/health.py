"""The figures of a run and what they say about its health.

Shapes: S images of this rank, K clusters.
"""

import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from odcft import dist


class Window:
    """Sums over the steps between two log lines, on the device, so that no step has to wait for its figures."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), device=device)
        self.change = torch.zeros((), device=device)
        self.steps = self.images = 0
        self.waited = 0.0
        self.opened = self._mark = time.perf_counter()

    def waiting(self) -> None:
        """The loop asks for a batch now."""
        self._mark = time.perf_counter()

    def working(self) -> None:
        """The batch is there."""
        self.waited += time.perf_counter() - self._mark

    def add(self, loss: Tensor, change_ratio: Tensor, images: int) -> None:
        """The figures of a step: two tensors of no dimension on the device, and the images of all ranks."""
        self.loss += loss
        self.change += change_ratio
        self.steps += 1
        self.images += images

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """For a snapshot: what is this rank's own, and what JSON can hold."""
        counts = {"steps": self.steps, "images": self.images, "waited": self.waited}
        return {"loss": self.loss, "change": self.change}, {
            **counts,
            "seconds": time.perf_counter() - self.opened,
        }

    def restore(self, own: dict[str, Tensor], counts: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.loss.copy_(own["loss"])
        self.change.copy_(own["change"])
        self.steps, self.images, self.waited = counts["steps"], counts["images"], counts["waited"]
        self.opened = time.perf_counter() - counts["seconds"]

    def close(self, K: int) -> dict[str, float]:
        """Means since the last line, over all ranks, and a new beginning."""
        sums = torch.stack([self.loss, self.change]) / self.steps
        dist.all_sum_(sums)
        loss, change = (sums / dist.world_size()).tolist()
        seconds = time.perf_counter() - self.opened
        figures = {
            "loss": loss,
            "loss_over_ln_k": loss / math.log(K),
            "change_ratio": change,
            "images_per_second": self.images / seconds,
            "data_wait": self.waited / seconds,
        }
        self.__init__(self.loss.device)  # type: ignore[misc]
        return figures


def cluster_figures(sizes_K: Tensor, centroids_KD: Tensor) -> dict[str, float]:
    """How evenly the images fall into clusters, and how far these are from being one and the same.

    Args:
        sizes_K: (K,) integers, images of each cluster over all ranks.
        centroids_KD: (K, D) float32.

    Returns:
        `empty`, `smallest`, `largest`: numbers of clusters and of images. `largest_share` of all images. `entropy` of
        the sizes over ln K: 1 where all are as large, 0 where one has everything. `centroid_spread`: the centroids'
        mean squared distance from their mean, over their mean squared length: 0 where all are the same, 1 where they
        point in all directions.
    """
    K = len(sizes_K)
    share_K = sizes_K.double() / sizes_K.sum()
    entropy = -torch.special.xlogy(share_K, share_K).sum().clamp(max=0) / math.log(K)
    weight_K = (sizes_K > 0).float() / (sizes_K > 0).sum()
    squares = weight_K @ centroids_KD.square().sum(1)
    spread = (1 - (weight_K @ centroids_KD).square().sum() / squares.clamp(min=1e-12)) * (squares > 1e-12)
    counts = [(sizes_K == 0).sum(), sizes_K.min(), sizes_K.max(), share_K.max(), entropy, spread]
    empty, smallest, largest, share, even, apart = torch.stack([count.double() for count in counts]).tolist()
    return {
        **{"empty": int(empty), "smallest": int(smallest), "largest": int(largest)},
        **{"largest_share": share, "entropy": even, "centroid_spread": apart},
    }


# Where a run looks as if it collapsed. The nearest that healthy runs came (docs/reliability.md) were 0.79 K clusters in
# effect, 3.7 times the even share in the largest, a spread of 0.06, and three epochs above 0.93 ln K.
CHANCE, CHANCE_EPOCHS = 0.98, 3.0  # of ln K, which is what guessing costs
DIVERGED = 1.5  # of ln K: far worse than guessing
EFFECTIVE = 0.5  # of K: exp(entropy) is how many clusters of the same size would be as uneven
SHARE, TIMES_EVEN = 0.1, 10.0  # both: of all images, and of what is its even share
SPREAD = 0.02  # the centroids' cosines are about 0.98 then
SETTLED = (
    50  # steps, in which centroids are renewed five times; those of a new neck are nearly one point, and part later
)


def warnings(lines: list[dict[str, Any]], K: int, method: str = "odc") -> dict[str, str]:
    """What is wrong with a run by its figures, and what helps.

    Args:
        lines: of metrics.jsonl, the newest last.
        K: clusters.
        method: dc's classifiers are at chance for another reason.

    Returns:
        A word for each trouble, and a sentence or two; empty for a healthy run.
    """
    now, found = lines[-1], {}
    lately = [line for line in lines if line["epoch"] > now["epoch"] - CHANCE_EPOCHS]
    gentler = "a milder augmentation or a lower learning rate (docs/small_data.md)"
    if now["loss_over_ln_k"] > DIVERGED:
        found["diverging"] = (
            f"the loss is {now['loss_over_ln_k']:.1f} ln K, worse than guessing: the learning rate is too high. "
            "Try --set optim.lr at a third, or optim.warmup_epochs=1."
        )
    elif now["epoch"] >= CHANCE_EPOCHS and all(line["loss_over_ln_k"] >= CHANCE for line in lately):
        why = f"the labels carry no signal. Try {gentler}."
        if method == "dc":
            why = (
                "a classifier that starts anew learns nothing. Try --set optim.schedule=step, a higher --set "
                "optim.head_lr, or --set dc.interval=2."
            )
        found["chance"] = f"the loss has stayed at ln K for {CHANCE_EPOCHS:.0f} epochs: {why}"
    if now["epoch"] < 1:  # as K-Means and an untrained neck left them
        return found
    effective = K ** now["entropy"]
    if effective < EFFECTIVE * K or now["largest_share"] > max(SHARE, TIMES_EVEN / K):
        found["uneven"] = (
            f"the clusters are as uneven as if there were {effective:,.0f} of them, not {K:,}; the largest has "
            f"{now['largest_share']:.0%} of the images. Try fewer --clusters, or {gentler}."
        )
    if now["centroid_spread"] < SPREAD and now["step"] + 1 >= SETTLED:
        found["alike"] = (
            f"the centroids are nearly one point (spread {now['centroid_spread']:.3f}): the features collapse. "
            f"Try {gentler}."
        )
    return found


def nmi(before_S: Tensor, after_S: Tensor) -> float:
    """Normalised mutual information of two labellings of this rank's images, (S,) each: 0..1.

    With several ranks it is that of rank 0's share, a random sample of the images.
    """
    from sklearn.metrics import normalized_mutual_info_score

    return float(
        normalized_mutual_info_score(before_S.cpu().numpy(), after_S.cpu().numpy(), average_method="geometric")
    )


def summary(figures: dict[str, Any], method: str) -> str:
    """The figures of a line, in words; dc's labels move between epochs only."""
    moving = "" if method == "dc" else f"labels moving {figures['change_ratio']:.0%} · "
    early = "too early to tell" if figures["centroid_spread"] < SPREAD else "healthy"
    condition = "not learning yet" if figures["loss_over_ln_k"] >= CHANCE else early
    kept = f"NMI with the epoch before {figures['nmi_previous']:.2f} · " if "nmi_previous" in figures else ""
    return (
        f"loss {figures['loss']:.2f} ({figures['loss_over_ln_k']:.2f} of ln K) · {moving}{kept}"
        f"clusters {figures['smallest']} … {figures['largest']} · data wait {figures['data_wait']:.0%} · "
        + (", ".join(figures.get("warnings", [])) or condition)
    )


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number is finite. The host waits for the device once."""
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    return bool(torch.stack([tensor.isfinite().all() for tensor in floats]).all())


def finite_gradients(model: nn.Module) -> bool:
    """Whether every gradient is finite; after the backward pass of several ranks, the same on all. The host waits."""
    return bool(nn.utils.clip_grad_norm_(model.parameters(), math.inf).isfinite())
