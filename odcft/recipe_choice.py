"""The recipe of a run: a name or a file, and the options of the command line or of Python that override its fields."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from odcft.argument_types import StrPath, text_of

if TYPE_CHECKING:
    from odcft.recipe import Recipe

Settings: TypeAlias = Mapping[str, Any] | Sequence[str]

DEFAULT_RECIPE, DC_RECIPE = "odc_r50_finetune", "dc_r50_finetune"


def choose_recipe(
    recipe: "StrPath | Recipe | None" = None,
    *,
    method: str | None = None,
    resume_from: StrPath | None = None,
    preset: str | None = None,
    set: Settings | None = None,
    clusters: int | str | None = None,
    seed: int | None = None,
    input: str | None = None,
    part: str | Sequence[str | None] | None = None,
    allow_partial: bool = False,
    arch_args: str | Mapping[str, Any] | None = None,
) -> "Recipe":
    """The recipe of a run, with the options that override its fields.

    Args:
        recipe: a name, a YAML file, or a Recipe; by default that of the RUN to resume, or the one for the method.
        resume_from: a RUN that may exist already.
        method, preset, set, clusters, seed, input, part, allow_partial, arch_args: as for `fine_tune`.

    Raises:
        OdcftError: as `load_recipe`.
    """
    from odcft.recipe import Recipe, load_recipe, set_lines

    lines = set_lines(set) + ([f"method={method}"] if method else [])
    if recipe is None:
        recipe = DC_RECIPE if {"method=dc", 'method="dc"'} & {*lines} else DEFAULT_RECIPE
        own = Path(resume_from) / "recipe.yaml" if resume_from is not None else None
        if own is not None and own.is_file() and not own.is_symlink():
            recipe = own
    lines += [f"memory.clusters={clusters}"] if clusters is not None else []
    given: dict[str, Any] = {"seed": seed, "backbone.input": input, "backbone.part": part}
    given |= {"backbone.allow_partial": allow_partial or None}
    given |= {"backbone.arch_args": None if arch_args is None else parse_arch_args(arch_args)}
    lines += set_lines({name: value for name, value in given.items() if value is not None})
    return load_recipe(recipe if isinstance(recipe, Recipe) else text_of(recipe), lines, preset=preset)


def parse_arch_args(arch_args: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments to build a network with, from "name=value,…" or a mapping; none from None or ""."""
    from odcft.backbone.checkpoint_metadata import parse_arguments

    if not arch_args:
        return {}
    return parse_arguments(arch_args) if isinstance(arch_args, str) else dict(arch_args)
