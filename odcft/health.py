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


def cluster_sizes(sizes_K: Tensor) -> dict[str, int]:
    """Empty clusters, and the sizes of the smallest and the largest, from (K,) sizes."""
    return {"empty": int((sizes_K == 0).sum()), "smallest": int(sizes_K.min()), "largest": int(sizes_K.max())}


def nmi(before_S: Tensor, after_S: Tensor) -> float:
    """Normalised mutual information of two labellings of this rank's images, (S,) each: 0..1.

    With several ranks it is that of rank 0's share, a random sample of the images.
    """
    from sklearn.metrics import normalized_mutual_info_score

    return float(
        normalized_mutual_info_score(before_S.cpu().numpy(), after_S.cpu().numpy(), average_method="geometric")
    )


def summary(figures: dict[str, float]) -> str:
    return (
        f"loss {figures['loss']:.2f} ({figures['loss_over_ln_k']:.2f} of ln K) · "
        f"labels moving {figures['change_ratio']:.0%} · "
        f"clusters {figures['smallest']} … {figures['largest']} · data wait {figures['data_wait']:.0%}"
    )


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number is finite. The host waits for the device once."""
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    return bool(torch.stack([tensor.isfinite().all() for tensor in floats]).all())


def finite_gradients(model: nn.Module) -> bool:
    """Whether every gradient is finite; after the backward pass of several ranks, the same on all. The host waits."""
    return bool(nn.utils.clip_grad_norm_(model.parameters(), math.inf).isfinite())
