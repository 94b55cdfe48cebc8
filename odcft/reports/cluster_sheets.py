"""Contact sheets of the clusters for annotators, and the list of images to label first.

DIR/cluster_0012.png       its nearest images to the centroid, some drawn at random, the farthest
DIR/label_first.csv        path, label (empty), cluster, images: the nearest image of each, the largest cluster first
DIR/label_first_01.png     the same as pictures
DIR/sheets.csv             which image is where: sheet, row, column, path
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from odcft.files import atomic_folder, write_table
from odcft.plan import cores_of_rank
from odcft.reports.cluster_folders import folder_name
from odcft.reports.contact_sheets import SIDE, Cell, Row, draw_sheet, pages, thumbnails
from odcft.reports.run_clusters import RunClusters, RunImages
from odcft.run.folder import Layout
from odcft.run.output_checks import clear_folder
from odcft.text import count_of

COLUMNS, PAGE_ROWS = 8, 6  # thumbnails side by side; rows on a page of images to label first
MOST = 200  # clusters that get a sheet, unless told otherwise
LABEL_FIRST, WHERE = "label_first.csv", "sheets.csv"
DIGITS = "[0-9]"
SHEET_FILES: Layout = dict.fromkeys(
    (
        *(f"cluster_{DIGITS * digits}.png" for digits in range(4, 9)),
        *(f"label_first_{DIGITS * digits}.png" for digits in range(2, 6)),
        *(LABEL_FIRST, WHERE),
    )
)
Places = list[tuple[str, str, int, str]]  # sheet, row, column from 1, path


def choose_rows(members: np.ndarray, cluster: int) -> dict[str, np.ndarray]:
    """Which images of a cluster to show: title to rows, no image twice.

    Args:
        members: its rows, the nearest to the centroid first.
        cluster: its number, which decides the random draw: the same sheet each time.
    """
    nearest, rest = members[:COLUMNS], members[COLUMNS:]
    farthest, middle = rest[-COLUMNS:][::-1], rest[:-COLUMNS]
    drawn = np.sort(np.random.default_rng(cluster).permutation(len(middle))[:COLUMNS])
    rows = {"nearest to the centroid": nearest, "at random": middle[drawn], "farthest": farthest}
    return {title: found for title, found in rows.items() if len(found)}


def write_sheets(
    clusters: RunClusters, found: RunImages, out: Path, most: int, advance: Callable[[int], object]
) -> dict[str, int]:
    """Write all of it into a folder that is empty, or holds sheets of ours, which are replaced.

    Args:
        clusters: of the RUN.
        found: its images.
        out: the folder.
        most: clusters that are drawn, the largest first; label_first.csv lists all.
        advance: called with the number of clusters done.

    Returns:
        sheets (clusters drawn), listed (images in label_first.csv), unreadable (thumbnails that could not be drawn).
    """
    clear_folder(out, SHEET_FILES)
    places: Places = []
    first, unreadable, drawn = [], 0, 0
    mean_K = clusters.mean_distance_K()
    with atomic_folder(out) as unfinished:
        for cluster, members in clusters.by_distance():
            present = members[found.where_N[members] >= 0]
            if not len(present):
                continue
            first.append((int(present[0]), cluster, len(members)))
            if drawn == most:
                continue
            drawn += 1
            rows = choose_rows(present, cluster)
            pictures = _pictures(found, [row for chosen in rows.values() for row in chosen.tolist()])
            unreadable += sum(map(len, rows.values())) - len(pictures)
            name = f"{folder_name(cluster, clusters.K)}.png"
            title = f"Cluster {cluster} · {count_of(len(members), 'image')} · mean distance {mean_K[cluster]:.3f}"
            sheet = [
                Row(text, [Cell(pictures.get(row), f"{clusters.distance_N[row]:.3f}") for row in chosen.tolist()])
                for text, chosen in rows.items()
            ]
            draw_sheet(title, sheet, COLUMNS).save(unfinished / name, optimize=False, compress_level=6)
            for text, chosen in rows.items():
                places += [(name, text, n, clusters.names[row]) for n, row in enumerate(chosen.tolist(), 1)]
            advance(1)
        unreadable += _write_first(clusters, found, first, most, unfinished, places)
        write_table(unfinished / WHERE, ["sheet", "row", "column", "path"], places)
    return {"sheets": drawn, "listed": len(first), "unreadable": unreadable}


def _write_first(
    clusters: RunClusters,
    found: RunImages,
    first: list[tuple[int, int, int]],
    most: int,
    out: Path,
    places: Places,
) -> int:
    """Write label_first.csv, and its pages; return how many thumbnails could not be drawn.

    Args:
        clusters: of the RUN.
        found: its images.
        first: (row of the image, cluster, its size), in order.
        most: images on pages.
        out: where to write.
        places: what is on the pages is added here.
    """
    rows = [(found.images.path(int(found.where_N[row])), "", cluster, size) for row, cluster, size in first]
    write_table(out / LABEL_FIRST, ["path", "label", "cluster", "images"], rows)
    shown = first[:most]
    pictures = _pictures(found, [row for row, _, _ in shown])
    cells = [Cell(pictures.get(row), f"{n} · c{k} · {size:,}") for n, (row, k, size) in enumerate(shown, 1)]
    sheets = pages(cells, COLUMNS, PAGE_ROWS)
    digits = max(2, len(str(len(sheets))))
    for page, lines in enumerate(sheets, 1):
        name = f"label_first_{page:0{digits}d}.png"
        title = f"Label first, {page} of {len(sheets)} · rank, cluster, images in it"
        draw_sheet(title, lines, COLUMNS).save(out / name)
        for place in range((page - 1) * COLUMNS * PAGE_ROWS, min(page * COLUMNS * PAGE_ROWS, len(shown))):
            line, column = divmod(place % (COLUMNS * PAGE_ROWS), COLUMNS)
            places.append((name, str(line + 1), column + 1, clusters.names[shown[place][0]]))
    return len(shown) - len(pictures)


def _pictures(found: RunImages, rows: list[int]) -> dict:
    """The thumbnails of these rows of the run, by row."""
    indices = [int(found.where_N[row]) for row in rows]
    # A user's function reads one image at a time: it need not be safe for threads.
    threads = 1 if found.images.reader is not None else cores_of_rank()
    drawn = thumbnails(found.images, indices, found.view, SIDE, threads=threads)
    return {row: drawn[index] for row, index in zip(rows, indices, strict=True) if index in drawn}
