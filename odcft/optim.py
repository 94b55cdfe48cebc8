"""The optimizer and its schedule, a pure function of the step."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from odcft.recipe import OptimRecipe


def make_optimizer(
    body: Iterable[nn.Parameter], head: Iterable[nn.Parameter], recipe: OptimRecipe
) -> torch.optim.Optimizer:
    """SGD, or AdamW for transformers; the head has a momentum and a learning rate of its own.

    Args:
        body: backbone and neck.
        head: what stands on them.
        recipe: its momenta are AdamW's first betas (the second is 0.999). AdamW decays matrices and filters only, SGD
            everything (as the official code does, which also gives the head momentum 0 and the same rate).
    """
    parts = [
        ([p for p in body if p.requires_grad], recipe.momentum, 1.0),
        (list(head), recipe.head_momentum, recipe.head_lr),
    ]
    if recipe.optimizer == "sgd":
        groups = [{"params": part, "momentum": m, "lr_factor": factor} for part, m, factor in parts]
        return torch.optim.SGD(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)
    groups = [
        {
            "params": [p for p in part if (p.ndim > 1) == decayed],
            "betas": (m, 0.999),
            "lr_factor": factor,
            "weight_decay": recipe.weight_decay if decayed else 0.0,
        }
        for part, m, factor in parts
        for decayed in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr)


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
        assert recipe.final_epochs != "auto", "the recipe is resolved by now"
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
    """Put back what was `stored`: what has a parameter's shape, laid out in memory as the parameter is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in tensors.items():
        number, _, slot = name.partition(".")
        parameter = parameters[int(number)]
        like = value.shape == parameter.shape
        optimizer.state[parameter][slot] = torch.empty_like(parameter).copy_(value) if like else value.clone()
