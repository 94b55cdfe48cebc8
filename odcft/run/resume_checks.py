"""Checks before a RUN is resumed: recipe, checkpoints and images must be those that it was started with."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from odcft.data.custom_reader import Reader, refuse_other_reader
from odcft.data.images import Images
from odcft.data.names import Names
from odcft.data.sources import find_images
from odcft.errors import OdcftError
from odcft.files import checkpoint_sha256, iterate_column, read_json
from odcft.progress import Progress
from odcft.recipe import MAX_EPOCHS, Recipe, flatten, make_recipe
from odcft.run.folder import read_quarantine
from odcft.text import short_repr

# Speed, how often a run logs, and when it gives up: these do not change the result.
MAY_CHANGE = ("data.workers", "data.max_broken", "data.cache", "log")


def read_run_json(run: Path) -> dict[str, Any]:
    """run.json: what the RUN was started from.

    Raises:
        OdcftError: it does not exist, or is not as this version of odcft writes it.
    """
    try:
        about = read_json(run / "run.json")
        for name, kind in (("checkpoint", str | list), ("sha256", str | list), ("asked", dict), ("sample", dict)):
            if not isinstance(about[name], kind):
                raise ValueError(f"{name}={short_repr(about[name])}")
        if not isinstance(about.get("arch_given"), str | None):
            raise ValueError(f"arch_given={short_repr(about['arch_given'])}")
        return about
    except (OdcftError, ValueError, KeyError) as error:
        raise OdcftError(
            f"{run} cannot be resumed: its run.json is missing or not from this version of odcft ({error}). "
            "Start over with --overwrite, or choose another --out."
        ) from None


def refuse_malformed_state(run: Path, saved: dict[str, Any]) -> None:
    """Refuse a state whose state.json is not as a run writes it, before anything in it is used."""
    kinds = (("recipe", dict), ("versions", dict), ("window", dict), ("steps_per_epoch", int), ("skipped", int))
    odd = next((name for name, kind in kinds if not isinstance(saved.get(name), kind)), "")
    if not odd and not _is_loss_scale(saved.get("loss_scale", {})):
        odd = "loss_scale"
    if not odd and saved["steps_per_epoch"] < 1:
        odd = "steps_per_epoch"
    if not odd:
        groups = {name: saved["recipe"].get(name) for name in ("data", "optim", "memory")}
        odd = next((f"recipe.{name}" for name, group in groups.items() if not isinstance(group, dict)), "")
    if not odd and "auto" in (saved["recipe"]["optim"].get(name, "auto") for name in ("epochs", "final_epochs")):
        odd = "recipe.optim"
    if odd:
        raise OdcftError(
            f"{run} cannot be resumed: {odd} is missing or wrong in its newest state. "
            "Start over with --overwrite, or choose another --out."
        )
    make_recipe(saved["recipe"], f"the recipe of {run}'s newest state")


def _is_loss_scale(stored: Any) -> bool:
    """Whether it is what `LossScale.stored` returns."""
    if not isinstance(stored, dict) or (stored and set(stored) != {"factor", "good_steps"}):
        return False
    return all(isinstance(value, int | float) and 0 <= value < 1e30 for value in stored.values())


def resumed_recipe(
    given: Recipe,
    epochs: int | None,
    run: Path,
    about: dict[str, Any],
    saved: dict[str, Any],
    say: Callable[[str], None] = lambda line: None,
) -> Recipe:
    """The recipe of a RUN, with the changes that a resumed run may make.

    Args:
        given: the recipe given now, whose fields may still be `auto`. What it leaves at its default, such as the seed
            of most recipes, stays as the RUN was started with.
        epochs: the new total number of epochs, or None to keep it.
        run: for the message.
        about: its run.json, with the recipe as given at the start, and the epochs if it was prolonged before.
        saved: the state.json of its state, with the resolved recipe and the number of steps done.
        say: prints a note.

    Raises:
        OdcftError: names the first field that differs.
    """
    # Runs older than data.range used the full range of the image type; those older than data.decoder used Pillow.
    then_recipe = {**saved["recipe"], "data": {"range": "full", "decoder": "pil", **saved["recipe"]["data"]}}
    recipe = make_recipe(then_recipe)  # with the defaults of fields that the version of then did not have
    dumped = recipe.model_dump(mode="json"), about["asked"], given.model_dump(mode="json")
    then, given_then, now = map(flatten, dumped)
    prolonged = about.get("epochs")
    if not isinstance(prolonged, int) or not 1 <= prolonged <= MAX_EPOCHS:
        prolonged = then["optim.epochs"]
    recomputed = set() if epochs is None else {"optim.epochs"}
    if epochs is not None or prolonged != then["optim.epochs"]:
        recomputed.add("optim.final_epochs")
    chosen, kept = flatten(given.model_dump(mode="json", exclude_unset=True)), []
    for name, value in now.items():
        if name.split(".")[0] in MAY_CHANGE or name in MAY_CHANGE or name in recomputed:
            continue
        if value not in ("auto", then[name], given_then.get(name), prolonged if name == "optim.epochs" else then[name]):
            if name not in chosen:
                kept.append(f"{name}={short_repr(then[name], quotes=False)}")
                continue
            again = f"Pass --epochs {then[name]} to keep it, or more to train longer"
            how = again if name == "optim.epochs" else "Resume without this change"
            raise OdcftError(
                f"{run} was started with {name}={then[name]}, not {value}. {how}, or choose another --out."
            )
    if kept:
        say(f"Note        {run} keeps what it was started with: {', '.join(kept)}.")
    recipe.log, recipe.data.workers, recipe.data.max_broken = given.log, given.data.workers, given.data.max_broken
    recipe.data.cache = given.data.cache
    epochs = prolonged if epochs is None else epochs
    if epochs != recipe.optim.epochs:
        _prolong(
            recipe,
            epochs,
            saved["step"] / saved["steps_per_epoch"],
            given_then.get("optim.final_epochs") == "auto",
            run,
        )
    return recipe


def _prolong(recipe: Recipe, epochs: int, done: float, automatic: bool, run: Path) -> None:
    """Change the number of epochs of a recipe.

    Args:
        recipe: resolved; changed in place.
        epochs: the new total.
        done: how many epochs are done.
        automatic: whether the number of last epochs at a lower learning rate was left at `auto`.
        run: for the message.
    """
    if epochs < done:
        raise OdcftError(
            f"{run} has already done {done:.1f} epochs, more than --epochs {epochs}. Drop it, or choose more."
        )
    assert recipe.optim.epochs != "auto", "the recipe is resolved by now"
    assert recipe.optim.final_epochs != "auto", "the recipe is resolved by now"
    dropped = recipe.optim.epochs - recipe.optim.final_epochs
    recipe.optim.epochs = epochs
    if recipe.optim.schedule == "step" and done > dropped:  # the rate has dropped; do not raise it again
        recipe.optim.final_epochs = epochs - dropped
    elif automatic:
        recipe.optim.final_epochs = "auto"


def refuse_other_checkpoint(ckpts: list[str], run: Path, about: dict[str, Any]) -> None:
    """Refuse checkpoints different from those that the RUN was started from."""
    then = about["sha256"] if isinstance(about["sha256"], list) else [about["sha256"]]
    if then != [checkpoint_sha256(ckpt) for ckpt in ckpts]:
        raise OdcftError(
            f"{run} was started from {about['checkpoint']}, not from {', '.join(ckpts)} (the contents differ). "
            "Resume with the original, or choose another --out."
        )


def find_same_images(
    data: str, run: Path, about: dict[str, Any], progress: Progress, reader: Reader | None = None
) -> Images:
    """Find the images of a RUN again.

    Raises:
        OdcftError: another reader was given than at the start, images are missing, new or in another order, or one
            whose checksum run.json has was changed.
    """
    refuse_other_reader(about.get("reader"), reader, run)
    images = find_images(data, progress, reader)
    names = Names(iterate_column(run / "images.csv", "path"))
    images = images.without(set(images.names.rows_of(read_quarantine(run)).values()))
    if images.names != names:
        missing, new = sorted(set(names) - set(images.names)), sorted(set(images.names) - set(names))
        if missing:
            what = f"{len(missing):,} are missing ({missing[0]})"
        else:
            what = f"{len(new):,} are new ({new[0]})" if new else "they are in another order"
        raise OdcftError(
            f"{run} was started on {len(names):,} images, and {data} has changed since: {what}. "
            "Restore it, or start over with --overwrite."
        )
    rows = names.rows_of(about["sample"].keys())
    if unknown := sorted(about["sample"].keys() - rows.keys()):
        raise OdcftError(
            f"{run} cannot be resumed: its run.json lists {short_repr(unknown[0])}, which is not one of its images. "
            "Start over with --overwrite, or choose another --out."
        )
    for name, sum_then in about["sample"].items():
        try:
            changed = hashlib.sha256(images.read(rows[name])).hexdigest() != sum_then
        except (OSError, OdcftError):
            continue  # the run skips images that have become unreadable
        if changed:
            raise OdcftError(
                f"{run} was started on other images: the content of {images.path(rows[name])} has changed. "
                "Restore it, or start over with --overwrite."
            )
    return images
