"""The optimizer, its learning-rate schedule (a pure function of the step), and its state for snapshots."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from odcft.recipe import OptimRecipe


def make_optimizer(
    body: Iterable[nn.Parameter], head: Iterable[nn.Parameter], recipe: OptimRecipe
) -> torch.optim.Optimizer:
    """Make an SGD or AdamW optimizer in which the head has its own momentum and learning rate.

    Args:
        body: parameters of the backbone and neck.
        head: parameters of the head.
        recipe: AdamW takes the momenta as its first betas (the second is 0.999). Weight decay applies to matrices and
            filters only with AdamW, to everything with SGD (as in the official code, in which the head also has
            momentum 0 and the same learning rate).
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
    """The learning rate of a training step.

    Args:
        step: counted from 0, over the whole run.
        steps_per_epoch: number of steps in an epoch of this run.
        recipe: `cosine` falls from lr to 0 over the run; `step` is constant, multiplied by final_factor for the last
            final_epochs (sec. 3.4: by 0.1 for 40). Both rise linearly over warmup_epochs first.

    Returns:
        The learning rate of the body; the head's is head_lr times as high.
    """
    assert recipe.epochs != "auto", "the recipe is resolved by now"
    epoch = step / steps_per_epoch
    if epoch < recipe.warmup_epochs:
        return recipe.lr * (step + 1) / (recipe.warmup_epochs * steps_per_epoch)
    if recipe.schedule == "step":
        assert recipe.final_epochs != "auto", "the recipe is resolved by now"
        return recipe.lr * (recipe.final_factor if epoch >= recipe.epochs - recipe.final_epochs else 1.0)
    done = (epoch - recipe.warmup_epochs) / (recipe.epochs - recipe.warmup_epochs)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * done))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group, each times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of the optimizer for a snapshot: "number of the parameter.name" to tensor."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": value
        for number, slots in state.items()
        for name, value in slots.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore what `stored` returned. A tensor of a parameter's shape also gets its memory layout."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in tensors.items():
        number, _, slot = name.partition(".")
        parameter = parameters[int(number)]
        same_shape = value.shape == parameter.shape
        optimizer.state[parameter][slot] = torch.empty_like(parameter).copy_(value) if same_shape else value.clone()
