"""Two runs compared: their curves in the same axes, and which images they group differently.

Shapes: N images that both runs have, K clusters of the second run.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from odcft.data.custom_reader import make_reader
from odcft.data.thumbnails import media_type
from odcft.errors import OdcftError
from odcft.evaluation.clusters import nmi
from odcft.progress import Progress
from odcft.reports.charts import draw_curves
from odcft.reports.gallery import by_importance, make_gallery
from odcft.reports.health import Finding, findings
from odcft.reports.output_places import refuse_places
from odcft.reports.page import Page, refuse_page, write_page
from odcft.reports.run_record import Assignment, RunRecord, read_run
from odcft.reports.run_report import MEGABYTES, add_pictures, facts, find_pictures, lead, page_data, that_fit
from odcft.text import count_of, printable

EXAMPLES = 40  # of the images that the runs group most differently


def compare_runs(
    one: str | Path,
    other: str | Path,
    out: str | Path,
    *,
    data: str | None = None,
    megabytes: float = MEGABYTES,
    reader: Any = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a page that compares two RUNs; the pictures are those of the second.

    Args:
        one, other: the RUNs.
        out: the page to write.
        data: where the images are now; by default where they were for the second RUN.
        megabytes: of the page, at most.
        reader: the user's function that reads the images (`Reader`), or its name as MODULE:FUNCTION.
        overwrite: replace an earlier report at `out`.
        progress: where to report.

    Returns:
        `out`, `bytes`, `images` (in both runs), `nmi`, `kept` (the mean of `mates_kept`), `pictures`, `notes`;
        without clusters to compare, `images` is 0, and `nmi` and `kept` are None.

    Raises:
        OdcftError: one is not a RUN, its files are damaged, or the page cannot be written.
    """
    progress, place = progress or Progress(), Path(out)
    records = [read_run(Path(one)), read_run(Path(other))]
    names = _different_names(records)
    for record in records:
        refuse_places({"--out": place}, record.folder, data)
    refuse_page(place, overwrite)
    page = Page(
        f"Two runs compared: {names[0]} and {names[1]}",
        " ".join(f"{name}: {lead(record)}" for name, record in zip(names, records, strict=True)),
    )
    page.facts = [
        (f"{title}, {name}", value) for name, r in zip(names, records, strict=True) for title, value in facts(r)
    ]
    page.findings = _findings(names, records)
    page.charts = draw_curves({name: record.lines for name, record in zip(names, records, strict=True)})
    counts: dict[str, Any] = {"images": 0, "nmi": None, "kept": None, "pictures": 0}
    if records[0].clusters is None or records[1].clusters is None:
        page.notes.append("Clusters can be compared once both runs have ended.")
    else:
        counts |= _add_mates(page, names, records, data, reader, megabytes, progress)
    size = write_page(page, place)
    return {"out": str(place), "bytes": size, **counts, "notes": page.notes}


def describe(values: Mapping[str, Any]) -> list[str]:
    """What `odcft report` prints after it compared two runs."""
    lines = [f"Wrote {values['out']} ({values['bytes'] / 1e6:.1f} MB)."]
    if values["images"]:
        lines.append(
            f"Same mates  {values['kept']:.0%} of an image's cluster mates are the same in both runs, on average over "
            f"{count_of(values['images'], 'image')} (NMI of the clusterings {values['nmi']:.2f})"
        )
    return [*lines, *(f"Note        {note}" for note in values["notes"])]


def _different_names(records: list[RunRecord]) -> list[str]:
    """What to call two runs: the names of their folders, or their paths if these are the same."""
    names = [printable(record.folder.resolve().name) for record in records]
    if names[0] == names[1]:
        names = [printable(record.folder.resolve()) for record in records]
    if names[0] == names[1]:
        raise OdcftError(f"{records[0].folder} and {records[1].folder} are the same run. Give two different ones.")
    return names


def _findings(names: list[str], records: list[RunRecord]) -> list[Finding]:
    found = [
        replace(finding, about=f"{name}, {finding.about.lower()}")
        for name, record in zip(names, records, strict=True)
        for finding in findings(record)
    ]
    return sorted(found, key=lambda finding: finding.fine)


