"""The files that `odcft embed` writes: features, paths and labels, as .npz or .parquet.

Shapes: N images, F features.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from odcft.files import atomic_file

MADE_BY = "odcft embed"  # how these files are told from others


def write_embedding(path: Path, features_NF: np.ndarray, names: Sequence[str], labels: Sequence[str] | None) -> None:
    """Write features with the names and labels of their images. Bytes of a name that are not UTF-8 become \\xNN."""
    paths = [_utf8(name) for name in names]
    text = None if labels is None else [_utf8(label) for label in labels]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as unfinished:
        if path.suffix == ".npz":
            arrays = {"features": features_NF, "paths": np.array(paths), "made_by": np.array(MADE_BY)}
            if text is not None:
                arrays["labels"] = np.array(text)
            with unfinished.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        flat = pa.array(np.ascontiguousarray(features_NF).reshape(-1))
        columns = {"path": pa.array(paths), "features": pa.FixedSizeListArray.from_arrays(flat, features_NF.shape[1])}
        if text is not None:
            columns["label"] = pa.array(text)
        pq.write_table(pa.table(columns).replace_schema_metadata({MADE_BY: "1"}), unfinished)


def _utf8(text: str) -> str:
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def written_by_embed(path: Path) -> bool:
    """Whether a file says of itself that `odcft embed` wrote it."""
    try:
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                return "made_by" in arrays and str(arrays["made_by"]) == MADE_BY
        import pyarrow.parquet as pq

        return MADE_BY.encode() in (pq.read_schema(path).metadata or {})
    except Exception:  # of whatever kind: another file
        return False


def read_parquet(path: Path) -> dict[str, np.ndarray]:
    """The `features` (N, F) of a .parquet file and, if it has any, the `labels` (N,).

    Raises:
        OSError, ValueError and their kinds: it is not such a file, or it is far larger than it seems.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pq.read_schema(path)
    if "features" not in schema.names or not pa.types.is_fixed_size_list(schema.field("features").type):
        raise ValueError(f"its columns are {', '.join(schema.names)[:200]}")
    metadata = pq.read_metadata(path)
    if metadata.num_rows * schema.field("features").type.list_size > 1 << 33:
        raise ValueError(f"{metadata.num_rows:,} rows of {schema.field('features').type.list_size:,} features")
    table = pq.read_table(path, columns=[name for name in ("features", "label") if name in schema.names])
    column = table["features"].combine_chunks()
    if column.null_count:
        raise ValueError("some of its features are missing")
    rows = column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), column.type.list_size)
    labels = (
        {"labels": np.array([label or "" for label in table["label"].to_pylist()], dtype=str)}
        if "label" in table.column_names
        else {}
    )
    return {"features": rows, **labels}
