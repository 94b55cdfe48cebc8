"""Which checkpoint a RUN was started from, and where that is now: for the column *before*."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from odcft.data.view import View
from odcft.errors import OdcftError
from odcft.files import read_json, sha256

SCHEMES = ("timm", "torchvision", "scratch")


def origins(run: str, members: int) -> tuple[list[str], str]:
    """The checkpoints a RUN was started from, one a member.

    A path that run.json names is believed only where a file with the recorded SHA-256 lies there: as it was recorded,
    absolute; or relative to the current folder, to the RUN, or to a folder above it (that the run was started in).

    Args:
        run: what `load_backbone` takes; anything else than a RUN has no origin.
        members: how many networks it has.

    Returns:
        The checkpoints; or none, and why there is none, in a sentence ("" of what is no RUN).
    """
    if not (Path(run) / "backbone" / "config.json").exists():
        return [], ""
    try:
        about = read_json(Path(run) / "run.json")
        recorded, sums = _listed(about["checkpoint"]), _listed(about["sha256"])
        absolute = _listed(about.get("checkpoint_path", recorded))
    except (OdcftError, ValueError, KeyError):
        return [], "run.json, which says where the run was started from, is missing or damaged"
    if not members == len(recorded) == len(sums) == len(absolute):
        return [], f"run.json tells of {len(recorded)} checkpoints, and the run has {members} networks"
    found = [_find(*names, Path(run)) for names in zip(recorded, absolute, sums, strict=True)]
    for name, path in zip(recorded, found, strict=True):
        if path is None:
            return [], f"{name}, which the run was started from, is not here with the same contents"
    return [path for path in found if path is not None], ""


def given(run: str) -> dict[str, Any]:
    """How a RUN took its checkpoint, by its recipe: what `load_backbone` takes besides it."""
    from odcft.recipe import load_recipe, taken_as

    taken: dict[str, Any] = {}
    with suppress(OdcftError):  # the recipe of another version, or none
        recipe = load_recipe(Path(run) / "recipe.yaml")
        taken = {**taken_as(recipe), "seed": recipe.seed}
    with suppress(OdcftError):
        arch = read_json(Path(run) / "run.json").get("arch_given")
        taken |= {"arch": arch} if isinstance(arch, str) else {}
    return taken


def seen(run: str) -> View | None:
    """How a RUN saw its images, by its recipe; None for anything else, and where the recipe is gone.

    Raises:
        OdcftError: it is there and cannot be read: images seen another way would give other figures.
    """
    from odcft.recipe import load_recipe

    if not (Path(run) / "backbone" / "config.json").exists():
        return None
    if not (Path(run) / "recipe.yaml").exists():
        return None
    data = load_recipe(Path(run) / "recipe.yaml").data
    if data.size == "auto":
        return None
    intensity = None if isinstance(data.range, str) else data.range
    return View(data.size, data.crop_fraction, intensity=intensity)


def _listed(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(one, str) for one in values):
        raise ValueError("not a name")
    return values


def _find(recorded: str, absolute: str, checksum: str, run: Path) -> str | None:
    if recorded.partition(":")[0] in SCHEMES and checksum == recorded and not Path(recorded).exists():
        return recorded
    if not re.fullmatch("[0-9a-f]{64}", checksum):
        return None
    folders = [run, *run.resolve().parents]
    for path in (absolute, recorded, *(str(folder / recorded) for folder in folders)):
        try:
            if sha256(path) == checksum:
                return path
        except (OSError, ValueError):  # not ours to read, or no path at all
            continue
    return None
