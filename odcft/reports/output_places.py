"""Where what a command writes for people may go: not into a RUN or a memory, not among the images, not into each other.

A foreign file in a RUN would block --resume and --overwrite, and pictures among the images would be trained on.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from itertools import permutations
from pathlib import Path

from odcft.errors import OdcftError
from odcft.reports.run_clusters import place_of_images
from odcft.run.output_checks import refuse_invalid_path

OURS = {"RUN": ("run.json", "recipe.yaml"), "memory": ("memory.json", "memory.safetensors")}


def refuse_places(outputs: Mapping[str, Path | None], run: Path, data: str | None) -> None:
    """Refuse outputs that lie where they would do harm later; none may exist or be written yet.

    Args:
        outputs: by the name of their option; None for those that nobody asked for.
        run: the RUN or the memory that is looked at.
        data: where its images are now; None for where they were.

    Raises:
        OdcftError: one lies in a RUN or a memory, among the images, or in another one.
    """
    asked = {option: path for option, path in outputs.items() if path is not None}
    for path in asked.values():
        refuse_invalid_path(path)
        refuse_inside_run(path)
        refuse_among_images(path, run, data)
    for (option, path), (other, outer) in permutations(asked.items(), 2):
        if _lies_in(path, outer):
            raise OdcftError(f"{option} {path} lies in {other} {outer}. Give each output a place of its own.")


def refuse_inside_run(out: Path) -> None:
    """Refuse a place in a RUN or a memory."""
    folders = dict.fromkeys(folder for path in (_absolute(out), _real(out)) for folder in (path, *path.parents))
    for folder in folders:
        for kind, files in OURS.items():
            with suppress(OSError):
                if all((folder / name).is_file() for name in files):
                    raise OdcftError(
                        f"{out} lies in the {kind} {folder}, which holds nothing but what odcft keeps there. "
                        "Choose a place outside."
                    )


def refuse_among_images(out: Path, run: Path, data: str | None) -> None:
    """Refuse a place in the folder of images, if they are in a folder of this machine."""
    source = data
    if source is None:
        with suppress(OdcftError):
            source = place_of_images(run)
    if source is not None and os.path.isdir(source) and _lies_in(out, Path(source)):
        raise OdcftError(
            f"{out} lies in {source}, among the images, where the next run would find it. Choose a place outside."
        )


def _lies_in(path: Path, folder: Path) -> bool:
    return _real(path).is_relative_to(_real(folder)) or _absolute(path).is_relative_to(_absolute(folder))


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))
