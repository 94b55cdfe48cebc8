"""Tables of images as .csv or .parquet, and which files of these names may be replaced."""

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np

from odcft.errors import OdcftError
from odcft.files import PATH_ENCODING, atomic_file, write_table
from odcft.run import output_checks

PIECE = 1 << 18  # rows that are written at a time


def refuse_table(path: Path, columns: Sequence[str], overwrite: bool) -> None:
    """Refuse a file that cannot be written, or that holds anything but a table with these columns."""
    if path.suffix not in (".csv", ".parquet"):
        raise OdcftError(f"--out {path}: end the name with .csv or .parquet, which says the format to write.")
    output_checks.refuse_unwritable(path)
    if not (path.exists() or path.is_symlink()):
        return
    if not overwrite:
        raise OdcftError(f"{path} exists. Choose another file, or pass --overwrite.")
    if path.is_symlink() or not path.is_file() or columns_of(path) != list(columns):
        raise OdcftError(
            f"{path} is not a table of odcft with the columns {', '.join(columns)}, so --overwrite will not touch it. "
            "Choose another file."
        )


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn what fails while an output is written (a full disk) into an OdcftError that names it."""
    try:
        yield
    except OSError as error:
        raise OdcftError(
            f"{out} cannot be written: {error.strerror or error}. Make room, or choose another place."
        ) from None


def columns_of(path: Path) -> list[str]:
    """The names of the columns of a table; [] for any other file."""
    try:
        if path.suffix == ".csv":
            with path.open(newline="", **PATH_ENCODING) as file:
                return next(csv.reader(islice(file, 1)), [])
        import pyarrow.parquet as pq

        return list(pq.read_schema(path).names)
    except Exception:  # of whatever kind: another file
        return []


def write_rows(path: Path, paths: Sequence[str], first: dict[str, np.ndarray], last: dict[str, np.ndarray]) -> None:
    """Write a table of images.

    Args:
        path: .csv keeps the bytes of paths; in .parquet, where text is UTF-8, others become \\xNN.
        paths: of the images.
        first: the columns before the paths, by name.
        last: those after them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        columns = [*map(_cells, first.values()), paths, *map(_cells, last.values())]
        write_table(path, [*first, "path", *last], zip(*columns, strict=True))
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {name: pa.from_numpy_dtype(column.dtype) for name, column in (first | last).items()}
    schema = pa.schema([(name, types.get(name, pa.string())) for name in [*first, "path", *last]])
    with atomic_file(path) as unfinished, pq.ParquetWriter(unfinished, schema) as writer:
        for start in range(0, max(1, len(paths)), PIECE):
            here = slice(start, start + PIECE)
            text = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in paths[here]]
            numbers = {name: column[here] for name, column in (first | last).items()}
            writer.write_table(pa.table({"path": text, **numbers}).select(schema.names).cast(schema))


def _cells(column: np.ndarray) -> Iterable[object]:
    """The cells of a column of numbers for a .csv: floats with seven digits."""
    for start in range(0, len(column), PIECE):
        for value in column[start : start + PIECE].tolist():
            yield f"{value:.7g}" if isinstance(value, float) else value
