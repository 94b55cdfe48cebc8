"""The stages of a network by depth, and freezing the first of them (`optim.freeze`)."""

from typing import Any

from torch import nn

from odcft.backbone.network import Backbone
from odcft.backbone.non_timm_networks import NamedLayers
from odcft.errors import OdcftError


def stages_by_depth(net: nn.Module) -> list[list[str]]:
    """Names of the parameters of each stage, from the input on: first the stem, then stages or transformer blocks.

    The stages are timm's own groups of layers (`group_matcher(coarse=True)`, by which it sets learning rates). In a
    network that is not timm's, each layer with filters or a matrix is one, with the normalisation that follows it.
    A network whose stages are unknown has none.
    """
    if isinstance(net, NamedLayers):
        found: list[list[str]] = []
        for layer in net.order:
            parameters = dict(net.get_submodule(layer).named_parameters())
            if not found or any(p.ndim > 1 for p in parameters.values()):
                found.append([])
            found[-1] += [f"{layer}.{name}" for name in parameters]
        return found
    from timm.models import group_parameters

    matcher: Any = getattr(net, "group_matcher", None)
    if matcher is None:
        return []
    groups = group_parameters(net, matcher(coarse=True))
    return [groups[number] for number in sorted(groups)]


def check_freezing(backbone: Backbone, count: int) -> list[str]:
    """Refuse to freeze more stages than leave something to learn; notes for the user on what is frozen.

    Raises:
        OdcftError: the network has no more than `count` stages.
    """
    if not count:
        return []
    stages = stages_by_depth(backbone.net)
    if not stages:
        return [f"optim.freeze={count} freezes nothing: the stages of {backbone.arch} are unknown."]
    if count >= len(stages):
        raise OdcftError(
            f"optim.freeze={count} leaves nothing of {backbone.arch} to learn: it has {len(stages)} stages, so "
            f"{len(stages) - 1} is the maximum. Pass --set optim.freeze=0."
        )
    parts = _outermost(backbone.net, {name for stage in stages[:count] for name in stage})
    return [f"Frozen (optim.freeze={count} of the {len(stages)} stages of {backbone.arch}): {', '.join(parts)}."]


def freeze_stages(backbone: Backbone, count: int) -> None:
    """Keep the first stages as they are: no gradients, and no updates of running statistics; dropout is off in them.

    Args:
        backbone: changed in place, and built for its size already.
        count: how many stages; 0: none.
    """
    frozen = {name for stage in stages_by_depth(backbone.net)[:count] for name in stage} if count else set()
    for name, parameter in backbone.net.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    modules = dict(backbone.net.named_modules())
    backbone.frozen = tuple(name for name in _outermost(backbone.net, frozen) if name in modules)
    backbone.train(backbone.training)


def _outermost(net: nn.Module, frozen: set[str]) -> list[str]:
    """The largest modules all of whose parameters are frozen, and frozen parameters outside of them; by name."""
    found: list[str] = []
    parts = [(name, [f"{name}.{key}" for key, _ in module.named_parameters()]) for name, module in net.named_modules()]
    parts += [(name, [name]) for name, _ in net.named_parameters()]
    for name, inner in parts:
        if name and inner and frozen.issuperset(inner) and not f"{name}.".startswith(tuple(f"{o}." for o in found)):
            found.append(name)
    return found
