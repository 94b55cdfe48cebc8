"""The model card: what a backbone is, where it came from, how it was trained, and how to load it."""

import json
from pathlib import Path
from typing import Any

from odcft.backbone.network import Backbone
from odcft.backbone.networks import timm_builds
from odcft.data.view import seen_as
from odcft.text import code_block, code_span


def loading_line(backbone: Backbone, path: str, folder: bool = True) -> str:
    """The Python line that loads what was exported: timm's, or ours where timm lacks the network or its colours.

    Args:
        backbone: what was exported.
        path: where.
        folder: whether that is a folder, or a file of tensors, whose network timm does not know.
    """
    if folder and timm_builds(backbone.arch, backbone.kwargs) and backbone.input.color == "rgb":
        name = json.dumps(f"local-dir:{path}", ensure_ascii=False)
        return f"import timm; net = timm.create_model({name}, pretrained=True, num_classes=0).eval()"
    name = json.dumps(path, ensure_ascii=False)
    return f"import odcft; net = odcft.load_backbone({name}).backbone  # takes RGB images in 0..1"


def name_of(source: str) -> str:
    """A checkpoint or a set of images without the folders it lies in; a name (timm:resnet18) as it is."""
    return Path(source).name or source


# Figures of the last line of the log that say something of the result, and how a person calls them.
_FIGURES = {
    "epoch": "epochs",
    "loss": "loss",
    "loss_over_ln_k": "loss / ln K (1 is guessing)",
    "change_ratio": "share of the labels that still moved",
    "nmi_previous": "NMI of the clusters with those of the epoch before",
    "smallest": "images in the smallest cluster",
    "largest": "images in the largest cluster",
}


def card(backbone: Backbone, about: dict[str, Any]) -> str:
    """A README.md for the folder of an exported backbone.

    Args:
        backbone: what was written.
        about: of `about_run`, or at least `checkpoint`.
    """
    input, source = backbone.input, code_span(str(about.get("checkpoint") or "a checkpoint"))
    trained = "method" in about
    what = f"fine-tuned by {str(about['method']).upper()}" if trained else "without its head"
    lines = [f"# {backbone.arch}, {what}", ""]
    if trained:
        lines.append(
            f"A backbone without head, {backbone.width} features an image: {source}, fine-tuned by odcft on "
            f"{about.get('images', 0):,} unlabelled images ({code_span(str(about.get('data', '')))})."
        )
    else:
        lines.append(f"A backbone without head, {backbone.width} features an image, taken from {source} by odcft.")
    lines += ["", "## Load it", "", "```python", loading_line(backbone, "THIS_FOLDER"), "```"]
    lines += ["", "## What it is shown", ""]
    lines.append(
        f"{_SHOWN[input.color]}, {seen_as(input.view)}; values 0..{input.range:g}, "
        f"mean {_numbers(input.mean)}, deviation {_numbers(input.std)}."
    )
    if input.intensity is not None:
        low, high = input.intensity
        lines.append(f"Images of more than 8 bits: {low:g} is black and {high:g} is white.")
    if input.color != "rgb":
        lines.append("`odcft.load_backbone` does this itself; with timm alone you do it.")
    if figures := about.get("figures"):
        lines += ["", "## How the training ended", "", "| | |", "|---|---|"]
        for key, title in _FIGURES.items():
            if isinstance(figures.get(key), int | float) and abs(figures[key]) < 1e30:
                lines.append(f"| {title} | {figures[key]:.4g} |")
    if about.get("sha256"):
        lines += ["", f"SHA-256 of the checkpoint it started from: {code_span(str(about['sha256']))}"]
    if about.get("recipe"):
        lines += ["", "## Recipe", "", code_block(str(about["recipe"]).strip(), "yaml")]
    lines += ["", "## Licence", ""]
    lines.append("The weights are yours, as far as the checkpoint and the images they came from allow.")
    return "\n".join(lines) + "\n"


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


_SHOWN = {
    "rgb": "RGB",
    "bgr": "BGR",
    "gray": "Gray (0.299 R + 0.587 G + 0.114 B)",
    "lab_l": "The lightness L of CIE Lab",
    "sobel": "The two Sobel gradients of the mean of the normalised RGB channels",
}
