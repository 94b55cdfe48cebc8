"""Write a backbone as a folder that timm loads. Every folder is read back and compared before it counts as done."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from odcft import files
from odcft.backbone.load import load_backbone
from odcft.backbone.model_card import make_card
from odcft.backbone.network import Backbone
from odcft.backbone.non_timm_networks import timm_builds


def write_timm(backbone: Backbone, folder: Path, about: dict[str, Any] | None = None) -> None:
    """Write a folder with a model card that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads.

    A network that timm lacks is written the same way, for `odcft.load_backbone`; timm refuses it as unknown.

    Args:
        backbone: on any device; its weights are copied to the CPU.
        folder: created if needed; its files are replaced.
        about: where it came from, for the model card and for config.json under "odcft".
    """
    input, cfg = backbone.input, getattr(backbone.net, "pretrained_cfg", {})
    kept = ("pool_size", "classifier", "fixed_input_size", "first_conv")
    config: dict[str, Any] = {
        "architecture": backbone.arch.split(".")[0],
        "num_classes": 0,
        "num_features": backbone.width,
        "pretrained_cfg": {
            **{key: cfg[key] for key in kept if key in cfg},
            "input_size": [input.channels, input.size, input.size],
            "crop_pct": input.crop_fraction,
            "crop_mode": "center",
            "interpolation": input.interpolation,
            "mean": list(input.mean),
            "std": list(input.std),
            "num_classes": 0,
        },
        "odcft": {**_summary(about or {}), "input": input.dump()},
    }
    if backbone.model_type:
        config["odcft"]["model_type"] = backbone.model_type
    if input.channels != 3:
        # Otherwise timm would adapt a first convolution that already fits.
        config["pretrained_cfg"]["first_conv"] = None
    if backbone.arch_args:
        config["model_args"] = backbone.arch_args
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.net.state_dict().items()}
    with files.atomic_folder(folder) as unfinished:
        files.save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
        (unfinished / "config.json").write_text(json.dumps(config, indent=2))
        _verify(backbone, unfinished)
        (unfinished / "README.md").write_text(make_card(backbone, about or {}), encoding="utf-8")


def _summary(about: dict[str, Any]) -> dict[str, Any]:
    """What config.json says about the backbone's origin; the rest is only in the model card."""
    return {key: value for key, value in about.items() if key not in ("recipe", "figures", "first_figures", "report")}


def _verify(backbone: Backbone, folder: Path) -> None:
    """Load the folder as its users will, with timm and with odcft, and compare features with the backbone's."""
    images = images_to_compare(backbone)
    ours = features_of(backbone, images)
    reloaded = load_backbone(folder).backbone
    theirs = [reloaded(images)]
    if timm_builds(backbone.arch, backbone.arch_args):
        import timm

        net = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
        theirs.append(net(reloaded.adapter(images)))
    for features in theirs:
        # Relative to the largest feature: without a norm at the end features can be of any size.
        assert (features - ours).abs().max() <= 1e-5 * ours.abs().max().clamp(min=1), (
            f"{folder} does not give the features of the network it came from"
        )


def images_to_compare(backbone: Backbone) -> Tensor:
    """Two random images, small ones if the network takes them."""
    side = backbone.size if backbone.fixed_size else min(max(64, backbone.size // 2), backbone.size)
    return torch.rand(2, backbone.input.bands, side, side, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def features_of(backbone: Backbone, images: Tensor) -> Tensor:
    """The backbone's features (B, F) for images, on the CPU and in evaluation mode; its own mode stays as it was."""
    device, was_training = next(backbone.parameters()).device, backbone.training
    features = backbone.eval()(images.to(device)).float().cpu()
    backbone.train(was_training)
    return features
