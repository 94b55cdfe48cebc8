"""The report of a run: one HTML page with its verdict, health, curves, clusters and neighbours.

Shapes: N images of the run, K clusters that have images, L images that the page lists.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from odcft.backbone.model_card import base_name
from odcft.data.custom_reader import make_reader
from odcft.data.images import Images
from odcft.data.sources import find_images
from odcft.data.thumbnails import make_thumbnails, media_type
from odcft.data.view import View
from odcft.errors import OdcftError
from odcft.evaluation.starting_checkpoint import reader_note, view_of_run
from odcft.plan import cores_of_rank
from odcft.progress import Progress
from odcft.recipe import MAX_MEMBERS
from odcft.reports.charts import draw_curves, draw_map, draw_sizes
from odcft.reports.class_agreement import ClassAgreement, compare_with_classes, labels_of
from odcft.reports.gallery import Gallery, by_importance, cluster_columns, explain_columns, make_gallery
from odcft.reports.health import findings
from odcft.reports.neighbours import Neighbours, before_and_after
from odcft.reports.output_places import refuse_places
from odcft.reports.page import Page, refuse_page, render, write_page
from odcft.reports.picture_folder import pictures_of, refuse_picture_folder, write_pictures
from odcft.reports.run_clusters import place_of_images
from odcft.reports.run_record import RunRecord, read_run
from odcft.reports.verdicts import evaluate_run, is_evaluation_file, read_verdict
from odcft.text import command, count_of, printable, short_repr

SAMPLE = 2000  # images among which neighbours are looked for
MEGABYTES = 30.0  # of the page, at most
DEFAULTS = {"sample": SAMPLE, "megabytes": MEGABYTES}
SIDES = ((6000, 160), (3500, 112), (2000, 80), (0, 64))  # bytes there are for a thumbnail, and its side in pixels
NAMES_SHARE = 0.2  # of the page that file names may take, at most
ROUGH_NAME = 45  # bytes that an image takes in the page besides its name
MAX_MAP, MAX_DIM = 20_000, 8192  # clusters on the map, and numbers of a centroid
MAX_NAME = 300  # characters of a name of run.json
EXAMPLES = 40  # images whose neighbours the page shows, some at a time


@dataclass
class Pictures:
    """Where the images of a run are.

    Attributes:
        images: those found; None if there are none.
        index_N: the index in `images` of each image of the run; -1 if it was not found.
        view: how they become 8 bits.
        why: why there are none, or fewer.
    """

    images: Images | None
    index_N: np.ndarray
    view: View
    why: str = ""


def report(
    run: str | Path,
    *,
    data: str | None = None,
    labels: str | None = None,
    out: str | Path | None = None,
    evaluation: str | Path | Mapping[str, Any] | None = None,
    sample: int = SAMPLE,
    megabytes: float = MEGABYTES,
    all_pictures: bool = False,
    reader: Any = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    images: Images | None = None,
    alone: bool = False,
    seconds: float = float("inf"),
) -> dict[str, Any]:
    """Write the report of a RUN, finished or not.

    Args:
        run: the RUN.
        data: where its images are now; by default where they were.
        labels: labelled images, to set the clusters beside classes.
        out: the page to write; by default report.html in the RUN, where an earlier report is replaced.
        evaluation: labelled images to judge the backbone by, as `odcft evaluate` does; or what that printed with
            --json, or a file of it.
        sample: images among which neighbours are looked for; 0 for none.
        megabytes: of the page, at most: as many thumbnails as fit.
        all_pictures: write the thumbnails that do not fit into a folder beside the page.
        reader: the user's function that reads the images (`Reader`), or its name as MODULE:FUNCTION.
        overwrite: replace an earlier report at `out`.
        progress: where to report.
        images: of the run, in its order, if they are known already.
        alone: whether only this one of several processes is here.
        seconds: that making thumbnails may take, about.

    Returns:
        `out`, `bytes`, `verdict` (None without `evaluation`), `images`, `clusters`, `pictures` (thumbnails in the
        page), `unreadable` (pictures that could not be read), `neighbours` (images of the sample), `notes`.

    Raises:
        OdcftError: it is not a RUN, its files are damaged, or the page cannot be written.
    """
    folder, progress = Path(run), progress or Progress()
    place = folder / "report.html" if out is None else Path(out)
    record = read_run(folder)
    if os.path.realpath(place) != os.path.realpath(folder / "report.html"):
        refuse_places({"--out": place}, folder, data)
    refuse_page(place, overwrite or out is None)
    if all_pictures:
        refuse_picture_folder(place)
    page = first_page(record)
    if images is None:  # asked for by the user
        given = {"data": data, "labels": labels, "evaluation": evaluation, "sample": sample, "megabytes": megabytes}
        page.command = again(
            folder, **given, all_pictures=all_pictures, reader=reader, out=out, overwrite=out is not None
        )
    if isinstance(evaluation, str | Path) and not is_evaluation_file(evaluation):
        evaluation = evaluate_run(folder, str(evaluation), reader, progress)
    page.verdict, page.verdict_kind = read_verdict(evaluation)
    page.training = not record.finished
    counts: dict[str, Any] = {"images": 0, "clusters": 0, "pictures": 0, "unreadable": 0, "neighbours": 0}
    if record.clusters is None:
        page.notes.append("The run has not ended yet, so this report has no clusters and no pictures.")
    elif not len(record.clusters.names):
        page.notes.append(
            f"{folder / 'clusters.parquet'} lists no images, so this report has no clusters and no pictures."
        )
    with pictures_of(place):
        if record.clusters is not None and record.clusters.names:
            pictures = find_pictures(record, data, make_reader(reader), images, progress)
            counts |= _add_clusters(
                page, record, pictures, progress, place,
                labels=labels, sample=sample, megabytes=megabytes, all_pictures=all_pictures, alone=alone,
                seconds=seconds,
            )  # fmt: skip
        size = write_page(page, place)
    return {"out": str(place), "bytes": size, "verdict": page.verdict or None, **counts, "notes": page.notes}


def describe(values: Mapping[str, Any]) -> list[str]:
    """What `odcft report` prints at its end."""
    lines = [f"Wrote {values['out']} ({values['bytes'] / 1e6:.1f} MB)"]
    if values["clusters"]:
        lines[0] += f": {values['clusters']:,} clusters of {count_of(values['images'], 'image')}, "
        lines[0] += f"{count_of(values['pictures'], 'thumbnail')}, neighbours of {values['neighbours']:,}"
    lines[0] += "."
    lines += [f"Verdict     {values['verdict']}"] if values["verdict"] else []
    return [*lines, *(f"Note        {note}" for note in values["notes"])]


def first_page(record: RunRecord) -> Page:
    """The page with all that the log and the recipe say."""
    name = record.folder.resolve().name
    page = Page(f"Fine-tuning report: {printable(name)}", lead(record), facts=facts(record), findings=findings(record))
    page.charts = draw_curves({name: record.lines}) if record.lines else []
    page.recipe = record.recipe_text
    page.command = again(record.folder)
    return page


def again(run: Path, **options: Any) -> str:
    """How to write a report again, with the options that were given."""
    given = {
        name: value
        for name, value in options.items()
        if isinstance(value, str | Path | int | float) and value != DEFAULTS.get(name)
    }
    text = f"Write it again: {printable(command('report', run, **given))}"
    return f"{text} (and --evaluation for the verdict)" if isinstance(options.get("evaluation"), Mapping) else text


def lead(record: RunRecord) -> str:
    """What was done, in a sentence."""
    about, epochs = record.about, record.planned_epochs
    ckpt = _listed(about.get("checkpoint") or "a checkpoint", base_name)
    images = record.image_count()
    how_many = "unlabelled images" if images is None else f"{images:,} unlabelled images"
    method = {"odc": "online deep clustering (ODC)", "dc": "DeepCluster", "codc": "collaborative ODC"}[record.method]
    what = f"{how_many} in {_listed(about.get('data', '?'), base_name)} by {method}"
    if clusters := record.cluster_count():
        what += f" with {clusters:,} clusters"
    if record.finished:
        return f"{ckpt} was fine-tuned on {what} for {count_of(round(record.epochs_done), 'epoch')}."
    at = f"epoch {record.epochs_done:.1f}" + (f" of {epochs:,}" if epochs else "")
    return f"{ckpt} is being fine-tuned on {what}: {at} when this was written."


def _listed(names: Any, short: Callable[[str], str] = str) -> str:
    """A name of run.json, or a list of them, for one line of the page."""
    some = names[:MAX_MEMBERS] if isinstance(names, list) else [names]
    return ", ".join(short_repr(short(str(one)[-MAX_NAME:]), MAX_NAME, quotes=False) for one in some)


def facts(record: RunRecord) -> list[tuple[str, str]]:
    """Names and values for the head of the page."""
    found = []
    if isinstance(arch := record.about.get("arch"), str | list):
        found.append(("Backbone", _listed(arch)))
    if record.recipe:
        found.append(("Input", f"{record.recipe.data.size} pixels"))
        found.append(("Batch", f"{record.recipe.optim.batch_size:,}"))
    if record.lines:
        found.append(("Steps", f"{record.lines[-1]['step'] + 1:,.0f}"))
    for key, title in (("started", "Started"), ("ended", "Ended")):
        if isinstance(value := record.about.get(key), str):
            found.append((title, printable(value[:16].replace("T", " ")) + " UTC"))
    if isinstance(value := record.about.get("odcft"), str):
        found.append(("odcft", printable(value[:40])))
    return found


# ---------------------------------------------------------------- clusters and pictures


def find_pictures(
    record: RunRecord, data: str | None, reader: Any, images: Images | None, progress: Progress
) -> Pictures:
    """Where the images of the run are, and how they are read."""
    assert record.clusters is not None
    count = len(record.clusters.names)
    try:
        view = view_of_run(str(record.folder)) or View(224)
    except OdcftError:
        view = View(224)
    if images is not None and len(images) == count:
        return Pictures(images, np.arange(count), view)
    nothing = np.full(count, -1, np.int64)
    try:
        source = place_of_images(record.folder) if data is None else data
        found = find_images(source, progress, reader)
    except OdcftError as error:
        if data is not None:
            raise
        return Pictures(None, nothing, view, f"No pictures: {error}")
    known = {as_written(name): index for index, name in enumerate(found.names)}
    index_N = np.array([known.get(name, -1) for name in record.clusters.names], np.int64)
    missing = int((index_N < 0).sum())
    if missing == count:
        why = f"None of the run's images is in {printable(source)}. Pass --data where they are now."
        if data is not None:
            raise OdcftError(why)
        return Pictures(None, nothing, view, f"No pictures: {why[0].lower()}{why[1:]}")
    notes = [f"{missing:,} of {count:,} images are no longer in {printable(source)}."] if missing else []
    notes += [note] if (note := reader_note(str(record.folder), reader)) else []
    return Pictures(found, index_N, view, " ".join(notes))


def as_written(name: str) -> str:
    """The name of an image as clusters.parquet has it."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _add_clusters(
    page: Page,
    record: RunRecord,
    pictures: Pictures,
    progress: Progress,
    place: Path,
    *,
    labels: str | None,
    sample: int,
    megabytes: float,
    all_pictures: bool,
    alone: bool,
    seconds: float,
) -> dict[str, Any]:
    """Add the gallery, the map, the neighbours and the pictures to the page; return what was counted."""
    assert record.clusters is not None
    gallery = make_gallery(record.clusters, record.earlier_N)
    classes = _classes(pictures, gallery, labels, progress)
    page.classes = classes
    page.about_clusters = explain_columns(record, gallery)
    page.charts.append(draw_sizes(gallery.size_K))
    centroids = record.centroids_KD
    if len(gallery.ids) > MAX_MAP:
        page.notes.append(f"No map: it shows at most {MAX_MAP:,} clusters.")
    elif centroids is not None and int(gallery.ids.max()) < len(centroids) and centroids.shape[1] <= MAX_DIM:
        with progress.waiting("Laying out the map of the clusters …"):
            page.map = draw_map(gallery.ids, centroids[gallery.ids], gallery.size_K)
    page.notes += [pictures.why] if pictures.why else []
    important = that_fit(by_importance(gallery), record.clusters.names, megabytes)
    neighbours = _neighbours(record, pictures, important, sample, page, progress, alone)
    listed = important
    if neighbours is not None:  # first those whose neighbours are shown
        listed = np.concatenate([neighbours.rows, important[~np.isin(important, neighbours.rows)]])
    page.data = page_data(record, gallery, classes, listed)
    if neighbours is not None:
        _add_neighbours(page, neighbours, listed, classes)
    made, unreadable = add_pictures(
        page,
        pictures,
        listed,
        wanted=_wanted(gallery, neighbours),
        megabytes=megabytes,
        seconds=seconds,
        progress=progress,
    )
    if all_pictures and pictures.images is not None:
        unreadable |= write_pictures(page, pictures, listed, place, progress)
    if unreadable:
        name, why = next(iter(unreadable.items()))
        page.notes.append(
            f"Pictures that could not be read and are shown by name: {len(unreadable):,}; the first is "
            f"{printable(name)} ({why})."
        )
    counts = {"images": len(record.clusters.names), "clusters": len(gallery.ids), "pictures": made}
    return {**counts, "unreadable": len(unreadable), "neighbours": 0 if neighbours is None else len(neighbours.rows)}


