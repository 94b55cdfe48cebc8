"""Whether a RUN can go on: with the recipe, the checkpoint and the images it was started with, and nothing else."""

from pathlib import Path
from typing import Any

from odcft.data.sources import Images, find_images
from odcft.errors import OdcftError
from odcft.files import digest, read_column, read_json, sha256
from odcft.recipe import MOST_EPOCHS, Recipe, flat, make_recipe
from odcft.text import brief

FREE = ("data.workers", "log")  # how fast, how often it speaks: may change, for they change no result


def read_about(run: Path) -> dict[str, Any]:
    """run.json: what the RUN was started from.

    Raises:
        OdcftError: it is not there, or of another version of odcft.
    """
    try:
        about = read_json(run / "run.json")
        for name, kind in (("checkpoint", str | list), ("sha256", str | list), ("asked", dict), ("sample", dict)):
            if not isinstance(about[name], kind):
                raise ValueError(f"{name}={brief(about[name])}")
        if not isinstance(about.get("arch_given"), str | None):
            raise ValueError(f"arch_given={brief(about['arch_given'])}")
        return about
    except (OdcftError, ValueError, KeyError) as error:
        raise OdcftError(
            f"{run} cannot be resumed: its run.json is missing or not of this version of odcft ({error}). "
            "Start anew with --overwrite, or with another --out."
        ) from None


def refuse_odd_state(run: Path, saved: dict[str, Any]) -> None:
    """Refuse a state whose words are not those of a run, before any of them is followed."""
    kinds = (("recipe", dict), ("versions", dict), ("window", dict), ("steps_per_epoch", int), ("skipped", int))
    odd = next((name for name, kind in kinds if not isinstance(saved.get(name), kind)), "")
    if not odd and saved["steps_per_epoch"] < 1:
        odd = "steps_per_epoch"
    if not odd:
        groups = {name: saved["recipe"].get(name) for name in ("data", "optim", "memory")}
        odd = next((f"recipe.{name}" for name, group in groups.items() if not isinstance(group, dict)), "")
    if not odd and not {"epochs", "final_epochs"} <= set(saved["recipe"]["optim"]):
        odd = "recipe.optim"
    if odd:
        raise OdcftError(
            f"{run} cannot be resumed: its newest state does not say what a run's does ({odd}). "
            "Start anew with --overwrite, or with another --out."
        )
    make_recipe(saved["recipe"], f"the recipe of {run}'s newest state")


def resumed_recipe(
    given: Recipe, epochs: int | None, run: Path, about: dict[str, Any], saved: dict[str, Any]
) -> Recipe:
    """The recipe of a RUN, with what a resumed run may change.

    Args:
        given: what is asked for now, `auto` fields and all.
        epochs: how many in all now, or None for as many as before.
        run: for the message.
        about: its run.json, with the recipe as it was asked for then, and the epochs of an earlier prolongation.
        saved: what its state says, with the recipe as it was resolved and the steps that are done.

    Raises:
        OdcftError: names the first field that differs.
    """
    then, asked, now = flat(saved["recipe"]), flat(about["asked"]), flat(given.model_dump(mode="json"))
    prolonged = about.get("epochs")
    if not isinstance(prolonged, int) or not 1 <= prolonged <= MOST_EPOCHS:
        prolonged = then["optim.epochs"]
    follows = set() if epochs is None else {"optim.epochs"}
    if epochs is not None or prolonged != then["optim.epochs"]:
        follows.add("optim.final_epochs")
    for name, value in now.items():
        if name.split(".")[0] in FREE or name in FREE or name not in then or name in follows:
            continue
        if value not in ("auto", then[name], asked.get(name), prolonged if name == "optim.epochs" else then[name]):
            how = "Pass --epochs to change it" if name == "optim.epochs" else "Resume without that"
            raise OdcftError(
                f"{run} was started with {name}={then[name]}, not {value}. {how}, or choose another --out."
            )
    # A run of before there was a range has seen all of the type's.
    recipe = make_recipe({**saved["recipe"], "data": {"range": "full", **saved["recipe"]["data"]}})
    recipe.log, recipe.data.workers = given.log, given.data.workers
    epochs = prolonged if epochs is None else epochs
    if epochs != recipe.optim.epochs:
        _prolong(
            recipe, epochs, saved["step"] / saved["steps_per_epoch"], asked.get("optim.final_epochs") == "auto", run
        )
    return recipe


def _prolong(recipe: Recipe, epochs: int, done: float, automatic: bool, run: Path) -> None:
    """Let a recipe run for another number of epochs.

    Args:
        recipe: resolved; changed in place.
        epochs: how many in all.
        done: how many of them are done.
        automatic: whether the recipe leaves the last epochs at a lower rate to us.
        run: for the message.
    """
    if epochs < done:
        raise OdcftError(
            f"{run} has done {done:.1f} epochs already: --epochs {epochs} is less. Drop it, or choose more."
        )
    assert recipe.optim.final_epochs != "auto", "the recipe is resolved by now"
    dropped = recipe.optim.epochs - recipe.optim.final_epochs
    recipe.optim.epochs = epochs
    if recipe.optim.schedule == "step" and done > dropped:  # the rate has dropped, and does not rise again
        recipe.optim.final_epochs = epochs - dropped
    elif automatic:
        recipe.optim.final_epochs = "auto"


def refuse_other_checkpoint(ckpts: list[str], run: Path, about: dict[str, Any]) -> None:
    """Refuse to go on from other checkpoints than the RUN was started from."""
    then = about["sha256"] if isinstance(about["sha256"], list) else [about["sha256"]]
    if then != [sha256(ckpt) for ckpt in ckpts]:
        raise OdcftError(
            f"{run} was started from {about['checkpoint']}, not from {', '.join(ckpts)} (other contents). "
            "Resume with that, or choose another --out."
        )


def same_images(data: str, run: Path, about: dict[str, Any]) -> Images:
    """The images of a RUN, found again.

    Raises:
        OdcftError: some are missing, or new, or have another content (of those that run.json has a checksum of).
    """
    images = find_images(data)
    names, unreadable = read_column(run / "images.csv", "path"), set(read_quarantine(run))
    images = images.without({i for i, name in enumerate(images.names) if name in unreadable})
    if images.names != names:
        missing, new = sorted(set(names) - set(images.names)), sorted(set(images.names) - set(names))
        if missing:
            what = f"{len(missing):,} are missing ({missing[0]})"
        else:
            what = f"{len(new):,} are new ({new[0]})" if new else "they are in another order"
        raise OdcftError(
            f"{run} was started on {len(names):,} images, and {data} holds others now: {what}. "
            "Make it what it was, or start anew with --overwrite."
        )
    if strange := sorted(set(about["sample"]) - set(names)):
        raise OdcftError(
            f"{run} cannot be resumed: its run.json tells of {brief(strange[0])}, which is none of its images. "
            "Start anew with --overwrite, or with another --out."
        )
    for name, sum_then in about["sample"].items():
        if not (images.root / name).is_file():
            continue
        try:
            changed = digest(images.root / name) != sum_then
        except OSError:
            continue  # the run skips what cannot be read any more
        if changed:
            raise OdcftError(
                f"{run} was started on other images: {images.root / name} has another content now. "
                "Put it back, or start anew with --overwrite."
            )
    return images


def read_quarantine(run: Path) -> list[str]:
    """The images that could not be read when the RUN was started."""
    path = run / "quarantine.csv"
    return read_column(path, "path") if path.exists() else []
