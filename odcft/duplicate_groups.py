"""The program behind `odcft clusters RUN --near-duplicates`: groups of nearly identical images."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from odcft.backbone.layers import LAST
from odcft.backbone.load import load_backbone
from odcft.data.custom_reader import make_reader
from odcft.data.images import Images
from odcft.data.sources import find_images
from odcft.data.view import View
from odcft.errors import OdcftError
from odcft.evaluation.features import Features, features_of
from odcft.evaluation.starting_checkpoint import view_of_run
from odcft.files import atomic_folder
from odcft.plan import view_for_evaluation
from odcft.progress import Progress
from odcft.reports import near_duplicates as search
from odcft.reports import tables
from odcft.reports.output_places import refuse_places
from odcft.reports.run_clusters import MEMORY, described_by, place_of_images
from odcft.run import output_checks
from odcft.run.folder import Layout
from odcft.text import count_of

COLUMNS = ("group", "path", "similarity")
THRESHOLD = 0.85  # docs/clusters.md has the measurement
MOST = 200  # groups on sheets
NAMED = 3  # groups in the terminal
SHEET_FILES: Layout = dict.fromkeys(f"near_duplicates_{'[0-9]' * digits}.png" for digits in range(2, 6))


def near_duplicates(
    run: str | Path,
    *,
    out: Path | None = None,
    sheets: Path | None = None,
    most: int = MOST,
    threshold: float = THRESHOLD,
    data: str | None = None,
    reader: Any = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Find groups of nearly identical images by the features of the fine-tuned backbone.

    Of each group the image with the largest file is kept (the first one, if the sizes are equal or not known); every
    other one has at least `threshold` as the cosine of its features to it, whitened by those of all images.

    Args:
        run: the RUN, which must have ended.
        out: a .csv or .parquet file of the images in groups: group, path, similarity to the one that is kept, which is
            the first of its group.
        sheets: a folder for contact sheets of the groups.
        most: groups that are drawn, the largest first.
        threshold: the least similarity.
        data: where the images are, if not where they were; may be other images than those of the run.
        reader: the user's function that reads the images, or its name as MODULE:FUNCTION.
        overwrite: replace what this function wrote there earlier.
        progress: where to report.

    Returns:
        run, data, images, unreadable (name to reason), threshold, groups, in_groups, left (images if one of each group
        is kept), examples (paths of the largest groups), cached, and out and sheets if asked for.

    Raises:
        OdcftError: not a RUN that has ended, images that cannot be found, or an output that may not be written.
    """
    progress, run = progress or Progress(), Path(run)
    _refuse(run, out, sheets, overwrite)
    refuse_places({"--out": out, "--sheets": sheets}, run, data)
    images = find_images(place_of_images(run) if data is None else data, progress, make_reader(reader))
    unit_NF, good, features, view = _features(run, images, progress)
    sizes = images.sizes()
    first = None if sizes is None else np.argsort(-sizes[good], kind="stable")
    with progress.phase("Comparing", len(good)) as advance:
        found = search.find_groups(unit_NF, threshold, first, advance)
    lists = found.lists()
    values = {
        **{"run": str(run), "data": str(images.source), "images": len(good), "threshold": threshold},
        "unreadable": {images.names[i]: why for i, why in sorted(features.unreadable.items())},
        **{"groups": len(lists), "in_groups": sum(map(len, lists)), "left": found.left, "cached": features.cached},
        "examples": [[images.names[int(good[row])] for row in group[:NAMED]] for group in lists[:NAMED]],
    }
    if out is not None:
        _write_table(out, lists, found, [images.names[int(i)] for i in good])
        values["out"] = str(out)
    if sheets is not None:
        _draw(sheets, lists[:most], found, images, good, view)
        values |= {"sheets": str(sheets), "drawn": min(most, len(lists))}
    return values


