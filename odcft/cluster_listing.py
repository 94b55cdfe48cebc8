"""The program behind `odcft clusters`: the clusters of a RUN or a memory, as a table, folders of links, or sheets."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from odcft.errors import OdcftError
from odcft.progress import Progress
from odcft.reports import cluster_folders, cluster_sheets, tables
from odcft.reports.output_places import refuse_places
from odcft.reports.run_clusters import RunClusters, RunImages, find_run_images, read_run
from odcft.run import output_checks
from odcft.run.run_json import finished_after
from odcft.text import count_of

COLUMNS = ("path", "cluster", "distance")
SHOWN = 3  # clusters named in a line of the summary
ALL_SHOWN = 10  # fewer clusters than this are all named
FEW = 5  # images that the tightest and loosest clusters must have, to be named


def clusters(
    run: str | Path,
    *,
    out: str | Path | None = None,
    folders: str | Path | None = None,
    links: str = "absolute",
    sheets: str | Path | None = None,
    most: int = cluster_sheets.MOST,
    data: str | None = None,
    reader: Any = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Say what the clusters of a RUN are, and write them as asked; of one that has not ended, as last saved.

    Args:
        run: the RUN, or a folder of `odcft init-memory`.
        out: a .csv or .parquet file of all images: path, cluster, distance to the centroid.
        folders: a folder to fill with one for each cluster, with links to its images (cluster_folders.py).
        links: absolute, relative, or copy; images in shards are always copied.
        sheets: a folder to fill with contact sheets and the list of images to label first (cluster_sheets.py).
        most: clusters that get a sheet, the largest first.
        data: where the images are now, if not where they were; only folders and sheets need them.
        reader: the user's function that reads the images, or its name as MODULE:FUNCTION.
        overwrite: replace what this function wrote there earlier.
        progress: where to report.

    Returns:
        run, images, clusters, empty, smallest, largest, median (sizes of those with images), step (None if the run
        has ended), per_cluster (cluster, images, mean_distance: largest first), and for each output its place and
        counts: out; folders, links, gone, unreadable; sheets, label_first.

    Raises:
        OdcftError: not a RUN, images that cannot be found, or an output that may not be written.
    """
    progress, run = progress or Progress(), Path(run)
    out, folders, sheets = (None if path is None else Path(path) for path in (out, folders, sheets))
    found_clusters = read_run(run)
    _refuse(out, folders, sheets, links, overwrite)
    refuse_places({"--out": out, "--folders": folders, "--sheets": sheets}, run, data)
    values = summarise(found_clusters)
    if out is not None:
        columns = {"cluster": found_clusters.label_N, "distance": found_clusters.distance_N}
        with tables.writing(out):
            tables.write_rows(out, found_clusters.names, {}, columns)
        values["out"] = str(out)
    if folders is None and sheets is None:
        return values
    found = find_run_images(found_clusters, data, reader, progress)
    for note in found.notes():
        progress.say(note)
    values |= {"gone": found.gone, "new": found.new, "unreadable": 0}
    if folders is not None:
        _write_folders(found_clusters, found, folders, links, values, progress)
    if sheets is not None:
        _write_sheets(found_clusters, found, sheets, most, values, progress)
    return values


def _refuse(out: Path | None, folders: Path | None, sheets: Path | None, links: str, overwrite: bool) -> None:
    """Refuse all outputs that may not be written, before any is."""
    if links not in cluster_folders.KINDS:
        raise OdcftError(
            f"--links {links}: choose {', '.join(cluster_folders.KINDS[:-1])} or {cluster_folders.KINDS[-1]}."
        )
    if out is not None:
        tables.refuse_table(out, COLUMNS, overwrite)
    if folders is not None:
        cluster_folders.refuse_folder(folders, overwrite)
    if sheets is not None:
        output_checks.refuse_non_empty(sheets, cluster_sheets.SHEET_FILES, overwrite)


def _write_folders(
    found_clusters: RunClusters, found: RunImages, out: Path, links: str, values: dict[str, Any], progress: Progress
) -> None:
    if found.images.store is not None or not os.path.isdir(found.images.root):
        if links != "copy":
            progress.say(f"Note        The images are in shards or at a URL, so {out} gets copies instead of links.")
        links = "copy"
    if links == "copy" and (size := cluster_folders.refuse_too_large(found, out)):
        progress.say(f"Copying     {size} to {out}")
    with progress.phase("Folders", len(found_clusters.names)) as advance:
        written = cluster_folders.write_folders(found_clusters, found, out, links, advance)
    values |= {"folders": str(out), "links": links, "linked": written["images"], "folder_count": written["folders"]}
    values["unreadable"] += written["unreadable"]