def mates_kept(one_N: np.ndarray, other_N: np.ndarray) -> np.ndarray:
    """Of each image: those that share its cluster in both clusterings, divided by those that do in either.

    1 for an image that is alone in both.
    """
    _, one_N = np.unique(one_N, return_inverse=True)
    _, other_N = np.unique(other_N, return_inverse=True)
    _, pair_N, both = np.unique(
        one_N.astype(np.int64) * (int(other_N.max()) + 1) + other_N, return_inverse=True, return_counts=True
    )
    together_N = both[pair_N] - 1
    either_N = np.bincount(one_N)[one_N] + np.bincount(other_N)[other_N] - both[pair_N] - 1
    return np.where(either_N > 0, together_N / np.maximum(either_N, 1), 1.0)


def _add_mates(
    page: Page,
    names: list[str],
    records: list[RunRecord],
    data: str | None,
    reader: Any,
    megabytes: float,
    progress: Progress,
) -> dict[str, Any]:
    """Add the clusters of the second run, how many mates their images keep, and the pictures."""
    first, second = records[0].clusters, records[1].clusters
    assert first is not None
    assert second is not None
    cluster_of = dict(zip(first.names, first.cluster_N.tolist(), strict=True))
    both = np.array([row for row, name in enumerate(second.names) if name in cluster_of], np.int64)
    if not len(both):
        page.notes.append("The two runs have no image in common, by its path, so only their curves are compared.")
        return {}
    common = Assignment([second.names[row] for row in both], second.cluster_N[both], second.distance_N[both])
    before_N = np.array([cluster_of[name] for name in common.names], np.int64)
    record = replace(records[1], clusters=common, earlier_N=None)
    gallery = make_gallery(common)
    kept_N = mates_kept(before_N, common.cluster_N)
    gallery.stability_K = np.bincount(gallery.row_N, kept_N) / gallery.size_K
    agreement = nmi(before_N, common.cluster_N)
    changed = np.argsort(kept_N, kind="stable")
    listed = that_fit(by_importance(gallery), common.names, megabytes)
    listed = listed[np.lexsort((np.arange(len(listed)), ~np.isin(listed, changed[:EXAMPLES])))]
    page.data = page_data(record, gallery, None, listed)
    page.data["clusters"]["names"] = {"stability": "same mates"}
    page.data["sort"] = "stability"
    _, before_N = np.unique(before_N, return_inverse=True)
    page.data["mates"] = {"cluster": before_N[listed].tolist(), "titles": [f"In {name}" for name in names]}
    place = np.full(len(both), -1, np.int64)
    place[listed] = np.arange(len(listed))
    page.data["examples"] = [i for i in place[changed[:EXAMPLES]].tolist() if i >= 0]
    page.neighbours_title = "Images that the runs group differently"
    page.about_neighbours = (
        f"The mates of an image are the others in its cluster. Of the mates it has in {names[0]} or in {names[1]}, "
        f"it has {kept_N.mean():.0%} in both, on average over {len(both):,} images. (The NMI of the two clusterings is "
        f"{agreement:.2f}; 1 means that they are the same.) Below are the images whose mates differ most, with some of "
        "their mates in either run."
    )
    page.about_clusters = (
        f"The clusters of {names[1]}, those that differ most from {names[0]} first. Same mates is the mean, over the "
        "images of a cluster, of the share above."
    )
    left_out = max(len(first.names), len(second.names)) - len(both)
    if left_out:
        page.notes.append(f"{left_out:,} images are in one of the runs only and are left out.")
    pictures = find_pictures(record, data, make_reader(reader), None, progress)
    page.notes += [pictures.why] if pictures.why else []
    page.media = media_type()
    wanted = sum(len(a) + len(b) for a, b in zip(gallery.near, gallery.far, strict=True))
    made, unreadable = add_pictures(
        page, pictures, listed, wanted=wanted, megabytes=megabytes, seconds=float("inf"), progress=progress
    )
    if unreadable:
        page.notes.append(f"{len(unreadable):,} pictures could not be read and are shown by name.")
    return {"images": len(both), "nmi": agreement, "kept": float(kept_N.mean()), "pictures": made}
