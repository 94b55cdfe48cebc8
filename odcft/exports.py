"""The backbone without neck and head, as others load it.

Every export is read back and compared before it is called done.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from odcft import folders
from odcft.backbone import Backbone, load_backbone
from odcft.card import about_run, card, name_of
from odcft.errors import OdcftError
from odcft.networks import timm_builds

FORMATS = ("timm", "torchvision", "safetensors", "onnx")


def export(
    source: str | Path,
    out: Path,
    format: str = "timm",
    arch: str | None = None,
    overwrite: bool = False,
    input: str | None = None,
    allow_partial: bool = False,
    size: int | None = None,
    arch_args: dict[str, Any] | None = None,
) -> Backbone:
    """Write the backbone of a RUN or of anybody's checkpoint.

    Args:
        source: what `load_backbone` takes.
        out: `timm`: a folder; `torchvision`, `safetensors`, `onnx`: a file.
        format: one of FORMATS.
        arch: a name, where the checkpoint's own is not to be followed.
        overwrite: replace what is there.
        input: the colours it is shown, where the checkpoint's own are not to be followed.
        allow_partial: accept a checkpoint that covers less than 90 % of the backbone.
        size: pixels it is to be shown, where that is another size than its source says.
        arch_args: what the network is built with besides its name.

    Returns:
        The backbone that was written.

    Raises:
        OdcftError: an unreadable source, an output that exists, or a format this backbone cannot have.
    """
    if format not in FORMATS:
        raise OdcftError(f"--format {format}: no such format. Choose from {', '.join(FORMATS)}.")
    _refuse_others(out, format, overwrite)
    folders.refuse_unwritable(out / "model.safetensors" if format == "timm" else out)
    backbone = load_backbone(source, arch, input, allow_partial, arch_args=arch_args).backbone
    if size is not None:
        backbone.show(replace(backbone.input.view, size=size))
    try:
        _write(backbone, out, format, {"checkpoint": name_of(str(source)), **about_run(Path(source))})
    except OSError as error:
        raise OdcftError(f"{out} cannot be written: {error.strerror or error}. Choose another place.") from None
    return backbone


def _refuse_others(out: Path, format: str, overwrite: bool) -> None:
    """Refuse an output that is there, but for one that odcft wrote and that is to be replaced."""
    folders.refuse_unreachable(out)
    if out.is_dir():
        there = folders.contents(out, folders.BACKBONE_FILES)
        if there and not overwrite:
            raise OdcftError(f"{out} exists. Choose another place, or pass --overwrite.")
        if format != "timm":
            raise OdcftError(f"{out} is a folder; --format {format} writes a file.")
        folders.refuse_strange(out, folders.BACKBONE_FILES)
        if there and not _is_export(out):
            raise OdcftError(f"{out} was not written by odcft, so --overwrite will not touch it. Choose another place.")
        return
    if out.exists() and not overwrite:
        raise OdcftError(f"{out} exists. Choose another place, or pass --overwrite.")
    if out.exists() and format == "timm":
        raise OdcftError(f"{out} is a file; --format timm writes a folder.")
    folders.refuse_file_of_others(out)


def _is_export(folder: Path) -> bool:
    """Whether a folder is of `write_timm`, as its config.json says."""
    try:
        return "odcft" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _write(backbone: Backbone, out: Path, format: str, about: dict[str, Any]) -> None:
    if format == "timm":
        write_timm(backbone, out, about)
        return
    if format == "torchvision":
        _require_torchvision_names(backbone)
    with folders.made(out.parent), folders.whole(out) as unfinished:
        if format == "onnx":
            _write_onnx(backbone, unfinished)
        else:
            _write_tensors(backbone, unfinished, format)


def _write_tensors(backbone: Backbone, out: Path, format: str) -> None:
    tensors = backbone.net.state_dict()
    for name, tensor in tensors.items():
        tensors[name] = tensor.contiguous()
    words = {"arch_args": json.dumps(backbone.kwargs), "input": json.dumps(backbone.input.dump())}
    words["architecture"] = backbone.arch
    if format == "safetensors":
        folders.save_file(tensors, out, metadata={"format": "pt", **words})
        written = load_file(out)
    else:
        tensors._metadata["odcft"] = words  # type: ignore[attr-defined]  # torch's place for what is no tensor
        folders.save_checkpoint(tensors, out)
        written = torch.load(out, weights_only=True)
    for name, tensor in tensors.items():
        assert torch.equal(written[name], tensor), f"{out}: {name} did not survive being written"


def write_timm(backbone: Backbone, folder: Path, about: dict[str, Any] | None = None) -> None:
    """A folder that `timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=0)` loads, with a model card.

    A network that timm does not have is written the same way, for `odcft.load_backbone` to load; timm says that it
    does not know it.

    Args:
        backbone: any; its weights are copied to the CPU.
        folder: made, or its files replaced.
        about: said of it in config.json, under "odcft", and in the card.
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
    if input.channels != 3:
        config["pretrained_cfg"]["first_conv"] = None  # or timm would adapt a first convolution that fits already
    if backbone.kwargs:
        config["model_args"] = backbone.kwargs
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.net.state_dict().items()}
    with folders.filling(folder) as unfinished:
        folders.save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
        (unfinished / "config.json").write_text(json.dumps(config, indent=2))
        _compare(backbone, unfinished)
        (unfinished / "README.md").write_text(card(backbone, about or {}), encoding="utf-8")


