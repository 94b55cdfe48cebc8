"""List files: a .txt with one path per line, or a table with a column of paths, as people write them."""

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence

from odcft.data.image_files import ENDINGS
from odcft.errors import OdcftError
from odcft.text import short_repr

LISTS = {".txt": None, ".csv": ",", ".tsv": "\t"}  # extension to its usual delimiter
DELIMITERS = (",", ";", "\t", "|")
# Names of columns, in lower case. `path` and `label` win; of the others, only one may be there.
PATHS = (
    *("path", "filename", "file_name", "filepath", "file_path", "file", "image", "image_path", "image_file"),
    *("image_name", "img", "img_path", "img_name", "imagepath", "imagename", "name"),
)
LABELS = ("label", "labels", "class", "class_name", "classname", "category", "target", "class_id", "label_id", "y")

Rows = list[tuple[str, str]]  # path and label of each line


def read_list(
    content: bytes, path: str, is_file: Callable[[str], bool]
) -> tuple[list[str], list[str] | None, dict[str, int]]:
    """Read a list of images. A path that is listed several times is one image with all its labels.

    Args:
        content: of the list file.
        path: its path.
        is_file: whether a path in the list leads to a file; asked about the first line only.

    Returns:
        The paths as they are written; the labels, joined by ";", or None if there is no column of them; and what was
        left out, counted.

    Raises:
        OdcftError: it is not text, has no column of paths, or lists nothing.
    """
    text = content.decode("utf-8-sig", "surrogateescape")
    if "\0" in text:
        raise OdcftError(f"{path} is not a text file of paths. If it is a table, save it as CSV, in UTF-8.")
    ending = os.path.splitext(path)[1].lower()
    skipped: Counter[str] = Counter()
    labelled = False
    if ending == ".txt":
        rows = [(line.strip(), "") for line in re.split("\r\n|\r|\n", text) if line.strip()]
        _refuse_other_text(rows, path, is_file)
    else:
        rows, labelled = _read_table(path, text, LISTS[ending] or ",", is_file)
        skipped["line without a path"] = sum(not name for name, _ in rows)
        rows = [row for row in rows if row[0]]
    if not rows:
        where = os.path.dirname(path) or "."
        raise OdcftError(f"{path} lists no images. It should hold one image path per line, relative to {where}.")
    labels: dict[str, list[str]] = {}
    names: dict[str, str] = {}  # normalised path to the spelling that came first
    for name, label in rows:
        parts = labels.setdefault(names.setdefault(os.path.normpath(name), name), [])
        parts += [part for part in map(str.strip, label.split(";")) if part and part not in parts]
    skipped["duplicate line"] = len(rows) - len(names)
    joined = [";".join(parts) for parts in labels.values()] if labelled else None
    return list(labels), joined, {what: n for what, n in skipped.items() if n}


def label_column(columns: Sequence[str]) -> str | None:
    """The column of labels, in the order of LABELS; None if there is none. Case and blanks do not matter."""
    known = {column.strip().lower(): column for column in reversed(columns)}
    return next((known[name] for name in LABELS if name in known), None)


def _refuse_other_text(rows: Rows, path: str, is_file: Callable[[str], bool]) -> None:
    """Refuse a .txt whose first line is a table's: "a.jpg 3", "path,label" or "a.jpg,3"."""
    first = rows[0][0] if rows else ""
    if not first or is_file(first):
        return
    for before in (first.rsplit(None, 1)[0], *(first.split(mark)[0].strip("\"' ") for mark in DELIMITERS)):
        if before != first and (before.lower() in PATHS or is_file(before)):
            raise OdcftError(
                f"{path} should hold one path per line, but its first line is {short_repr(first)}. "
                "Save it as a .csv with the columns path,label."
            )


def _read_table(path: str, text: str, default: str, is_file: Callable[[str], bool]) -> tuple[Rows, bool]:
    """Return the path and label of each line of a .csv or .tsv, and whether there is a column of labels."""
    text = text.lstrip("\r\n")
    header = re.split("[\r\n]", text[: csv.field_size_limit() + 1], maxsplit=1)[0]
    if len(header) > csv.field_size_limit():
        raise OdcftError(f"{path}, line 1: it is too long for a header. Is this the right file?")
    delimiter, columns, position = _path_column(path, header, default, is_file)
    label = label_column(columns)
    positions = [position, *([columns.index(label)] if label is not None else [])]
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        cells = [[*(line[p].strip() if p < len(line) else "" for p in positions), ""] for line in lines if line]
    except csv.Error as error:
        raise OdcftError(f"{path}, line {lines.line_num}: {error}. Is this the right file?") from None
    return [(cell[0], cell[1]) for cell in cells[1:]], label is not None


def _path_column(path: str, header: str, default: str, is_file: Callable[[str], bool]) -> tuple[str, list[str], int]:
    """The delimiter, the names of the columns, and the number of the column of paths."""
    for delimiter in (default, *DELIMITERS):
        columns = _split(header, delimiter)
        fitting = [column for column in columns if column in PATHS]
        if "path" in fitting or len(fitting) == 1:
            return delimiter, columns, columns.index("path" if "path" in fitting else fitting[0])
        if fitting:
            raise OdcftError(
                f"{path} has several columns that may hold the paths: {', '.join(fitting)}. Name the right one `path`."
            )
    cells = [cell for delimiter in (default, *DELIMITERS) for cell in _split(header, delimiter, lower=False)]
    if any(cell.lower().endswith(ENDINGS) or (cell and is_file(cell)) for cell in cells):
        raise OdcftError(
            f"{path} has no header: its first line, {short_repr(header)}, is already an image. "
            "Put a line with the names of the columns above it, for example `path,label`."
        )
    found = ", ".join(_split(header, default, lower=False)) or "none"
    raise OdcftError(
        f"{path} has no column `path`; its columns are: {found[:200]}. "
        "It needs a header with `path` (and, for evaluate, `label`), and one line for each image."
    )


def _split(header: str, delimiter: str, lower: bool = True) -> list[str]:
    """The cells of a header, without blanks and quotes around them."""
    cells = [cell.strip() for cell in next(csv.reader([header], delimiter=delimiter, skipinitialspace=True), [])]
    return [cell.lower() for cell in cells] if lower else cells
