"""Folders that `datasets` of Hugging Face saves (`save_to_disk`): Arrow streams, mapped into memory."""

import os
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from odcft.data.stores.tables import Columns, choose_columns, told
from odcft.errors import OdcftError
from odcft.files import read_json


def find_dataset(folder: Path) -> Path | None:
    """The folder of the one dataset that is saved in a folder; None if none is.

    Raises:
        OdcftError: it holds several splits.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = read_json(folder / "dataset_dict.json").get("splits")
        there = [s for s in splits if isinstance(s, str) and _is_name(s)] if isinstance(splits, list) else []
        there = [split for split in there if (folder / split / "state.json").is_file()]
        if len(there) != 1:
            which = f"the splits {', '.join(there)[:200]}" if there else "no split that is there"
            how = f"Give one of them, for example {folder / there[0]}." if there else "Save it again."
            raise OdcftError(f"{folder} is a saved dataset with {which}. {how}")
        folder = folder / there[0]
    return folder if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file() else None


def read_state(folder: Path, advance: Callable[..., None]) -> tuple[list[str], Columns, list[list[int]]]:
    """The names of the files, what the columns are for, and the rows of each record batch of each file.

    Raises:
        OdcftError: the folder is damaged, or is not as save_to_disk writes it.
    """
    state, info = read_json(folder / "state.json"), read_json(folder / "dataset_info.json")
    listed = state.get("_data_files")
    entries = [one.get("filename") for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    names = [name for name in entries if isinstance(name, str) and _is_name(name)]
    if not names or len(names) < len(entries):
        raise OdcftError(f"{folder / 'state.json'} does not list the files of a dataset. Save it again.")
    if state.get("_indices_data_files"):
        raise OdcftError(f"{folder} selects rows through a list of indices. Save it again: `flatten_indices()` first.")
    columns, groups = None, list[list[int]]()
    for name in names:
        path = str(folder / name)
        if not os.path.isfile(path):
            raise OdcftError(f"{path}, which state.json lists, is not a file. Save the dataset again.")
        batches = _batches(path, os.getpid())
        found = _told(path, partial(_columns, path, info.get("features")))
        if columns is not None and found != columns:
            raise OdcftError(f"{path} has other columns than {names[0]}. Save the dataset again.")
        columns = found
        for batch in batches:
            _told(path, partial(batch.column(found.image).validate, full=True))
            if found.label is not None:
                _told(path, partial(batch.column(found.label).validate, full=True))
        groups.append([batch.num_rows for batch in batches])
        if sum(groups[-1]) > os.path.getsize(path):
            raise OdcftError(
                f"{path} is damaged: it claims {sum(groups[-1]):,} rows in {os.path.getsize(path):,} bytes."
            )
        advance(1)
    assert columns is not None
    return names, columns, groups


def read_batch(path: str, number: int, column: str) -> Any:
    """One column of a record batch, which stays in the file until it is looked at."""
    return _batches(path, os.getpid())[number].column(column)


def _is_name(name: str) -> bool:
    """Whether a name stays inside its folder, and is short enough for a file system."""
    return 0 < len(name) < 256 and name not in (".", "..") and not set(name) & set("/\\\0")


@lru_cache(maxsize=1024)
def _batches(path: str, process: int) -> list[Any]:
    """The record batches of a stream, mapped into memory."""

    def read() -> list[Any]:
        import pyarrow as pa

        batches, most = [], 2 * os.path.getsize(path) + (64 << 20)
        with pa.ipc.open_stream(pa.memory_map(path)) as stream:
            for batch in stream:
                most -= batch.nbytes
                if most < 0:  # what save_to_disk writes stays in the file; compressed batches would be in memory
                    raise OdcftError(f"{path} is compressed. Save the dataset again, without compression.")
                batches.append(batch)
        return batches

    return _told(path, read)


def _columns(path: str, features: Any) -> Columns:
    import pyarrow as pa

    return choose_columns(path, pa.ipc.open_stream(pa.memory_map(path)).schema, features)


def _told(path: str, work: Callable[[], Any]) -> Any:
    return told(path, work, "an Arrow stream", "Save the dataset again.")