def _summary(about: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of where a backbone came from; the card has the recipe and the figures, too."""
    return {key: value for key, value in about.items() if key not in ("recipe", "figures")}


def _compare(backbone: Backbone, folder: Path) -> None:
    """Load the folder as its users will, with timm and with odcft, and compare features."""
    images = _images(backbone)
    ours = _features(backbone, images)
    again = load_backbone(folder).backbone
    theirs = [again(images)]
    if timm_builds(backbone.arch, backbone.kwargs):
        import timm

        net = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
        theirs.append(net(again.adapter(images)))
    for features in theirs:
        # Relative to the features' own size, which without normalisation at the end may be anything.
        assert (features - ours).abs().max() <= 1e-5 * ours.abs().max().clamp(min=1), (
            f"{folder} does not give the features of the network it came from"
        )


def _images(backbone: Backbone) -> Tensor:
    side = backbone.size if backbone.fixed_size else min(max(64, backbone.size // 2), backbone.size)
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _features(backbone: Backbone, images: Tensor) -> Tensor:
    device, was_training = next(backbone.parameters()).device, backbone.training
    features = backbone.eval()(images.to(device)).float().cpu()
    backbone.train(was_training)
    return features


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
    """The network with its adapter: images (B, 3, size, size), RGB in 0..1, to features (B, F), for any B."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch's exporter needs it, and says so less plainly
    except ImportError as error:
        raise OdcftError(f'--format onnx needs {error.name}: pip install "odcft[onnx]".') from None
    import logging
    import warnings

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    backbone = backbone.eval().cpu()
    images = torch.rand(3, 3, backbone.size, backbone.size, generator=torch.Generator().manual_seed(0))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                backbone,
                (images,),
                dynamo=True,
                verbose=False,
                input_names=["images"],
                output_names=["features"],
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            )
    except Exception as error:  # the exporter's own kinds, for whatever operator it does not know
        raise OdcftError(
            f"{backbone.arch} cannot be written as ONNX ({type(error).__name__}). Export it with --format timm."
        ) from None
    assert program is not None
    program.model.metadata_props.update({"architecture": backbone.arch, "input": json.dumps(backbone.input.dump())})
    program.save(str(out))
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    for some in (images, images[:1]):
        theirs = torch.from_numpy(session.run(None, {"images": some.numpy()})[0])
        ours = _features(backbone, some)
        assert (theirs - ours).abs().max() <= 1e-4 * ours.abs().max().clamp(min=1), (
            f"{out} does not give the features of the network it came from"
        )
