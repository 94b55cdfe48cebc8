"""The backbone without neck and head, as others load it.

Every export is read back and compared before it is called done.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from odcft.backbone import CHANNELS, Backbone, load_backbone
from odcft.errors import OdcftError

FORMATS = ("timm", "torchvision", "safetensors", "onnx")


def export(
    source: str | Path, out: Path, format: str = "timm", arch: str | None = None, overwrite: bool = False
) -> Path:
    """Write the backbone of a RUN or of anybody's checkpoint.

    Args:
        source: what `load_backbone` takes.
        out: `timm`: a folder; `torchvision`, `safetensors`, `onnx`: a file.
        format: one of FORMATS.
        arch: a timm name, where the checkpoint's own is not to be followed.
        overwrite: replace what is there.

    Returns:
        `out`.

    Raises:
        OdcftError: an unreadable source, an output that exists, or a format this backbone cannot have.
    """
    if format not in FORMATS:
        raise OdcftError(f"--format {format}: no such format. Choose from {', '.join(FORMATS)}.")
    if not overwrite and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OdcftError(f"{out} exists. Choose another place, or pass --overwrite.")
    backbone = load_backbone(source, arch).backbone
    try:
        _write(backbone, out, format)
    except OSError as error:
        raise OdcftError(f"{out} cannot be written: {error.strerror or error}. Choose another place.") from None
    return out


def _write(backbone: Backbone, out: Path, format: str) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    if format == "timm":
        write_timm(backbone, out)
    elif format == "onnx":
        _write_onnx(backbone, out)
    else:
        if format == "torchvision":
            _require_torchvision_names(backbone)
        tensors = {name: tensor.contiguous() for name, tensor in backbone.net.state_dict().items()}
        if format == "safetensors":
            save_file(tensors, out, metadata={"format": "pt", "architecture": backbone.arch})
            written = load_file(out)
        else:
            torch.save(tensors, out)
            written = torch.load(out, weights_only=True)
        for name, tensor in tensors.items():
            assert torch.equal(written[name], tensor), f"{out}: {name} did not survive being written"


def write_timm(backbone: Backbone, folder: Path, about: dict[str, Any] | None = None) -> None:
    """A folder that `timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=0)` loads.

    Args:
        backbone: any; its weights are copied to the CPU.
        folder: made, or its config.json and model.safetensors replaced.
        about: said of it in config.json, under "odcft".
    """
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    config = {
        "architecture": backbone.arch.split(".")[0],
        "num_classes": 0,
        "num_features": backbone.width,
        "global_pool": getattr(backbone.net, "global_pool_type", None) or "avg",
        "pretrained_cfg": {
            **{
                k: v
                for k, v in backbone.net.pretrained_cfg.items()
                if k in ("pool_size", "interpolation", "crop_mode", "first_conv", "classifier", "fixed_input_size")
            },
            "input_size": [CHANNELS[backbone.input], backbone.size, backbone.size],
            "mean": list(backbone.mean),
            "std": list(backbone.std),
            "crop_pct": backbone.net.pretrained_cfg.get("crop_pct", 0.875),
            "num_classes": 0,
        },
        "odcft": {**(about or {}), "input": backbone.input},
    }
    if backbone.input != "rgb":
        config["model_args"] = {"in_chans": CHANNELS[backbone.input]}
    config.pop("global_pool")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.net.state_dict().items()}
    save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
    (unfinished / "config.json").write_text(json.dumps(config, indent=2))
    _compare(backbone, unfinished)
    folder.mkdir(parents=True, exist_ok=True)
    for file in unfinished.iterdir():
        file.replace(folder / file.name)
    unfinished.rmdir()


def _compare(backbone: Backbone, folder: Path) -> None:
    """Load the folder as its users will, and compare features."""
    import timm

    net = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    side = backbone.size if backbone.fixed_size else min(64, backbone.size)
    images = torch.rand(2, CHANNELS[backbone.input], side, side, generator=torch.Generator().manual_seed(0))
    device = next(backbone.net.parameters()).device
    was_training = backbone.net.training
    with torch.no_grad():
        ours, theirs = backbone.net.eval()(images.to(device)).float().cpu(), net(images)
    backbone.net.train(was_training)
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4), (
        f"{folder} does not give the features of the network it came from"
    )


def _require_torchvision_names(backbone: Backbone) -> None:
    import torchvision.models

    if backbone.arch not in torchvision.models.list_models():
        raise OdcftError(f"torchvision has no {backbone.arch}. Export it with --format timm or safetensors.")
    theirs = torchvision.models.get_model(backbone.arch, weights=None).state_dict()
    foreign = [
        name
        for name, tensor in backbone.net.state_dict().items()
        if name not in theirs or theirs[name].shape != tensor.shape
    ]
    if foreign:
        raise OdcftError(
            f"torchvision's {backbone.arch} names its tensors differently (it has no {foreign[0]}). "
            "Export it with --format timm or safetensors."
        )


def _write_onnx(backbone: Backbone, out: Path) -> None:
    raise OdcftError(
        "--format onnx is not there yet. Export with --format timm, and use torch.onnx.export on the network."
    )
