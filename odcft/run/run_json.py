"""What a RUN or a memory was made from: checkpoint, images, recipe, machine; recorded in run.json or memory.json."""

import hashlib
import json
import os
import socket
import uuid
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from odcft.backbone.model_card import base_name
from odcft.clustering.methods import METHODS
from odcft.data.images import Images
from odcft.errors import OdcftError
from odcft.files import checkpoint_sha256, read_json, read_text, write_text_atomically
from odcft.recipe import Recipe, parse_yaml
from odcft.run.folder import Run
from odcft.text import utc_now

MAX_LINE = 1 << 16  # bytes in a line of the log, at most


def about_run(run: Path, member: int = 0) -> dict[str, Any]:
    """What the files of a RUN say about its backbone; {} for anything that is not a RUN.

    Args:
        run: the folder.
        member: the index of the network, if there are several.

    Returns:
        `checkpoint` and `data` (their names, without their folders on this machine), `sha256`, `images`, `method`,
        `clusters`, `epochs`, `seed`; the recipe's text under `recipe`, the last line of the log under `figures`, and
        the first under `first_figures`.
    """
    try:
        run_json = read_json(run / "run.json")
        recipe = read_text(run / "recipe.yaml")
    except OdcftError:
        return {}
    about: dict[str, Any] = {}
    for key in ("checkpoint", "sha256", "data", "images", "reader"):
        value = run_json.get(key)
        if isinstance(value, list):
            value = value[member] if member < len(value) else None
        if isinstance(value, int if key == "images" else str):
            about[key] = value
    about |= {key: base_name(about[key]) for key in ("checkpoint", "data") if isinstance(about.get(key), str)}
    with suppress(ValueError, TypeError, KeyError, OverflowError, OdcftError):
        fields = parse_yaml(recipe, "recipe.yaml")
        if fields["method"] in METHODS:
            about |= {"method": fields["method"], "seed": int(fields["seed"])}
            about |= {"clusters": int(fields["memory"]["clusters"]), "epochs": int(fields["optim"]["epochs"])}
    log = run / "metrics.jsonl"
    return {**about, "recipe": recipe, "figures": _last_line(log), "first_figures": _first_line(log)}


def _first_line(path: Path) -> dict[str, Any]:
    """The first line of a log, parsed; {} if there is none."""
    with suppress(OSError, ValueError, TypeError, RecursionError):
        if path.is_file():
            with path.open("rb") as file:
                return dict(json.loads(file.readline(MAX_LINE)))
    return {}


def _last_line(path: Path) -> dict[str, Any]:
    """The last line of a log of any length, parsed; {} if there is none."""
    with suppress(OSError, ValueError, TypeError, IndexError, RecursionError):
        if path.is_file():
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - MAX_LINE))
                return dict(json.loads(file.read(MAX_LINE).splitlines()[-1]))
    return {}


def write_run_json(run: Run, asked: Recipe, archs: list[str], images: Images) -> None:
    """Write run.json at the start of a run.

    Args:
        run: the RUN, its checkpoints and images.
        asked: the recipe as it was given, `auto` fields and all.
        archs: of the backbones.
        images: those that can be read.
    """
    about = made_from(run.ckpts, archs, run.data, images)
    about |= {"asked": asked.model_dump(mode="json"), "sample": checksums(images)}
    _write(run.out, {**about, "arch_given": run.arch, **made_by(run.ckpts)})


def note_epochs(out: Path, epochs: int) -> None:
    """Note in run.json that the run was prolonged, so that a later --resume need not say it again."""
    _write(out, {**read_json(out / "run.json"), "epochs": epochs})


def note_finished(out: Path, steps: int) -> None:
    """Note in run.json that the run is complete, backbone and all."""
    _write(out, {**read_json(out / "run.json"), "finished": steps, "ended": utc_now()})


def finished_after(out: Path) -> int | None:
    """The number of steps of a completed RUN; None if it is not complete."""
    complete = (out / "clusters.parquet").exists() and (out / "backbone" / "model.safetensors").exists()
    return read_json(out / "run.json").get("finished") if complete else None


def _write(out: Path, about: dict[str, Any]) -> None:
    write_text_atomically(out / "run.json", json.dumps(about, indent=2))


def made_from(ckpts: list[str], archs: list[str], data: str, images: Images) -> dict[str, Any]:
    """The checkpoint and images that a folder is made from, to recognise them again; lists for several checkpoints."""
    several = {"checkpoint": ckpts, "sha256": [checkpoint_sha256(ckpt) for ckpt in ckpts], "arch": archs}
    return {
        **(several if len(ckpts) > 1 else {name: values[0] for name, values in several.items()}),
        "data": str(data),
        **({"data_path": os.path.abspath(data)} if os.path.exists(data) else {}),
        "images": len(images),
        **({"reader": images.reader.name} if images.reader else {}),
    }


def checksums(images: Images, count: int = 64) -> dict[str, str]:
    """Checksums of a sample of the images, spread over the set, to notice changed contents: name to SHA-256."""
    found = {}
    for row in range(0, len(images), max(1, len(images) // count)):
        with suppress(OSError, OdcftError):  # the run skips images that cannot be read
            found[images.names[row]] = hashlib.sha256(images.read(row)).hexdigest()
    return found


def made_by(ckpts: list[str]) -> dict[str, Any]:
    """The version, machine, time and checkpoint files that something was made with, for run.json and memory.json."""
    paths = [str(Path(ckpt).absolute()) if Path(ckpt).exists() else ckpt for ckpt in ckpts]
    return {
        "odcft": version("odcft"),
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "started": utc_now(),
        "checkpoint_path": paths if len(paths) > 1 else paths[0],
    }