def _classes(pictures: Pictures, gallery: Gallery, labels: str | None, progress: Progress) -> ClassAgreement | None:
    """The clusters beside the classes of labelled images, if the user names some."""
    if labels is None:
        return None
    if pictures.images is None:
        raise OdcftError(f"--labels needs the images of the run, by whose paths labels are found. {pictures.why}")
    paths = [pictures.images.path(index) if index >= 0 else "" for index in pictures.index_N.tolist()]
    return compare_with_classes(gallery.row_N, labels_of(paths, find_images(labels, progress)))


def _neighbours(
    record: RunRecord,
    pictures: Pictures,
    important: np.ndarray,
    sample: int,
    page: Page,
    progress: Progress,
    alone: bool,
) -> Neighbours | None:
    """The neighbours among a sample that takes the same number of images from every cluster."""
    if pictures.images is None or sample < 2 or not record.finished:
        return None
    rows = important[pictures.index_N[important] >= 0][:sample]
    if len(rows) < 3:
        return None
    # Ascending, and all of the set if they are: then the features are those that `embed` and `evaluate` keep.
    index_M = np.sort(pictures.index_N[rows])
    row_of = np.full(len(pictures.images), -1, np.int64)
    row_of[pictures.index_N[rows]] = rows
    try:
        found = before_and_after(record.folder, pictures.images, index_M, progress, alone=alone)
    except OdcftError as error:
        page.notes.append(f"No neighbours: {str(error).rstrip('.')}.")
        return None
    if found is None:
        return None
    found.rows, found.after = row_of[found.rows], row_of[found.after]
    found.before = None if found.before is None else row_of[found.before]
    return found


