"""Write a backbone as a folder that Hugging Face's transformers loads.

The folder is read back as any other of transformers, and must give the same network, tensors and features, before it is
put in place.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from odcft import files
from odcft.backbone.load import load_backbone
from odcft.backbone.model_card import make_card
from odcft.backbone.network import Backbone
from odcft.backbone.network_input import Input
from odcft.backbone.non_timm_networks import build
from odcft.backbone.timm_folder import features_of, images_to_compare
from odcft.backbone.transformers_configs import CLASSES, Description, activation, describe, refuse
from odcft.backbone.transformers_tensors import add_class_position, to_timm, to_transformers
from odcft.backbone.transformers_twins import FAMILIES, Plan, regnet_name
from odcft.errors import OdcftError

PREPROCESSOR = "preprocessor_config.json"
_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # as PIL numbers them


def write_transformers(backbone: Backbone, folder: Path, about: dict[str, Any] | None = None) -> None:
    """Write a folder with a model card that `transformers.AutoModel.from_pretrained` loads.

    Args:
        backbone: on any device; its weights are copied to the CPU.
        folder: created if needed; its files are replaced.
        about: where it came from, for the model card.

    Raises:
        OdcftError: transformers has no such network, or does not convert images to its input.
    """
    description = describe(backbone)
    preprocessor = _preprocessor(backbone.input, description)
    ours = {name: tensor.detach().cpu() for name, tensor in backbone.net.state_dict().items()}
    plan = _plan(backbone, description)
    theirs = to_transformers(ours, plan.table, description.class_position)
    _refuse_other_network(backbone, description, plan, theirs)
    theirs |= _unused_tokens(description)
    prefix = "vision_model." * (plan.table == "clip")
    config = {
        "architectures": [CLASSES[description.model_type]],
        "model_type": description.model_type,
        **description.config,
        "odcft": version("odcft"),
    }
    with files.atomic_folder(folder) as unfinished:
        tensors = {prefix + name: tensor for name, tensor in theirs.items()}
        files.save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
        (unfinished / "config.json").write_text(json.dumps(config, indent=2))
        (unfinished / PREPROCESSOR).write_text(json.dumps(preprocessor, indent=2))
        _verify(backbone, ours, unfinished, exact=not description.class_position or plan.registers)
        card = make_card(backbone, about or {}, loading_code(backbone, "THIS_FOLDER"))
        (unfinished / "README.md").write_text(card, encoding="utf-8")


def _unused_tokens(description: Description) -> dict[str, Tensor]:
    """Tensors that do nothing here and that transformers would report as missing: a mask token, and 0 registers."""
    width, tokens = description.config.get("hidden_size", 0), {}
    if description.model_type.startswith("dinov2"):
        tokens["embeddings.mask_token"] = torch.zeros(1, width)
    if description.model_type == "dinov3_vit":
        tokens["embeddings.mask_token"] = torch.zeros(1, 1, width)
        if not description.config["num_register_tokens"]:
            tokens["embeddings.register_tokens"] = torch.zeros(1, 0, width)
    return tokens


def loading_code(backbone: Backbone, path: str) -> str:
    """The Python line that loads an exported folder with transformers, and says which output the features are."""
    description = describe(backbone)
    arguments = "".join(f", {name}={value}" for name, value in description.arguments.items())
    name = json.dumps(path, ensure_ascii=False)
    return (
        f"from transformers import AutoModel; net = AutoModel.from_pretrained({name}{arguments}).eval()  "
        f"# features: net(pixel_values).{description.features}"
    )


def _preprocessor(input: Input, description: Description) -> dict[str, Any]:
    """The preprocessor_config.json for an input: resize, centre crop, values in 0..1, mean and std."""
    plain = not any(input.mean) and set(input.std) == {input.range}
    if input.color != "rgb" and not (input.color == "bgr" and description.model_type == "mobilevit" and plain):
        raise OdcftError(
            f"--format transformers: the network takes {input.color}, but transformers' image processors give RGB. "
            "Use --format timm or safetensors."
        )
    config = {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": math.floor(input.size / input.crop_fraction)},
        "resample": _FILTERS[input.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": input.size, "width": input.size},
        "crop_pct": input.crop_fraction,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
    }
    if input.color == "bgr":
        return {
            "image_processor_type": "MobileViTImageProcessor",
            **config,
            "do_normalize": False,
            "do_flip_channel_order": True,
        }
    return {
        "image_processor_type": "BitImageProcessor",
        **config,
        "do_normalize": True,
        "image_mean": [mean / input.range for mean in input.mean],
        "image_std": [std / input.range for std in input.std],
    }


def _plan(backbone: Backbone, description: Description) -> Plan:
    """How odcft would read the description, or a refusal."""
    if description.twin:
        return Plan(description.twin, {}, description.model_type)
    schema, _, plan_of = FAMILIES[description.model_type]
    where = Path("config.json")
    try:
        config = schema.model_validate(description.config)
        plan = plan_of(config, where)
        assert plan is not None
        if description.model_type == "regnet":
            tensors = {name: tensor.detach() for name, tensor in backbone.net.state_dict().items()}
            plan.arch = regnet_name(config, to_transformers(tensors, plan.table), where)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        refuse(backbone, f"{first['loc'][0]}={first['input']}")
    except OdcftError as error:
        refuse(backbone, str(error).removeprefix(f"{where}: ").partition(", so features")[0].rstrip("."))
    return plan


def _refuse_other_network(
    backbone: Backbone, description: Description, plan: Plan, theirs: Mapping[str, Tensor]
) -> None:
    """Refuse a network whose layers are not those of the twin that the description is read as."""
    with torch.device("meta"):
        twin = build(plan.arch, **plan.arguments)
    again = to_timm(theirs, plan.table, plan.separate_biases)
    if plan.registers:
        again = add_class_position(again)
    shapes = {name: (tensor.shape[:1], tensor.numel()) for name, tensor in again.items()}
    wanted = {name: (tensor.shape[:1], tensor.numel()) for name, tensor in twin.state_dict().items()}
    for found, other in ((shapes, wanted), (_layers(backbone.net), _layers(twin))):
        for name in {**found, **other}:
            if name not in other:
                refuse(backbone, f"{description.model_type} has no {name}")
            if name not in found:
                refuse(backbone, f"it has no {name}, as {description.model_type} has")
            if found[name] != other[name]:
                refuse(backbone, f"its {name} differs from that of {description.model_type}")


_NUMBERS = (
    *("eps", "num_heads", "window_size", "shift_size", "pretrained_window_size", "pool_type", "global_pool"),
    *("num_prefix_tokens", "kernel_size", "stride", "padding", "dilation", "groups", "scale"),
    *("temperature", "min_period", "max_period", "normalize_coords", "grid_offset", "grid_indexing", "rotate_half"),
)


def _layers(net: nn.Module) -> dict[str, Any]:
    """What the layers of a network compute, beside their tensors: by "layer" or "layer's number"."""
    found: dict[str, Any] = {}
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == layer.stride[0] == 1:
            continue  # a linear layer may do the same
        for number in _NUMBERS:
            value = getattr(layer, number, None)
            if isinstance(value, int | float | str | tuple | list):
                found[f"{name}'s {number}" if name else number] = value
        if kind := activation(layer):
            found[name] = kind
    return found


def _verify(backbone: Backbone, ours: Mapping[str, Tensor], folder: Path, exact: bool) -> None:
    """Load the folder as any other of transformers, and compare tensors, input and features with the backbone's.

    Args:
        backbone: what was written.
        ours: its tensors, on the CPU.
        folder: where it was written.
        exact: whether all tensors must come back; otherwise the position embedding has got a row of zeros.
    """
    again = load_backbone(folder).backbone
    tensors = again.net.state_dict()
    assert set(tensors) == set(ours), f"{folder} does not hold the tensors of the network it came from"
    for name, tensor in ours.items():
        if exact or name != "pos_embed":
            same = torch.equal(tensors[name].reshape(tensor.shape), tensor)
            assert same, f"{folder}: {name} was not written correctly"
    assert again.input.view == replace(backbone.input.view, intensity=None), f"{folder} describes another input"
    images = images_to_compare(backbone)
    features, theirs = features_of(backbone, images), features_of(again, images)
    assert (theirs - features).abs().max() <= 1e-5 * features.abs().max().clamp(min=1), (
        f"{folder} does not give the features of the network it came from"
    )
