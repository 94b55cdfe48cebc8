"""The model card: what a backbone is, where it came from, how it was trained, and how to load it."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from odcft.backbone import Backbone, loading_line
from odcft.description import read_json, read_text
from odcft.errors import OdcftError
from odcft.inputs import seen_as
from odcft.recipe import parse_yaml
from odcft.words import code_block, code_span

METHODS = ("odc", "dc", "codc")
LINE = 1 << 16  # bytes that a line of the log has at most


def about_run(run: Path, member: int = 0) -> dict[str, Any]:
    """What a RUN's files say of its backbone; nothing for any other source.

    Args:
        run: the folder.
        member: which of several networks.

    Returns:
        `checkpoint` and `data` (their names, not where they lie on this machine), `sha256`, `images`, `method`,
        `clusters`, `epochs`, `seed`; the recipe's text under `recipe` and the last line of the log under `figures`.
    """
    try:
        run_json = read_json(run / "run.json")
        recipe = read_text(run / "recipe.yaml")
    except OdcftError:
        return {}
    about: dict[str, Any] = {}
    for key in ("checkpoint", "sha256", "data", "images"):
        value = run_json.get(key)
        if isinstance(value, list):
            value = value[member] if member < len(value) else None
        if isinstance(value, int if key == "images" else str):
            about[key] = value
    about |= {key: name_of(about[key]) for key in ("checkpoint", "data") if isinstance(about.get(key), str)}
    with suppress(ValueError, TypeError, KeyError, OverflowError, OdcftError):
        fields = parse_yaml(recipe, "recipe.yaml")
        if fields["method"] in METHODS:
            about |= {"method": fields["method"], "seed": int(fields["seed"])}
            about |= {"clusters": int(fields["memory"]["clusters"]), "epochs": int(fields["optim"]["epochs"])}
    return {**about, "recipe": recipe, "figures": _last_line(run / "metrics.jsonl")}


def _last_line(path: Path) -> dict[str, Any]:
    """The last object of a log of any length; {} where there is none."""
    with suppress(OSError, ValueError, TypeError, IndexError, RecursionError):
        if path.is_file():
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - LINE))
                return dict(json.loads(file.read(LINE).splitlines()[-1]))
    return {}


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
