"""The optimizer and its schedule, a pure function of the step."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from odcft.recipe import OptimRecipe


def make_optimizer(
    body: Iterable[nn.Parameter], head: Iterable[nn.Parameter], recipe: OptimRecipe
) -> torch.optim.Optimizer:
    """SGD; the head has a momentum and a learning rate of its own (official code: momentum 0, the same rate)."""
    return torch.optim.SGD(
        [
            {"params": [p for p in body if p.requires_grad], "momentum": recipe.momentum, "lr_factor": 1.0},
            {"params": list(head), "momentum": recipe.head_momentum, "lr_factor": recipe.head_lr},
        ],
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
    )


def lr_at(step: int, steps_per_epoch: int, recipe: OptimRecipe) -> float:
    """The learning rate of a step.

    Args:
        step: counted from 0, over the whole run.
        steps_per_epoch: of this run.
        recipe: `cosine` falls from lr to 0 over the run; `step` is constant, and times final_factor for the last
            final_epochs (sec. 3.4: 0.1 for 40). Both rise linearly over warmup_epochs.

    Returns:
        The learning rate of the body; the head's is that times head_lr.
    """
    epoch = step / steps_per_epoch
    if epoch < recipe.warmup_epochs:
        return recipe.lr * (step + 1) / (recipe.warmup_epochs * steps_per_epoch)
    if recipe.schedule == "step":
        return recipe.lr * (recipe.final_factor if epoch >= recipe.epochs - recipe.final_epochs else 1.0)
    done = (epoch - recipe.warmup_epochs) / (recipe.epochs - recipe.warmup_epochs)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * done))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def stored(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer remembers, for a snapshot: "parameter's number.name" to tensor."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": value
        for number, slots in state.items()
        for name, value in slots.items()
        if isinstance(value, Tensor)
    }


def restore(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what was `stored`, each tensor laid out in memory as its parameter is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in tensors.items():
        number, slot = name.split(".", 1)
        parameter = parameters[int(number)]
        optimizer.state[parameter][slot] = torch.empty_like(parameter).copy_(value)
