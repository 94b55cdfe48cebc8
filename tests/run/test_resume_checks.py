"""Which changes a resumed run accepts, and how its learning rate schedule continues."""

from pathlib import Path

import pytest
from stopped_runs import quick


def prolonged(recipe, epochs, step, steps_per_epoch=3):
    """The optimizer settings of a run that is prolonged to so many epochs after so many steps."""
    from odcft.run.resume_checks import resumed_recipe

    asked = recipe.model_dump(mode="json")
    resolved = {**asked, "optim": {**asked["optim"]}}
    if resolved["optim"]["final_epochs"] == "auto":
        resolved["optim"]["final_epochs"] = recipe.optim.epochs / 6
    saved = {"recipe": resolved, "step": step, "steps_per_epoch": steps_per_epoch}
    return resumed_recipe(recipe, epochs, Path("run"), {"asked": asked}, saved).optim


@pytest.mark.parametrize(
    ("final", "step", "expected"),
    [("auto", 15, "auto"), ("auto", 16, 7.0), ("auto", 18, 7.0), (2, 12, 2), (2, 13, 8), (0, 18, 0)],
)
def test_a_rate_that_has_dropped_does_not_rise_again_when_a_run_is_prolonged(final, step, expected):
    """Six epochs of three steps; the last sixth, or as many as are given, at the lower rate."""
    recipe = quick("optim.schedule=step", "optim.epochs=6", f"optim.final_epochs={final}")
    assert prolonged(recipe, 12, step).final_epochs == expected


def test_a_run_older_than_the_choice_of_decoder_keeps_pillow():
    from odcft.errors import OdcftError
    from odcft.run.resume_checks import resumed_recipe

    def resumed(*given):
        recipe = quick()
        asked = recipe.model_dump(mode="json")
        resolved = {**asked, "data": {k: v for k, v in asked["data"].items() if k != "decoder"}}
        saved = {"recipe": resolved, "step": 1, "steps_per_epoch": 3}
        return resumed_recipe(quick(*given), None, Path("run"), {"asked": resolved}, saved)

    assert resumed().data.decoder == resumed("data.decoder=pil").data.decoder == "pil"
    with pytest.raises(OdcftError, match=r"started with data\.decoder=pil, not turbo"):
        resumed("data.decoder=turbo")


def test_a_field_that_an_older_run_did_not_have_is_not_ignored():
    from odcft.errors import OdcftError
    from odcft.run.resume_checks import resumed_recipe

    def resumed(*given):
        asked = quick("optim.freeze=0").model_dump(mode="json")
        older = {**asked, "optim": {k: v for k, v in asked["optim"].items() if k != "freeze"}}
        saved = {"recipe": older, "step": 1, "steps_per_epoch": 3}
        return resumed_recipe(quick("optim.freeze=0", *given), None, Path("run"), {"asked": older}, saved)

    assert resumed().optim.freeze == 0
    with pytest.raises(OdcftError, match=r"started with optim\.freeze=0, not 2"):
        resumed("optim.freeze=2")


def test_the_cache_of_decoded_images_may_change_and_older_runs_have_not_chosen():
    from odcft.run.resume_checks import resumed_recipe

    asked = quick().model_dump(mode="json")
    older = {**asked, "data": {name: value for name, value in asked["data"].items() if name != "cache"}}
    for then in (asked, older):
        saved = {"recipe": then, "step": 1, "steps_per_epoch": 3}
        for given in ("on", "off"):
            recipe = quick(f"data.cache={given}")
            assert resumed_recipe(recipe, None, Path("run"), {"asked": then}, saved).data.cache == given


def test_a_recipe_given_again_need_not_repeat_what_was_given_with_it():
    """`--recipe small --seed 3 --set …`, and then `--recipe small --resume`: its file says nothing of the seed."""
    from odcft.errors import OdcftError
    from odcft.recipe import load_recipe
    from odcft.run.resume_checks import resumed_recipe

    asked = load_recipe("small", ["seed=3", "neck.dim=16"]).model_dump(mode="json")
    saved, notes = {"recipe": asked, "step": 1, "steps_per_epoch": 3}, []
    asked_now = load_recipe("small")
    saved["recipe"]["optim"]["final_epochs"] = 2  # as resolved
    recipe = resumed_recipe(asked_now, None, Path("run"), {"asked": asked}, saved, notes.append)
    assert (recipe.seed, recipe.neck.dim) == (3, 16)
    assert notes == ["Note        run keeps what it was started with: seed=3, neck.dim=16."]
    for given in ("seed=0", "neck.dim=256"):  # the defaults, but asked for
        with pytest.raises(OdcftError, match=f"not {given.partition('=')[2]}"):
            resumed_recipe(load_recipe("small", [given]), None, Path("run"), {"asked": asked}, saved)
