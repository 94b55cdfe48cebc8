"""Which checkpoint a RUN was started from and where it is now, for the *before* column."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from odcft.data.custom_reader import Reader
from odcft.data.view import View
from odcft.errors import OdcftError
from odcft.files import checkpoint_sha256, read_json
from odcft.text import count_of, short_repr

SCHEMES = ("timm", "torchvision", "scratch")


def find_starting_checkpoints(run: str, members: int) -> tuple[list[str], str]:
    """Find the checkpoints a RUN was started from, one per member.

    A path in run.json is trusted only if the file there has the recorded SHA-256. It is looked up as the absolute path
    recorded, and relative to the current folder, the RUN and the folders above it (in one of which the run
    may have been started).

    Args:
        run: anything `load_backbone` takes; only a RUN has starting checkpoints.
        members: how many networks it has.

    Returns:
        The checkpoints and ""; or none and the reason, which is "" for anything that is not a RUN.
    """
    if not (Path(run) / "backbone" / "config.json").exists():
        return [], ""
    try:
        about = read_json(Path(run) / "run.json")
        recorded, sums = _as_list(about["checkpoint"]), _as_list(about["sha256"])
        absolute = _as_list(about.get("checkpoint_path", recorded))
    except (OdcftError, ValueError, KeyError):
        return [], "run.json, which records the starting checkpoint, is missing or damaged"
    if not members == len(recorded) == len(sums) == len(absolute):
        lists, has = count_of(len(recorded), "checkpoint"), count_of(members, "network")
        return [], f"run.json lists {lists}, but the run has {has}"
    found = [_find(*names, Path(run)) for names in zip(recorded, absolute, sums, strict=True)]
    for name, path in zip(recorded, found, strict=True):
        if path is None:
            return [], f"{name}, which the run was started from, was not found with the same contents"
    return [path for path in found if path is not None], ""


def origins_of(ckpt: str) -> set[tuple[str, ...]]:
    """Checksums of a checkpoint, and of a RUN also those of the checkpoints it was started from.

    Two that share one are the same, or runs of the same checkpoint, or one is a run of the other.
    """
    found: set[tuple[str, ...]] = set()
    with suppress(OSError, ValueError):  # not readable, or not a path at all
        found.add((checkpoint_sha256(ckpt),))
    with suppress(OdcftError, OSError, ValueError, KeyError):
        if (Path(ckpt) / "backbone" / "config.json").exists():
            found.add(tuple(_as_list(read_json(Path(ckpt) / "run.json")["sha256"])))
    return found


def load_options_of(run: str, member: int, members: int) -> dict[str, Any]:
    """The options of `load_backbone` that a RUN loaded one of its checkpoints with, from its recipe and run.json."""
    from odcft.recipe import load_options, load_recipe

    options: dict[str, Any] = {}
    with suppress(OdcftError):  # no recipe, or one of another version
        recipe = load_recipe(Path(run) / "recipe.yaml")
        options = {**load_options(recipe, member, members), "seed": recipe.seed}
    with suppress(OdcftError):
        arch = read_json(Path(run) / "run.json").get("arch_given")
        options |= {"arch": arch} if isinstance(arch, str) else {}
    return options


def view_of_run(run: str) -> View | None:
    """How a RUN resized and cropped its images, from its recipe; None without a recipe, or if this is not a RUN.

    Raises:
        OdcftError: the recipe cannot be read. A guess would not do: another size or crop gives other results.
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
    return View(data.size, data.crop_fraction, intensity=intensity, bands=3 if data.bands == "auto" else data.bands)


def reader_note(run: str, reader: Reader | None) -> str:
    """What to say if a RUN was trained on images that were read in another way than those to evaluate on now."""
    recorded = None
    if (Path(run) / "run.json").exists():
        with suppress(OdcftError):
            recorded = read_json(Path(run) / "run.json").get("reader")
    if recorded is None or (reader is not None and reader.name == recorded):
        return ""
    instead = "odcft's own decoders read" if reader is None else f"{reader.name} reads"
    return (
        f"{run} was trained with --reader {short_repr(recorded, 200, quotes=False)}, which is never taken from a file; "
        f"{instead} these images. Pass it again if it should."
    )


def _as_list(value: Any) -> list[str]:
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
            if checkpoint_sha256(path) == checksum:
                return path
        except (OSError, ValueError):  # not readable, or not a path at all
            continue
    return None