def _refuse(run: Path, out: Path | None, sheets: Path | None, overwrite: bool) -> None:
    """Refuse a RUN without a backbone, and outputs that may not be written."""
    if described_by(run) == MEMORY:
        raise OdcftError(f"{run} is a memory and has no fine-tuned backbone. Give a RUN that `odcft finetune` wrote.")
    if not (run / "backbone" / "config.json").is_file():
        raise OdcftError(f"{run} has no backbone yet. Let the run end first: odcft finetune … --resume.")
    if out is not None:
        tables.refuse_table(out, COLUMNS, overwrite)
    if sheets is not None:
        output_checks.refuse_non_empty(sheets, SHEET_FILES, overwrite)


def _features(run: Path, images: Images, progress: Progress) -> tuple[Tensor, np.ndarray, Features, View]:
    """Whitened features of the images that can be read, which these are, what else is known, and how they are seen."""
    loaded = load_backbone(str(run))
    view = view_for_evaluation(loaded, images, None, view_of_run(str(run)))
    features = features_of(loaded.backbone, images, view, progress)
    good = np.array([i for i in range(len(images)) if i not in features.unreadable], dtype=np.int64)
    if not len(good):
        raise OdcftError(f"None of the {count_of(len(images), 'image')} in {images.source} can be read.")
    features_NF = features.layers.pop(LAST)[good]
    if not np.isfinite(features_NF).all():
        raise OdcftError(f"{run} gives features that are NaN or infinite: its weights are damaged.")
    return search.whitened(features_NF), good, features, view


def _draw(
    out: Path, lists: list[list[int]], found: search.Groups, images: Images, good: np.ndarray, view: View
) -> None:
    """Write the sheets, if there are groups; those that odcft wrote there before are removed."""
    if out.is_dir() or lists:
        output_checks.clear_folder(out, SHEET_FILES)
    if not lists:
        return
    with tables.writing(out), atomic_folder(out) as unfinished:
        drawn = search.draw_pages(lists, found.similarity_N, images, good, view)
        for page, sheet in enumerate(drawn, 1):
            sheet.save(unfinished / f"near_duplicates_{page:02d}.png")


def _write_table(out: Path, lists: list[list[int]], found: search.Groups, names: list[str]) -> None:
    rows = np.array([row for group in lists for row in group], dtype=np.int64)
    numbers: np.ndarray = np.repeat(np.arange(1, len(lists) + 1), [len(group) for group in lists])
    paths = [names[row] for row in rows]
    with tables.writing(out):
        tables.write_rows(out, paths, {"group": numbers}, {"similarity": found.similarity_N[rows]})


def describe(values: dict[str, Any]) -> list[str]:
    """What `near_duplicates` returned, as lines for the user."""
    removed = values["images"] - values["left"]
    images, similar = count_of(values["images"], "image"), f"(similarity {values['threshold']:g} and more)"
    if values["groups"]:
        in_groups = f"{count_of(values['in_groups'], 'image')} in {count_of(values['groups'], 'group')}"
        lines = [f"Look alike  {in_groups}, of {images} in {values['data']} {similar}"]
        lines += [f"            group {n}: {' = '.join(group)}" for n, group in enumerate(values["examples"], 1)]
        kept = count_of(values["left"], "image")
        lines.append(f"Left        {kept} if one of each group is kept, {removed:,} fewer")
    else:
        lines = [f"Look alike  none of {images} in {values['data']} {similar}. A lower --threshold finds more."]
    if values["unreadable"]:
        name, why = next(iter(values["unreadable"].items()))
        lines.append(f"Left out    {len(values['unreadable']):,} that cannot be read; the first is {name} ({why}).")
    if "out" in values:
        what = "group, path, similarity; the first of each group is the one to keep"
        lines.append(f"Wrote       {values['out']}: {what if values['groups'] else 'its header only'}")
    if "sheets" in values:
        rest = values["groups"] - values["drawn"]
        more = f" of {values['groups']:,}, the largest" if rest > 0 else ""
        drawn = f"{values['sheets']}: contact sheets of {count_of(values['drawn'], 'group')}{more}"
        lines.append(f"Wrote       {drawn if values['groups'] else 'no contact sheets: there is no group to draw'}")
    return lines
