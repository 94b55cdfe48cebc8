"""The model card: what a backbone is, where it came from, and how to load it."""

import json
from pathlib import Path
from typing import Any

from odcft.backbone import Backbone, loading_line


def about_run(run: Path) -> dict[str, Any]:
    """What a RUN's files say of its backbone; nothing for any other source."""
    if not (run / "run.json").exists():
        return {}
    about: dict[str, Any] = {
        key: value
        for key, value in json.loads((run / "run.json").read_text()).items()
        if key in ("checkpoint", "sha256", "data", "images", "recipe", "fingerprint")
    }
    if (run / "recipe.yaml").exists():
        about["recipe"] = (run / "recipe.yaml").read_text()
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    if lines:
        about["metrics"] = json.loads(lines[-1])
    return about


def card(backbone: Backbone, about: dict[str, Any]) -> str:
    """A README.md for the folder of an exported backbone.

    Args:
        backbone: what was written.
        about: of `about_run`, or at least `checkpoint`.
    """
    input = backbone.input
    source = about.get("checkpoint", "")
    lines = ["# A backbone", "", f"`{backbone.arch}`, {backbone.width} features, without head. Made with odcft"]
    lines[-1] += f" from `{source}`." if source else "."
    lines += ["", "## Load it", "", "```python"]
    lines.append(loading_line(backbone, "THIS_FOLDER"))
    lines += ["```", "", "## What it is shown", ""]
    lines.append(
        f"Images of {input.size} pixels; colours: {_SHOWN[input.color]}; values 0..{input.range:g}, "
        f"mean {list(input.mean)}, deviation {list(input.std)}."
    )
    if input.color != "rgb":
        lines.append("`odcft.load_backbone` does this itself; with timm alone you do it.")
    if "metrics" in about:
        figures = about["metrics"]
        lines += ["", "## How it was trained", ""]
        lines.append(f"{about.get('images', 0):,} unlabelled images of `{about.get('data', '')}`; the last epoch:")
        lines += ["", *(f"- {key}: {value:.4g}" for key, value in figures.items() if isinstance(value, int | float))]
    for key, title in (("sha256", "SHA-256 of the checkpoint"), ("fingerprint", "Fingerprint of the images")):
        if about.get(key):
            lines += ["", f"{title}: `{about[key]}`"]
    if about.get("recipe"):
        recipe = about["recipe"]
        text = recipe if isinstance(recipe, str) else json.dumps(recipe, indent=2)
        lines += ["", "## Recipe", "", "```yaml", text.strip(), "```"]
    lines += [
        "",
        "## Licence",
        "",
        "The weights are yours, as far as the checkpoint and the images they came from allow.",
    ]
    return "\n".join(lines) + "\n"


_SHOWN = {
    "rgb": "RGB",
    "bgr": "BGR",
    "gray": "gray (0.299 R + 0.587 G + 0.114 B)",
    "lab_l": "the lightness L of CIE Lab",
    "sobel": "the two Sobel gradients of the mean of the normalised RGB channels",
}
