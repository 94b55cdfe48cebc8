"""Everything that changes from step to step: what a snapshot stores, and what a resumed run restores."""

import math
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from odcft import optim
from odcft.clustering import clusters as clusters_module
from odcft.clustering.clusters import Clusters
from odcft.distributed import dist
from odcft.model.members import Members
from odcft.plan import Plan
from odcft.precision import LossScale


class Window:
    """Sums over the steps between two log lines, on the device, so that no step waits for its figures."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), device=device)
        self.change = torch.zeros((), device=device)
        self.instance_loss: Tensor | None = None  # its sum, and the number of steps that had one; the paper has none
        self.steps = self.images = 0
        self.waited = 0.0
        self.opened = time.perf_counter()

    def add(self, loss: Tensor, change_ratio: Tensor, images: int, instance_loss: Tensor | None = None) -> None:
        """Add the figures of a step: scalar tensors on the device, and the number of images on all ranks."""
        self.loss += loss
        if instance_loss is not None:
            now_2 = torch.stack([instance_loss, torch.ones_like(instance_loss)])
            self.instance_loss = now_2 if self.instance_loss is None else self.instance_loss + now_2
        self.change += change_ratio
        self.steps += 1
        self.images += images

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a snapshot keeps: this rank's own tensors, and what goes into JSON."""
        counts = {"steps": self.steps, "images": self.images, "waited": self.waited}
        own = {"loss": self.loss, "change": self.change}
        own |= {} if self.instance_loss is None else {"instance_loss": self.instance_loss}
        return own, {**counts, "seconds": time.perf_counter() - self.opened}

    def restore(self, own: dict[str, Tensor], counts: dict[str, Any]) -> None:
        """Put back what was `stored`."""
        self.loss.copy_(own["loss"])
        self.change.copy_(own["change"])
        if "instance_loss" in own:
            self.instance_loss = self.loss.new_zeros(2).copy_(own["instance_loss"])
        self.steps, self.images, self.waited = counts["steps"], counts["images"], counts["waited"]
        self.opened = time.perf_counter() - counts["seconds"]

    def close(self, K: int) -> dict[str, float]:
        """Return means over the steps and all ranks, and start a new window."""
        more = [] if self.instance_loss is None else [self.instance_loss[0] / self.instance_loss[1]]
        means = torch.stack([self.loss / self.steps, self.change / self.steps, *more])
        dist.all_sum_(means)
        loss, change, *instance_loss = (means / dist.world_size()).tolist()
        seconds = time.perf_counter() - self.opened
        figures = {
            "loss": loss,
            "loss_over_ln_k": loss / math.log(K),
            "change_ratio": change,
            "images_per_second": self.images / seconds,
            "data_wait": self.waited / seconds,
            **({"instance_loss": instance_loss[0]} if instance_loss else {}),
        }
        self.__init__(self.loss.device)  # type: ignore[misc]
        return figures


@dataclass
class State:
    """A run between two steps. It holds no random generator: random numbers depend only on seed and step (seeds.py)."""

    network: Members
    optimizer: torch.optim.Optimizer
    clusters: Clusters
    window: Window  # the sums since the last log line
    labels_before_S: Tensor  # the labels at the end of the previous epoch, for the NMI
    loss_scale: LossScale  # of float16
    step: int = 0  # how many steps are done
    logged: int = 0  # lines of metrics.jsonl up to this step are kept: `step` as counted by the ranks that saved it
    skipped: int = 0  # how many of the last steps in a row were skipped because a gradient was not finite


def new_state(network: Members, clusters: Clusters, plan: Plan) -> State:
    """The state before the first step."""
    optimizer = optim.make_optimizer(network.body(), network.heads(), plan.optim)
    labels_S = clusters.memory.labels_S
    loss_scale = LossScale(plan.optim.precision == "float16")
    return State(network, optimizer, clusters, Window(labels_S.device), labels_S.clone(), loss_scale)


@dataclass
class Snapshot:
    """A state as it is on disk."""

    same: dict[str, Tensor]  # the same on every rank: weights, optimizer, centroids
    rows: dict[str, Tensor]  # of this rank's images, (S, ...), in row order
    own: dict[str, Tensor] = field(
        default_factory=dict
    )  # other tensors of this rank; floats, because another number of ranks gets their mean
    about: dict[str, Any] = field(default_factory=dict)  # goes into JSON: step, images, recipe …


def stored(state: State, plan: Plan, images: int, steps_per_epoch: int) -> Snapshot:
    """The snapshot of a state.

    Args:
        state: only read.
        plan: of the run.
        images: N.
        steps_per_epoch: stored because another number of ranks may have a different one.
    """
    rows, clusters = clusters_module.stored(state.clusters)
    own, counts = state.window.stored()
    same = {f"method.{name}": tensor for name, tensor in clusters.items()}
    same |= {f"model.{name}": tensor for name, tensor in state.network.state_dict().items()}
    same |= {f"optimizer.{name}": tensor for name, tensor in optim.optimizer_state(state.optimizer).items()}
    about = {
        **{"step": state.step, "steps_per_epoch": steps_per_epoch, "images": images, "skipped": state.skipped},
        **{"loss_scale": state.loss_scale.stored(), "window": counts},
        **{"recipe": plan.model_dump(mode="json"), "versions": versions()},
    }
    return Snapshot(same, {**rows, "labels_before": state.labels_before_S}, own, about)


def restore(state: State, snapshot: Snapshot, steps_per_epoch: int) -> None:
    """Put back what was `stored`, in place; the snapshot may come from another number of ranks."""
    state.network.load_state_dict(under("model.", snapshot.same))
    optim.restore_optimizer(state.optimizer, under("optimizer.", snapshot.same))
    clusters_module.restore(state.clusters, snapshot.rows, under("method.", snapshot.same))
    state.loss_scale.restore(snapshot.about.get("loss_scale", {}))  # states of older versions have none
    state.window.restore(snapshot.own, snapshot.about["window"])
    state.labels_before_S.copy_(snapshot.rows["labels_before"])
    # The same epoch, and as far into it, even if an epoch has a different number of steps now.
    epoch, rest = divmod(snapshot.about["step"], snapshot.about["steps_per_epoch"])
    state.step = epoch * steps_per_epoch + rest * steps_per_epoch // snapshot.about["steps_per_epoch"]
    state.logged, state.skipped = snapshot.about["step"], snapshot.about["skipped"]


def versions() -> dict[str, str]:
    """The versions of odcft and of the packages that affect its results."""
    return {name: version(name) for name in ("odcft", "torch", "timm", "safetensors")}


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, by the rest of the name."""
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
