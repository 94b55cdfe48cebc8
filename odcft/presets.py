"""Presets: which changes an image may undergo without becoming another one, for kinds of images other than photographs.

A preset is a list of fields that it sets, applied after the recipe's file and before `--set`. The values were chosen by
what the images show, not tuned by experiments.
"""

import difflib
from dataclasses import dataclass

from odcft.errors import OdcftError


@dataclass(frozen=True)
class Preset:
    """Fields of the recipe to set, each "group.field=value", and what that means in a sentence for the user."""

    what: str
    fields: tuple[str, ...]


_NO_COLOUR = ("augment.hue=0", "augment.saturation=0", "augment.gray=0")
_TRUE_COLOURS = ("augment.hue=0", "augment.gray=0", "augment.saturation=0.2")
_NO_UP = ("augment.vertical_flip=0.5", "augment.quarter_turns=true")
_MEASURED = ("data.mean=auto", "data.std=auto")

PRESETS = {
    "photo": Preset(
        "the recipe's augmentation, which is the paper's or derived from it: made for photographs of things, where "
        "colours and size vary but up is up",
        ("data.mean=null", "data.std=null"),
    ),
    "gray": Preset(
        "hue, saturation and gray-scale augmentation off, because images without colour do not change by them",
        (*_NO_COLOUR, *_MEASURED),
    ),
    "microscopy": Preset(
        "vertical flips and quarter turns on, because a slide has no up; hue and gray-scale augmentation off, because "
        "the colour of a stain has a meaning; crops of at least 40 % of the image, because magnification has one, too",
        (*_TRUE_COLOURS, "augment.crop_scale=[0.4, 1.0]", *_NO_UP, *_MEASURED),
    ),
    "satellite": Preset(
        "vertical flips and quarter turns on, because seen from above nothing is up; hue and gray-scale augmentation "
        "off, because colours are measured reflectance; crops of at least 30 % of the image, because all images have "
        "the same scale",
        (*_TRUE_COLOURS, "augment.crop_scale=[0.3, 1.0]", *_NO_UP, *_MEASURED),
    ),
    "document": Preset(
        "flips off, because mirrored writing is not writing; hue, saturation and gray-scale augmentation off, because "
        "paper is white; crops of at least 40 % of the page, because its layout tells what it is",
        ("augment.flip=0", "augment.crop_scale=[0.4, 1.0]", *_NO_COLOUR, *_MEASURED),
    ),
}


def preset_fields(name: str | None) -> list[str]:
    """The fields that a preset sets, as for `--set`; none without a preset.

    Raises:
        OdcftError: there is no such preset.
    """
    if name is None:
        return []
    if name not in PRESETS:
        nearest = difflib.get_close_matches(name[:100], PRESETS, n=1)
        hint = f" Did you mean {nearest[0]}?" if nearest else ""
        raise OdcftError(f"--preset {name}: no such preset.{hint} Choose from {', '.join(PRESETS)}.")
    return list(PRESETS[name].fields)