def _write_sheets(
    found_clusters: RunClusters, found: RunImages, out: Path, most: int, values: dict[str, Any], progress: Progress
) -> None:
    drawn = min(most, len(values["per_cluster"]))
    with tables.writing(out), progress.phase("Sheets", drawn, "sheets") as advance:
        written = cluster_sheets.write_sheets(found_clusters, found, out, most, advance)
    values |= {"sheets": str(out), "drawn": written["sheets"], "label_first": str(out / cluster_sheets.LABEL_FIRST)}
    values["listed"] = written["listed"]
    values["unreadable"] += written["unreadable"]
    if found.images.store is not None:
        progress.say(
            "Note        The images are in shards: label_first.csv says where; --folders writes copies of them."
        )


def summarise(found: RunClusters) -> dict[str, Any]:
    """The figures of all clusters; see `clusters`."""
    size_K, mean_K = found.size_K, found.mean_distance_K()
    sizes = size_K[size_K > 0]
    finished = finished_after(found.run) if found.step is None else None
    return {
        **{"run": str(found.run), "images": len(found.names), "clusters": found.K, "empty": int((size_K == 0).sum())},
        **{"smallest": int(sizes.min(initial=0 if not len(sizes) else sizes[0])), "largest": int(sizes.max(initial=0))},
        **{"median": float(np.median(sizes)) if len(sizes) else 0.0, "step": found.step, "finished": finished},
        "per_cluster": [
            {"cluster": k, "images": int(size_K[k]), "mean_distance": round(float(mean_K[k]), 6)}
            for k in found.largest_first()
        ],
    }


def describe(values: dict[str, Any]) -> list[str]:
    """What `clusters` returned, as lines for the user."""
    per_cluster = values["per_cluster"]
    lines = [
        f"Clusters    {values['clusters']:,} of {count_of(values['images'], 'image')} in {values['run']} · sizes "
        f"{values['smallest']:,} … {values['largest']:,}, median {values['median']:,.0f} · "
        f"{'none' if not values['empty'] else format(values['empty'], ',')} empty"
    ]
    if values["step"] is not None:
        lines.append(
            f"Note        The run has not ended: these are its clusters after step {values['step']:,}, as saved."
        )
    lines += _describe_some(per_cluster)
    if "out" in values:
        lines.append(f"Wrote       {values['out']}: path, cluster, distance of {count_of(values['images'], 'image')}")
    if "folders" in values:
        what = "copies" if values["links"] == "copy" else f"{values['links']} links"
        lines.append(
            f"Wrote       {values['folders']}: {count_of(values['folder_count'], 'folder')} with {what} of "
            f"{count_of(values['linked'], 'image')}, the nearest to the centroid first"
        )
    if "sheets" in values:
        rest = len(per_cluster) - values["drawn"]
        more = f", the largest; --most {len(per_cluster)} draws the other {rest:,}, too" if rest > 0 else ""
        lines.append(f"Wrote       {values['sheets']}: {count_of(values['drawn'], 'sheet')}, one per cluster{more}")
        lines.append(
            f"            {values['label_first']}: {count_of(values['listed'], 'image')} to label first, the nearest "
            "of each cluster, largest clusters first"
        )
    if values.get("unreadable"):
        lines.append(f"Note        {count_of(values['unreadable'], 'image')} could not be read.")
    return lines


def _describe_some(per_cluster: list[dict[str, Any]]) -> list[str]:
    """Lines for all clusters, or if there are many, for those at either end."""
    if len(per_cluster) < ALL_SHOWN:
        return [f"{'':<12}{_describe_one(one)}" for one in per_cluster]
    tight = sorted((one for one in per_cluster if one["images"] >= FEW), key=lambda one: one["mean_distance"])
    ends = {"Largest": per_cluster, "Smallest": per_cluster[::-1], "Tightest": tight, "Loosest": tight[::-1]}
    return [
        f"{title:<12}{' · '.join(map(_describe_one, some[:SHOWN]))}"
        for title, some in ends.items()
        if len(some) > SHOWN
    ]


def _describe_one(one: dict[str, Any]) -> str:
    return f"cluster {one['cluster']}: {count_of(one['images'], 'image')}, distance {one['mean_distance']:.3f}"
