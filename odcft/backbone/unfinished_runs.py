"""What to say when somebody gives a RUN that is still training or was stopped: it has no backbone yet."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from odcft.errors import OdcftError
from odcft.files import read_json
from odcft.recipe import MAX_MEMBERS, load_recipe
from odcft.text import command, count_of, short_repr

LAST_BYTES = 1 << 16  # of the log: more than its last line has


def why_no_backbone(folder: Path) -> str:
    """Why a folder that a run writes has no backbone, how far the run is and what to do; "" for any other folder."""
    if (folder / "state.json").is_file() and (folder / "same.safetensors").is_file():
        return f"{folder} is a saved state, which is only for resuming. Give the RUN itself once it has finished."
    if not ((folder / "run.json").is_file() and (folder / "recipe.yaml").is_file()):
        return ""
    about: dict[str, Any] = {}
    with suppress(OdcftError):
        about = read_json(folder / "run.json")
    resume = _how_to_resume(folder, about)
    if about.get("finished"):
        return f"{folder} is a finished run, but its backbone is gone. Write it again: {resume}"
    said = f"{folder} has not finished training, so it has no backbone yet: {_how_far(folder, about)}. "
    best = folder / "backbone_best"
    if (best / "config.json").is_file():
        said += f"The best epoch so far can be used already, as {best}. "
    return f"{said}If it has stopped, continue it: {resume}"


def _how_far(folder: Path, about: dict[str, Any]) -> str:
    """How many epochs are done, as far as the log says."""
    done = _last_line(folder / "metrics.jsonl").get("epoch")
    epochs: Any = about.get("epochs")  # if it was prolonged
    with suppress(OdcftError):
        epochs = epochs or load_recipe(folder / "recipe.yaml").optim.epochs
    known = isinstance(epochs, int) and 0 < epochs < 10**7
    if not isinstance(done, int | float) or not 0 <= done < 1e7:
        done = 0
    done = round(done) if round(done, 1) == round(done) else round(done, 1)
    return f"{done:,} of {count_of(epochs, 'epoch')} done" if known else f"{count_of(done, 'epoch')} done"


def _how_to_resume(folder: Path, about: dict[str, Any]) -> str:
    """The command that resumes a run, as far as run.json records what it was started from."""
    ckpts = about.get("checkpoint_path", about.get("checkpoint"))
    ckpts = ckpts[:MAX_MEMBERS] if isinstance(ckpts, list) else [ckpts]
    named = [(ckpt, "CKPT") for ckpt in ckpts] + [(about.get("data_path", about.get("data")), "DATA")]
    known = [word if isinstance(word, str) and 0 < len(word) < 4096 else unknown for word, unknown in named]
    options = {"arch": about.get("arch_given"), "reader": about.get("reader")}
    given = {name: value for name, value in options.items() if isinstance(value, str)}
    return short_repr(command("finetune", *known, out=folder, **given, resume=True), 2000, quotes=False)


def _last_line(log: Path) -> dict[str, Any]:
    """The last complete line of a log that may be written right now; {} if there is none."""
    if not log.is_file():
        return {}
    with suppress(OSError, ValueError, TypeError, IndexError, RecursionError):
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LAST_BYTES))
            whole, _, _ = file.read(LAST_BYTES).rpartition(b"\n")
        return dict(json.loads(whole.splitlines()[-1]))
    return {}
