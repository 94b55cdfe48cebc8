"""The model card: what a backbone is, where it came from, how it was trained, and how to load it."""

import json
from pathlib import Path
from typing import Any

from odcft.backbone.network import Backbone
from odcft.backbone.non_timm_networks import timm_builds
from odcft.text import code_block, code_span


def loading_code(backbone: Backbone, path: str, folder: bool = True) -> str:
    """The Python line that loads an exported backbone, with timm, or with odcft if timm lacks the network or colours.

    Args:
        backbone: what was exported.
        path: where it was written.
        folder: whether that is a folder; from a file of tensors timm cannot tell the network.
    """
    if folder and timm_builds(backbone.arch, backbone.arch_args) and backbone.input.color in ("rgb", "bands"):
        name = json.dumps(f"local-dir:{path}", ensure_ascii=False)
        return f"import timm; net = timm.create_model({name}, pretrained=True, num_classes=0).eval()"
    name = json.dumps(path, ensure_ascii=False)
    images = "RGB images" if backbone.input.bands == 3 else f"images of {backbone.input.bands} bands"
    return f"import odcft; net = odcft.load_backbone({name}).backbone  # takes {images} in 0..1"


def base_name(source: str) -> str:
    """The name of a checkpoint or a set of images without its parent folders; timm:resnet18 stays as it is."""
    return Path(source).name or source


# Figures from the last line of the log that describe the result, and their titles.
_FIGURES = {
    "epoch": "epochs",
    "loss": "loss",
    "loss_over_ln_k": "loss / ln K (1 is guessing)",
    "change_ratio": "share of labels that still changed",
    "nmi_previous": "NMI with the clusters of the previous epoch",
    "smallest": "images in the smallest cluster",
    "largest": "images in the largest cluster",
}


def make_card(backbone: Backbone, about: dict[str, Any], code: str = "") -> str:
    """Write a README.md for the folder of an exported backbone.

    Args:
        backbone: what was exported.
        about: what `run.run_json.about_run` returns, or only its `checkpoint`.
        code: the Python that loads it; by default with timm or odcft.

    Returns:
        Markdown, in which names from files can break nothing.
    """
    input, source = backbone.input, code_span(str(about.get("checkpoint") or "a checkpoint"))
    trained = "method" in about
    what = f"fine-tuned by {str(about['method']).upper()}" if trained else "without its head"
    lines = [f"# {backbone.arch}, {what}", ""]
    if trained:
        lines.append(
            f"A backbone without head, {backbone.width} features per image: {source}, fine-tuned by odcft on "
            f"{about.get('images', 0):,} unlabelled images ({code_span(str(about.get('data', '')))})."
        )
    else:
        lines.append(f"A backbone without head, {backbone.width} features per image, taken from {source} by odcft.")
    code = code or loading_code(backbone, "THIS_FOLDER").replace("; ", "\n", 1)
    lines += ["", "## Load it", "", "```python", code, "```"]
    lines += ["", "## Input", ""]
    lines.append(
        f"{_COLORS[input.color]}, {input.describe_view()}; values 0..{input.range:g}, "
        f"mean {_numbers(input.mean)}, std {_numbers(input.std)}."
    )
    if not input.measured:
        lines.append(
            "Nothing says which mean and std it was trained with: these are placeholders; measure your images."
        )
    if input.intensity is not None:
        low, high = input.intensity
        lines.append(f"In images with more than 8 bits a channel, {low:g} is black and {high:g} is white.")
    if about.get("reader"):
        lines.append(f"The images were read by a function of the user's own, {code_span(str(about['reader']))}.")
    if input.color not in ("rgb", "bands"):
        lines.append("`odcft.load_backbone` converts images automatically; with timm alone, convert them yourself.")
    if trained:
        lines += ["", "## Before and after", "", before_and_after(about)]
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
    lines.append("You may use these weights as far as the licences of the checkpoint and the images allow.")
    return "\n".join(lines) + "\n"


def before_and_after(about: dict[str, Any]) -> str:
    """What is known of the backbone before and after, and where more is; of a RUN, with a link to its report."""
    first, last = about.get("first_figures") or {}, about.get("figures") or {}
    moved = [
        f"{title} from {first[key]:.2f} to {last[key]:.2f}"
        for key, title in (
            ("loss_over_ln_k", "the loss, relative to ln K,"),
            ("change_ratio", "the share of labels that change in a step"),
        )
        if all(isinstance(line.get(key), int | float) and abs(line[key]) < 1e30 for line in (first, last))
        if first[key] > 0  # no label changes while images keep their first (memory.start_epochs)
    ]
    text = ""
    if isinstance(last.get("knn"), int | float) and abs(last["knn"]) < 1e30:
        text += f"At the end, nearest neighbours on the labelled images of `--eval` were right in {last['knn']:.1f} %. "
    if moved:
        text += f"Training moved {' and '.join(moved)}; these figures do not say whether the features got better. "
    text += "To compare them with those of the checkpoint, run `odcft evaluate RUN LABELLED/`. "
    if about.get("report"):
        text += f"Curves, clusters, and neighbours of images before and after: [report.html]({about['report']})."
    return text.rstrip()


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


_COLORS = {
    "rgb": "RGB",
    "bgr": "BGR",
    "gray": "Gray (0.299 R + 0.587 G + 0.114 B)",
    "lab_l": "The lightness L of CIE Lab",
    "bands": "The bands of the image, in their order",
    "sobel": "The two Sobel gradients of the mean of the normalised RGB channels",
}
