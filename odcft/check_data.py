"""The program behind `odcft check-data`: what these images are, and whether they are enough; nothing is written."""

from collections.abc import Callable
from typing import Any

from odcft.backbone.input_resizing import USUAL_SIZE
from odcft.data.custom_reader import Reader, make_reader
from odcft.data.intensity_range import choose_range, median_shorter_side
from odcft.data.sources import find_images
from odcft.data.survey import Survey, survey
from odcft.data.view import View
from odcft.errors import OdcftError
from odcft.plan import cores_of_rank, decide_clusters
from odcft.progress import Progress
from odcft.recipe import DEFAULT, Recipe, load_recipe
from odcft.suitable_recipe import suitable_recipe
from odcft.text import count_of

FEW_IMAGES = 1_000  # with fewer, K is below 8 and there is little to learn
NAMED = 3  # broken images on the screen; --json has all
MAX_WORKERS = 16


def check_data(
    data: str,
    *,
    recipe: str | None = None,
    overrides: list[str] | None = None,
    sample: int | None = None,
    reader: str | Callable[[Any], Any] | Reader | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Read all images once, as training would, and say what they are.

    Args:
        data: what `find_images` takes.
        recipe: a name or file; by default the shipped one that fits this many images.
        overrides: of its fields.
        sample: examine only so many images, spread over the set.
        reader: the user's function that reads the images, or its name as MODULE:FUNCTION.
        progress: where to report.

    Returns:
        data, images, examined, bytes, formats (format, bits, bands, count: most frequent first), smallest and largest
        (width, height), usual_side, size (that the recipe would use), range (or None) and range_note, mean, std (of
        each channel in 0..1, as the network would see them without augmentation), gray (images without colour), preset
        ("gray" if all are), copies (groups of paths with the same content), broken (path to reason), skipped, recipe,
        clusters (None if there are too few images), usable, verdict.

    Raises:
        OdcftError: there are no images, or the recipe is not valid.
    """
    progress = progress or Progress()
    images = find_images(data, progress, make_reader(reader))
    recipe = recipe or suitable_recipe([], len(images)) or DEFAULT
    fields = load_recipe(recipe, overrides)
    with progress.waiting("Looking at the sizes and ranges of some images …"):
        side = median_shorter_side(images)
        intensity, note = _intensity(fields, images)
    size: Any = fields.data.size
    if size == "auto":
        size = min(USUAL_SIZE, max(32, -(-side // 8) * 8)) if side else USUAL_SIZE
    indices = range(0, len(images), max(1, -(-len(images) // (sample or len(images)))))
    view = View(size, fields.data.crop_fraction, intensity=intensity, bands=_bands(fields))
    with progress.phase("Checking", len(indices)) as advance:
        found = survey(images, indices, view, _workers(fields), advance)
    mean, std = found.statistics.mean_and_std()
    clusters, verdict = _verdict(fields, found, len(images))
    return {
        **{"data": str(data), "images": len(images), "examined": found.examined, "bytes": found.bytes},
        "formats": [
            {"format": kind[0], "bits": kind[1], "bands": kind[2], "count": count}
            for kind, count in found.kinds.most_common()
        ],
        **{"smallest": found.smallest, "largest": found.largest, "usual_side": found.usual_side, "size": size},
        **{"range": intensity, "range_note": note, "mean": mean, "std": std},
        **{"gray": found.gray, "preset": "gray" if found.gray == found.readable > 0 else None},
        "copies": [[images.names[index] for index in group] for group in found.copies()],
        "broken": {images.names[index]: reason for index, reason in sorted(found.broken.items())},
        **{"skipped": dict(images.skipped), "skipped_summary": images.skipped_summary(), "recipe": recipe},
        **{"clusters": clusters, "usable": clusters is not None, "verdict": verdict},
    }


def _intensity(recipe: Recipe, images: Any) -> tuple[tuple[float, float] | None, str]:
    """The values that become black and white, as a run with this recipe would choose them; and a note."""
    if not isinstance(recipe.data.range, str):
        return recipe.data.range, ""
    return choose_range(images, recipe.data.range, bands=_bands(recipe))


def _bands(recipe: Recipe) -> int:
    """Of the images: what the recipe says, or RGB, as nearly all checkpoints are."""
    return 3 if recipe.data.bands == "auto" else recipe.data.bands


def _workers(recipe: Recipe) -> int:
    """Loader processes: the recipe's number, or one a core."""
    if recipe.data.workers != "auto":
        return recipe.data.workers
    return min(MAX_WORKERS, cores_of_rank())


def _verdict(recipe: Recipe, found: Survey, count: int) -> tuple[int | None, str]:
    """K, and whether the images are enough, in a sentence; None if they cannot be clustered."""
    if not found.readable:
        return None, "Not usable: none of the images can be read."
    count = round(count * found.readable / found.examined)
    try:
        clusters, _, notes = decide_clusters(recipe, count)
    except OdcftError as error:
        return None, f"Not usable: {error}"
    how = "by --clusters auto" if recipe.memory.clusters == "auto" else "as the recipe says"
    if count < FEW_IMAGES:
        return clusters, (
            f"Few for ODC: K = {clusters:,} {how}. It learns from thousands; with {count:,}, check with "
            "`odcft evaluate` whether it helped."
        )
    return clusters, " ".join([f"Enough for ODC: K = {clusters:,} {how}.", *notes])


def describe(result: dict[str, Any], list_copies: bool = False) -> list[str]:
    """What `check_data` returned, as lines for the user."""
    formats = ", ".join(_format(kind) for kind in result["formats"]) or "none readable"
    lines = [f"{count_of(result['images'], 'image')} in {result['data']} · {_size(result['bytes'])} · {formats}"]
    if result["examined"] < result["images"]:
        lines.append(f"  examined    {result['examined']:,} of them; counts and bytes below and above are of those")
    if result["range_note"]:
        lines.append(f"  intensity   {result['range_note']} --set data.range=full keeps that of the files")
    if result["usual_side"]:
        sizes = " … ".join(f"{w:,} × {h:,}" for w, h in dict.fromkeys((result["smallest"], result["largest"])))
        lines.append(
            f"  sizes       {sizes}, usual side {result['usual_side']:,} · odcft would use {result['size']} pixels"
        )
    readable = result["examined"] - len(result["broken"])
    if result["preset"] == "gray":
        lines.append("  colours     none, all are gray: --preset gray turns hue, saturation and gray-scale jitter off")
    elif result["gray"]:
        lines.append(f"  colours     {result['gray']:,} of {readable:,} are gray")
    if readable:
        lines.append(f"  mean        {result['mean']}, std {result['std']}, in 0..1, at {result['size']} pixels")
    if copies := result["copies"]:
        more = sum(map(len, copies)) - len(copies)
        hint = "" if list_copies else " (--duplicates lists them)"
        lines.append(
            f"  look alike  {more:,} {'copy' if more == 1 else 'copies'} of {count_of(len(copies), 'image')}{hint}"
        )
        lines += [f"              {' = '.join(group)}" for group in copies] if list_copies else []
    if broken := result["broken"]:
        some = "; ".join(f"{name} ({reason})" for name, reason in list(broken.items())[:NAMED])
        more_hint = "; … (--json lists all)" if len(broken) > NAMED else ""
        lines.append(f"  unreadable  {len(broken):,}: {some}{more_hint}")
    if result["skipped_summary"]:
        lines.append(f"  not read    {result['skipped_summary']}")
    return [*lines, result["verdict"]]


def _format(kind: dict[str, Any]) -> str:
    """A format with its count, and with bits and bands where they are not the usual ones."""
    unusual = kind["bits"] not in (0, 8) or kind["bands"] not in (0, 3)
    details = f" ({kind['bits']} bit, {count_of(kind['bands'], 'band')})" if unusual and kind["bits"] else ""
    return f"{kind['format']}{details} {kind['count']:,}"


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
