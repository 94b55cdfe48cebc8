"""Export the backbone, without neck and head, in formats that other software loads.

Every export is read back and compared before it is reported as done.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from odcft import files
from odcft.backbone.load import load_backbone
from odcft.backbone.model_card import base_name
from odcft.backbone.network import Backbone
from odcft.backbone.timm_folder import features_of, write_timm
from odcft.backbone.transformers_export import PREPROCESSOR, write_transformers
from odcft.errors import OdcftError
from odcft.run import output_checks
from odcft.run.folder import EXPORT_FILES
from odcft.run.run_json import about_run

FOLDERS = ("timm", "transformers")
FORMATS = (*FOLDERS, "torchvision", "safetensors", "onnx")


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
    part: str | None = None,
) -> Backbone:
    """Export the backbone of a RUN or of anybody's checkpoint.

    Args:
        source: anything `load_backbone` takes.
        out: a folder for `timm` and `transformers`; a file for `torchvision`, `safetensors` and `onnx`.
        format: one of FORMATS.
        arch: a timm name, to override the checkpoint's own.
        overwrite: replace an earlier export.
        input: the colours the network expects, to override the checkpoint's own.
        allow_partial: accept a checkpoint that covers less than 90 % of the backbone.
        size: image size in pixels, if different from what the source says.
        arch_args: arguments to build the network with, besides its name.
        part: where in the checkpoint to look, if it holds several backbones.

    Returns:
        The backbone that was written.

    Raises:
        OdcftError: an unreadable source, an output that exists, or a format that this backbone cannot be written in.
    """
    if format not in FORMATS:
        raise OdcftError(f"--format {format}: no such format. Choose from {', '.join(FORMATS)}.")
    _refuse_existing(out, format, overwrite)
    output_checks.refuse_unwritable(out / "model.safetensors" if format in FOLDERS else out)
    backbone = load_backbone(source, arch, input, allow_partial, arch_args=arch_args, part=part).backbone
    if size is not None:
        backbone.set_view(replace(backbone.input.view, size=size))
    try:
        _write(backbone, out, format, {"checkpoint": base_name(str(source)), **about_run(Path(source))})
    except OSError as error:
        raise OdcftError(f"{out} cannot be written: {error.strerror or error}. Choose another place.") from None
    return backbone


def _refuse_existing(out: Path, format: str, overwrite: bool) -> None:
    """Refuse an output that exists, unless odcft wrote it and --overwrite allows replacing it."""
    output_checks.refuse_invalid_path(out)
    if out.is_dir():
        found = output_checks.names_in(out, EXPORT_FILES)
        if found and not overwrite:
            raise OdcftError(f"{out} exists. Choose another place, or pass --overwrite.")
        if format not in FOLDERS:
            raise OdcftError(f"{out} is a folder; --format {format} writes a file.")
        output_checks.refuse_foreign_files(out, EXPORT_FILES)
        if found and format == "transformers" and (out.parent / "run.json").is_file():
            raise OdcftError(f"{out} belongs to a RUN, which needs it as it is. Choose another place.")
        if found and not _is_export(out):
            raise OdcftError(f"{out} was not written by odcft, so --overwrite will not touch it. Choose another place.")
        return
    if out.exists() and not overwrite:
        raise OdcftError(f"{out} exists. Choose another place, or pass --overwrite.")
    if out.exists() and format in FOLDERS:
        raise OdcftError(f"{out} is a file; --format {format} writes a folder.")
    output_checks.refuse_foreign_file(out)


def _is_export(folder: Path) -> bool:
    """Whether odcft wrote a folder, according to its config.json."""
    try:
        return "odcft" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _write(backbone: Backbone, out: Path, format: str, about: dict[str, Any]) -> None:
    if format in FOLDERS:
        (write_timm if format == "timm" else write_transformers)(backbone, out, about)
        if format == "timm":  # left by an earlier export to the same place
            (out / PREPROCESSOR).unlink(missing_ok=True)
        return
    if format == "torchvision":
        _require_torchvision_names(backbone)
    with files.new_folder(out.parent), files.atomic_file(out) as unfinished:
        if format == "onnx":
            _write_onnx(backbone, unfinished)
        else:
            _write_tensors(backbone, unfinished, format)


def _write_tensors(backbone: Backbone, out: Path, format: str) -> None:
    tensors = backbone.net.state_dict()
    for name, tensor in tensors.items():
        tensors[name] = tensor.contiguous()
    metadata = {"arch_args": json.dumps(backbone.arch_args), "input": json.dumps(backbone.input.dump())}
    metadata["architecture"] = backbone.arch
    if backbone.model_type:
        metadata["model_type"] = backbone.model_type
    if format == "safetensors":
        files.save_file(tensors, out, metadata={"format": "pt", **metadata})
        written = load_file(out)
    else:
        tensors._metadata["odcft"] = metadata  # type: ignore[attr-defined]  # where torch keeps what is not a tensor
        files.save_checkpoint(tensors, out)
        written = torch.load(out, weights_only=True)
    for name, tensor in tensors.items():
        assert torch.equal(written[name], tensor), f"{out}: {name} was not written correctly"


def _require_torchvision_names(backbone: Backbone) -> None:
    import torchvision.models

    if backbone.arch not in torchvision.models.list_models():
        raise OdcftError(f"torchvision has no {backbone.arch}. Use --format timm or safetensors.")
    expected = torchvision.models.get_model(backbone.arch, weights=None).state_dict()
    unknown = [
        name
        for name, tensor in backbone.net.state_dict().items()
        if name not in expected or expected[name].shape != tensor.shape
    ]
    if unknown:
        raise OdcftError(
            f"torchvision's {backbone.arch} names its tensors differently (it has no {unknown[0]}). "
            "Use --format timm or safetensors."
        )


def _write_onnx(backbone: Backbone, out: Path) -> None:
    """Write the network with its input adapter: RGB images (B, 3, size, size) in 0..1 to features (B, F), for any B."""
    try:
        import onnxruntime
        import onnxscript  # torch's exporter needs it, but its own error is less clear
    except ImportError as error:
        raise OdcftError(f'--format onnx needs {error.name}: pip install "odcft[onnx]".') from None
    import logging
    import warnings

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    backbone = backbone.eval().cpu()
    images = torch.rand(
        3, backbone.input.bands, backbone.size, backbone.size, generator=torch.Generator().manual_seed(0)
    )
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
    except Exception as error:  # the exporter has its own exceptions for operators it does not support
        raise OdcftError(
            f"{backbone.arch} cannot be written as ONNX by torch {torch.__version__} and onnxscript "
            f"{onnxscript.__version__} ({type(error).__name__}). Newer ones may do it: "
            "pip install --upgrade torch torchvision onnxscript. Or use --format timm."
        ) from None
    assert program is not None
    program.model.metadata_props.update({"architecture": backbone.arch, "input": json.dumps(backbone.input.dump())})
    program.save(str(out))
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    for some in (images, images[:1]):
        theirs = torch.from_numpy(session.run(None, {"images": some.numpy()})[0])
        ours = features_of(backbone, some)
        assert (theirs - ours).abs().max() <= 1e-4 * ours.abs().max().clamp(min=1), (
            f"{out} does not give the same features as the network it was exported from"
        )
