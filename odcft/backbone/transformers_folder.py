"""Find the twin in timm of a network that Hugging Face's transformers saved as a folder.

config.json names the family (`model_type`) and its sizes. They are checked here and turned into a name and arguments of
timm's; the tensors are renamed by `transformers_tensors.py`. What the twin cannot compute the same way, such as another
activation, epsilon or position embedding, is refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from odcft.backbone.non_timm_networks import shapes
from odcft.backbone.transformers_tensors import add_class_position, to_timm
from odcft.backbone.transformers_twins import FAMILIES, Plan, has_fixed_size, regnet_name
from odcft.errors import OdcftError
from odcft.text import short_repr

# Outside of every backbone: heads, projections to text, tokens and buffers of pre-training.
_HEADS = re.compile(
    r"(classifier|cls_classifier|distillation_classifier|lm_head|decoder|pooler|text_model|text_projection|"
    r"visual_projection|logit_scale|logit_bias|fpn\d|decode_head|auxiliary_head)(\.|$)|"
    r"(^|.*\.)(mask_token|position_ids|relative_position_index|relative_coords_table|inv_freq)$"
)


@dataclass
class Twin:
    """timm's network that computes what the folder's does, and its tensors."""

    arch: str
    arguments: dict[str, Any]  # for `non_timm_networks.build`
    tensors: dict[str, Tensor]  # by timm's names; heads keep their own
    fixed_size: bool  # whether it takes images of one size only
    notes: list[str] = field(default_factory=list)


def find_twin(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Twin | None:
    """Find timm's twin of the network in a folder of transformers, and give it the folder's tensors.

    Args:
        folder: for messages.
        config: its config.json.
        tensors: its weights, by transformers' names.

    Returns:
        The twin; None for families without one here, and where config.json leaves the sizes out.

    Raises:
        OdcftError: a field has a value that no network has, timm's twin would compute something else, or the tensors
            are not those that config.json describes.
    """
    where = folder / "config.json"
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        return None
    schema, prefix, plan_of = FAMILIES[kind]
    nested = config.get("vision_config")
    if kind in ("clip", "siglip"):
        config = nested if isinstance(nested, Mapping) else {}
    if any(one.is_required() and name not in config for name, one in schema.model_fields.items()):
        return None
    try:
        checked = schema.model_validate(dict(config))
    except ValidationError as error:
        raise OdcftError(
            f"{where}: {_first_error(error, config)}. Use the config.json that was saved with these weights."
        ) from None
    plan = plan_of(checked, where)
    if plan is None:
        return None
    inside, heads = _split(tensors, prefix)
    if kind == "regnet":
        plan.arch = regnet_name(checked, inside, where)
    named = to_timm(inside, plan.table, plan.separate_biases)
    if plan.registers:
        named = add_class_position(named)
    _refuse_other_tensors(where, plan, named)
    return Twin(plan.arch, plan.arguments, {**heads, **named}, has_fixed_size(plan.arch), plan.notes)


def _first_error(error: ValidationError, config: Mapping[str, Any]) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    problem = first["msg"].replace("Input should", "should").replace("List should", "should")
    return f"{name}={short_repr(config.get(name))} {problem}"


def _split(tensors: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The backbone's tensors without their prefix, and the others; without any prefix all are the backbone's."""
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not inside:
        return dict(tensors), {}
    return inside, {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}


def _refuse_other_tensors(where: Path, plan: Plan, named: Mapping[str, Tensor]) -> None:
    """Refuse tensors of another shape than the twin's, and those it has no place for and that are not of a head."""
    own = shapes(plan.arch, **plan.arguments)
    for name, tensor in named.items():
        if name in own and tensor.shape != own[name].shape and tensor.numel() != own[name].numel():
            raise OdcftError(
                f"{where} describes a {plan.arch} whose {name} has the shape {tuple(own[name].shape)}, but in the "
                f"weights it has {tuple(tensor.shape)}. Use the config.json that was saved with these weights."
            )
        if name not in own and not _HEADS.match(name) and tensor.numel():
            raise OdcftError(
                f"{where}: timm's twin of this network, {plan.arch}, has no place for the tensor "
                f"{short_repr(name, 200, quotes=False)}, so it would give other features. Use another checkpoint."
            )
