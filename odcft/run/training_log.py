"""The figures of the steps between two log lines."""

import math
import time
from typing import Any

import torch
from torch import Tensor

from odcft.distributed import dist


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