def that_fit(important: np.ndarray, names: list[str], megabytes: float) -> np.ndarray:
    """The rows of the images that the page lists, the most important first: all, if names do not take too much."""
    bytes_N = np.cumsum([ROUGH_NAME + len(names[row]) for row in important.tolist()])
    return important[: max(1, int(np.searchsorted(bytes_N, NAMES_SHARE * megabytes * 1e6)))]


def page_data(
    record: RunRecord, gallery: Gallery, classes: ClassAgreement | None, listed: np.ndarray
) -> dict[str, Any]:
    """What the page's script needs: clusters and listed images as columns."""
    assert record.clusters is not None
    place = np.full(len(gallery.row_N), -1, np.int64)
    place[listed] = np.arange(len(listed))
    clusters = cluster_columns(gallery, classes)
    for key, rows_K in (("near", gallery.near), ("random", gallery.random), ("far", gallery.far)):
        clusters[key] = [[i for i in place[rows].tolist() if i >= 0] if rows else [] for rows in rows_K]
    distance_L = record.clusters.distance_N[listed]
    images: dict[str, Any] = {
        "name": [printable(record.clusters.names[row]) for row in listed],
        "cluster": gallery.row_N[listed].tolist(),
        "distance": [round(d, 3) if np.isfinite(d) else None for d in distance_L.tolist()],
    }
    if classes is not None:
        images["label"] = [classes.labels_N[row] for row in listed]
    return {"clusters": clusters, "images": images}


