"""The layout of the folders that odcft writes, and their lists of images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from odcft.data.custom_reader import Reader
from odcft.data.images import Images
from odcft.files import read_column, write_table, write_text_atomically
from odcft.plan import Plan
from odcft.recipe import MAX_MEMBERS, dump

# What odcft writes into a folder, which is all that --overwrite may remove: a name or pattern maps to None for a file,
# or to the layout of a folder.
Layout = dict[str, Any]
LOCK = "lock"
BACKBONE_FILES: Layout = {"config.json": None, "model.safetensors": None, "README.md": None}
EXPORT_FILES: Layout = {**BACKBONE_FILES, "preprocessor_config.json": None}
BACKBONES = ("backbone", *(f"backbone_{member}" for member in range(2, MAX_MEMBERS + 1)))  # of codc, in order
BEST_BACKBONES = tuple(name.replace("backbone", "backbone_best") for name in BACKBONES)  # of the best epoch, by --eval
MEMORY_FILES: Layout = dict.fromkeys(
    ("memory.safetensors", "neck.safetensors", "memory.json", "images.csv", "quarantine.csv", LOCK)
)
PICTURE_FILES: Layout = {5 * "[0-9]": {8 * "[0-9]" + ".webp": None, 8 * "[0-9]" + ".jpeg": None}}  # of a report
STEP = "step-" + 9 * "[0-9]"
STATE_FILES: Layout = {"same.safetensors": None, "rank-*-of-*.safetensors": None, "state.json": None}
RUN_FILES: Layout = {
    **dict.fromkeys(("recipe.yaml", "run.json", "metrics.jsonl", "images.csv", "quarantine.csv", LOCK)),
    **dict.fromkeys(("clusters.parquet", "report.html")),
    **dict.fromkeys((*BACKBONES, *BEST_BACKBONES), BACKBONE_FILES),
    "report_pictures": PICTURE_FILES,
    "checkpoints": {STEP: STATE_FILES, f"damaged-{STEP}": STATE_FILES},
    "tensorboard": {"events.out.tfevents.*": None},
}
# All that a RUN holds before its first state and its first step.
FILES_BEFORE_FIRST_STEP = {
    "recipe.yaml",
    "run.json",
    "images.csv",
    "quarantine.csv",
    "checkpoints",
    "metrics.jsonl",
    "tensorboard",
}
MAY_BE_LINKS = ("checkpoints", "tensorboard")  # may be links to folders of the user's, e.g. on another disk


@dataclass(frozen=True)
class Run:
    """A folder that odcft writes, and what it is made from.

    Attributes:
        out: the folder.
        ckpts: what `load_backbone` takes, one for each member.
        data: what `find_images` takes.
        arch: given by the user instead of the checkpoint's own.
        reader: the user's function that reads the images.
    """

    out: Path
    ckpts: list[str]
    data: str
    arch: str | None = None
    reader: Reader | None = None


def write_recipe(out: Path, plan: Plan) -> None:
    """Write recipe.yaml: the plan, with nothing left to decide."""
    write_text_atomically(out / "recipe.yaml", dump(plan))


def write_image_lists(images: Images, unreadable: dict[str, str], out: Path) -> None:
    """Write images.csv, and quarantine.csv if images could not be read (name: reason); names keep their bytes."""
    write_table(out / "images.csv", ["row", "path"], enumerate(images.names))
    if unreadable:
        write_table(out / "quarantine.csv", ["path", "reason"], unreadable.items())


def read_quarantine(folder: Path) -> dict[str, str]:
    """The images that could not be read when a RUN was started or a memory was made: name to reason."""
    path = folder / "quarantine.csv"
    if not path.exists():
        return {}
    return dict(zip(read_column(path, "path"), read_column(path, "reason"), strict=True))
