"""Parquet files: row groups are read when an image of them is needed."""

import json
import os
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from odcft.data.image_files import MAX_BYTES, is_url
from odcft.data.stores.tables import Columns, choose_columns, told
from odcft.errors import OdcftError


def read_footers(root: str, names: list[str], advance: Callable[..., None]) -> tuple[Columns, list[list[int]]]:
    """Read what the columns are for, and the number of rows in each row group of each file.

    Raises:
        OdcftError: a file is damaged, or has other columns than the first.
    """
    columns, groups = None, list[list[int]]()
    for name in names:
        path = os.path.join(root, name)
        file, size = _opened(path, os.getpid())
        found = _told(path, partial(_columns, path, file))
        if columns is not None and found != columns:
            raise OdcftError(
                f"{path} does not match {names[0]}: its images or labels are in other columns, or its classes differ. "
                "Give one set at a time."
            )
        columns = found
        rows = _told(path, partial(_rows_of_groups, file))
        if min(rows, default=0) < 0 or sum(rows) != file.metadata.num_rows or sum(rows) > size:
            raise OdcftError(f"{path} is damaged: it claims {file.metadata.num_rows:,} rows in {size:,} bytes.")
        groups.append(rows)
        advance(1)
    assert columns is not None
    return columns, groups


def read_row_group(path: str, number: int, column: str) -> Any:
    """One column of a row group, as an array."""
    file, _ = _opened(path, os.getpid())
    claimed = _told(path, lambda: file.metadata.row_group(number).total_byte_size)
    if claimed > 2 * MAX_BYTES:
        raise OdcftError(f"a row group of {claimed:,} bytes; write the file with smaller ones")
    table = _told(path, partial(_read_bounded, file, number, column))
    column_array = _told(path, lambda: table.column(0).combine_chunks())
    return column_array.chunk(0) if hasattr(column_array, "chunk") else column_array


def _read_bounded(file: Any, number: int, column: str) -> Any:
    """A row group as a table, a few rows at a time: one value repeated by reference may be gigabytes as an array."""
    import pyarrow as pa

    batches, size = [], 0
    for batch in file.iter_batches(batch_size=16, row_groups=[number], columns=[column], use_threads=False):
        size += batch.nbytes
        if size > MAX_BYTES // 2:
            raise OdcftError(f"a row group of more than {MAX_BYTES // 2:,} bytes; write the file with smaller ones")
        batches.append(batch)
    return pa.Table.from_batches(batches)


def _columns(path: str, file: Any) -> Columns:
    return choose_columns(path, file.schema_arrow, _features(file))


def _rows_of_groups(file: Any) -> list[int]:
    return [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]


def _features(file: Any) -> Any:
    """What `datasets` says about the columns; {} if another program wrote the file."""
    try:
        text = (file.schema_arrow.metadata or {})[b"huggingface"]
        return json.loads(text)["info"]["features"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}


@lru_cache(maxsize=32)
def _opened(path: str, process: int) -> tuple[Any, int]:
    """A file, open in this process (a forked process opens its own), and its size in bytes."""
    import pyarrow.parquet as pq

    def open_file() -> tuple[Any, int]:
        if is_url(path):
            from odcft.data.stores import remote

            return pq.ParquetFile(remote.open_file(path)), remote.file_size(path)
        return pq.ParquetFile(path, memory_map=False, pre_buffer=False), os.path.getsize(path)

    return _told(path, open_file)


def _told(path: str, work: Callable[[], Any]) -> Any:
    return told(path, work, "Parquet", "Make or copy it again.")