def _add_neighbours(page: Page, found: Neighbours, listed: np.ndarray, classes: ClassAgreement | None) -> None:
    """Add neighbours to the page's data, and say what they are."""
    place = np.zeros(int(listed.max()) + 1, np.int64)
    place[listed] = np.arange(len(listed))
    page.data["neighbours"] = {"of": place[found.rows].tolist(), "after": place[found.after].tolist()}
    if found.before is not None:
        page.data["neighbours"]["before"] = place[found.before].tolist()
    chosen = np.random.default_rng(0).permutation(len(found.rows))[:EXAMPLES]
    page.data["examples"] = place[found.rows[chosen]].tolist()
    text = f"The nearest neighbours of {min(EXAMPLES, len(found.rows))} images drawn at random, among "
    text += f"{len(found.rows):,} images that come from all clusters, "
    if found.kept is None:
        text += f"after fine-tuning. There is nothing before it to compare with: {found.why_no_before}."
    else:
        text += f"before and after fine-tuning. {1 - found.kept:.0%} of the neighbours are different ones now."
    if classes is not None:
        text += _same_label(found, classes)
    page.about_neighbours = text + " Select an image anywhere in this page to see its neighbours."


def _same_label(found: Neighbours, classes: ClassAgreement) -> str:
    """How many neighbours have the label of their image, before and after."""
    label_N = np.array(classes.labels_N)
    own = label_N[found.rows]
    known = own != ""
    if not known.any():
        return ""
    shares = [
        f"{float((label_N[rows][known] == own[known, None]).mean()):.1%} {when}"
        for rows, when in ((found.before, "before"), (found.after, "after"))
        if rows is not None
    ]
    return f" Neighbours with the label of their image: {', '.join(shares)}."


