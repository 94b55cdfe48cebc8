"""The backbone without neck and head, as others load it.

Every export is read back and compared before it is called done.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from odcft import files
from odcft.backbone.load import load_backbone
from odcft.backbone.model_card import name_of
from odcft.backbone.network import Backbone
from odcft.backbone.timm_folder import features_of, write_timm
from odcft.errors import OdcftError
from odcft.run import output_checks
from odcft.run.folder import BACKBONE_FILES
from odcft.run.identity import about_run

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
    output_checks.refuse_unwritable(out / "model.safetensors" if format == "timm" else out)
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
    output_checks.refuse_unreachable(out)
    if out.is_dir():
        there = output_checks.contents(out, BACKBONE_FILES)
        if there and not overwrite:
            raise OdcftError(f"{out} exists. Choose another place, or pass --overwrite.")
        if format != "timm":
            raise OdcftError(f"{out} is a folder; --format {format} writes a file.")
        output_checks.refuse_strange(out, BACKBONE_FILES)
        if there and not _is_export(out):
            raise OdcftError(f"{out} was not written by odcft, so --overwrite will not touch it. Choose another place.")
        return
    if out.exists() and not overwrite:
        raise OdcftError(f"{out} exists. Choose another place, or pass --overwrite.")
    if out.exists() and format == "timm":
        raise OdcftError(f"{out} is a file; --format timm writes a folder.")
    output_checks.refuse_file_of_others(out)


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
    with files.made(out.parent), files.whole(out) as unfinished:
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
        files.save_file(tensors, out, metadata={"format": "pt", **words})
        written = load_file(out)
    else:
        tensors._metadata["odcft"] = words  # type: ignore[attr-defined]  # torch's place for what is no tensor
        files.save_checkpoint(tensors, out)
        written = torch.load(out, weights_only=True)
    for name, tensor in tensors.items():
        assert torch.equal(written[name], tensor), f"{out}: {name} did not survive being written"


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
        ours = features_of(backbone, some)
        assert (theirs - ours).abs().max() <= 1e-4 * ours.abs().max().clamp(min=1), (
            f"{out} does not give the features of the network it came from"
        )