def _wanted(gallery: Gallery, neighbours: Neighbours | None) -> int:
    """How many pictures the rows of the gallery and the sample show."""
    shown = sum(len(a) + len(b) + len(c) for a, b, c in zip(gallery.near, gallery.random, gallery.far, strict=True))
    return shown + (0 if neighbours is None else len(neighbours.rows) // 2)


def add_pictures(
    page: Page,
    pictures: Pictures,
    listed: np.ndarray,
    *,
    wanted: int,
    megabytes: float,
    seconds: float,
    progress: Progress,
) -> tuple[int, dict[str, str]]:
    """Add as many thumbnails as fit into the page; return how many, and name to reason for unreadable images."""
    if pictures.images is None:
        return 0, {}
    index_L = pictures.index_N[listed]
    room = max(0.0, megabytes * 1e6 - len(render(page)) - 2 * len(listed)) * 3 / 4  # base64
    side = next(side for least, side in SIDES if room / max(1, min(wanted, len(listed))) >= least)
    present = index_L[index_L >= 0]
    left = expected = min(len(present), int(room / (side * side / 6)) + 1)

    def count(done: int) -> None:
        nonlocal left
        if left:  # small thumbnails may be more than expected
            advance(min(left, done))
            left -= min(left, done)

    with progress.phase("Thumbnails", expected) as advance:
        made, unreadable = make_thumbnails(
            pictures.images,
            present,
            pictures.view,
            side=side,
            most_bytes=room,
            threads=cores_of_rank(),
            most_seconds=seconds,
            advance=count,
        )
    page.thumbnails = [made.get(int(index), b"") for index in index_L]
    while page.thumbnails and not page.thumbnails[-1]:
        page.thumbnails.pop()
    page.media = media_type()
    return len(made), {pictures.images.names[index]: why for index, why in unreadable.items()}
