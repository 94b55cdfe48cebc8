"""clusters.parquet: path, cluster and distance to the centroid of every image."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from odcft import files
from odcft.clustering.memory import Memory
from odcft.data.images import Images
from odcft.data.names import Names
from odcft.distributed import dist, ownership
from odcft.errors import OdcftError

ROW_GROUP = 1 << 20  # rows, as pyarrow divides a table by default; so many paths are in memory at a time
PIECE = 1 << 16  # paths compared at a time
MAX_PATH = 4096  # bytes of a path, at most on average


def require_parquet() -> None:
    """Refuse to start a run that could not write clusters.parquet at its end."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise OdcftError(f"clusters.parquet needs pyarrow ({error}): pip install pyarrow.") from None


def read_clusters(path: Path) -> dict[str, int]:
    """The cluster of each image, by its path as `write_clusters` wrote it.

    Raises:
        OdcftError: the file does not exist, or is not such a file.
    """
    table = _read(path, ["path", "cluster"])
    return dict(zip(table["path"].to_pylist(), table["cluster"].to_pylist(), strict=True))


def read_cluster_rows(path: Path, names: Names) -> tuple[np.ndarray, np.ndarray]:
    """The cluster int64 (N,) and the distance float32 (N,) of each image, in the order of images.csv.

    Args:
        path: clusters.parquet.
        names: those in images.csv.

    Raises:
        OdcftError: the file does not exist, is not such a file, or lists other images.
    """
    table = _read(path, ["path", "cluster", "distance"])
    others = len(table) != len(names) or any(
        told != _utf8(name) for told, name in zip(_strings(table["path"]), names, strict=True)
    )
    if others:
        raise OdcftError(f"{path} lists other images than {path.with_name('images.csv')}: they are of different runs.")
    labels_N = table["cluster"].to_numpy().astype(np.int64)
    if len(labels_N) and not 0 <= labels_N.min() <= labels_N.max() < max(2, len(names)):
        raise OdcftError(f"{path} is damaged: it has clusters outside 0 … {len(names) - 1:,}.")
    return labels_N, table["distance"].to_numpy().astype(np.float32)


def _read(path: Path, columns: list[str], rows: int | None = None) -> Any:
    """These columns of a clusters.parquet, as a table of pyarrow.

    A few bytes can claim billions of rows, or one long path a million times, so the footer is checked first, and paths
    are counted before they are written out.

    Args:
        path: clusters.parquet.
        columns: path, cluster, distance, or some of them.
        rows: how many images the run has, if that is known.
    """
    require_parquet()
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError(f"it is {'not a file' if path.exists() or path.is_symlink() else 'missing'}")
        with pq.ParquetFile(path, read_dictionary=["path"]) as file:
            _check_footer(file, path, columns, rows)
            table = file.read(columns)
            if any(table[name].null_count for name in columns):
                raise ValueError("its columns have holes")
            if "path" in columns:
                lengths = (
                    pc.sum(pc.binary_length(part.dictionary).take(part.indices)) for part in table["path"].chunks
                )
                if sum(length.as_py() or 0 for length in lengths) > MAX_PATH * len(table):
                    raise ValueError("its paths are too long")
                table = table.set_column(columns.index("path"), "path", table["path"].cast(pa.string()))
            return table
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OdcftError(
            f"{path} is not the clusters.parquet of a run, with {', '.join(f'`{name}`' for name in columns)} ({said})."
        ) from None


def _check_footer(file: Any, path: Path, columns: list[str], rows: int | None) -> None:
    """Raise a ValueError if the footer says that the columns are others, or too large to be true."""
    import pyarrow as pa

    kinds = {"cluster": pa.types.is_integer, "distance": pa.types.is_floating}
    kinds["path"] = lambda kind: pa.types.is_dictionary(kind) and pa.types.is_string(kind.value_type)
    if not all(kinds[name](file.schema_arrow.field(name).type) for name in columns):
        raise ValueError("its columns have other types")
    count, size = file.metadata.num_rows, path.stat().st_size
    if rows is not None and count != rows:
        raise ValueError(f"it has {count:,} rows, but the run has {rows:,} images")
    if count > size:  # paths differ, so even compressed, each takes some bytes
        raise ValueError(f"it claims {count:,} rows in {size:,} bytes")
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    if sum(group.total_byte_size for group in groups) > MAX_PATH * count + (1 << 20):
        raise ValueError(f"it claims far too many bytes for {count:,} rows")


def _strings(column: Any) -> Iterator[str]:
    for chunk in column.chunks:
        for start in range(0, len(chunk), PIECE):
            yield from chunk.slice(start, PIECE).to_pylist()


def _utf8(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def write_clusters(memory: Memory, images: Images, path: Path) -> None:
    """Write clusters.parquet: path, cluster, and distance of the stored feature to the cluster's centroid.

    The rows are in the order of images.csv. Text in Parquet is UTF-8: other bytes in a path are written as \\xNN.
    """
    distances = [
        (memory.features_SD[rows].float() - memory.centroids_KD[memory.labels_S[rows].long()]).norm(dim=1)
        for rows in torch.arange(len(memory.labels_S), device=memory.labels_S.device).split(65536)
    ]
    labels_N = ownership.in_dataset_order(memory.labels_S, len(images))
    distance_N = ownership.in_dataset_order(torch.cat(distances), len(images))
    if dist.rank() == 0:
        import pyarrow as pa
        import pyarrow.parquet as pq

        paths = map(_utf8, images.names)
        numbers = {"cluster": labels_N.cpu().numpy(), "distance": distance_N.cpu().numpy()}
        with files.atomic_file(path) as unfinished, ExitStack() as open_files:
            writer = None
            for start in range(0, max(1, len(images)), ROW_GROUP):
                columns = {name: column[start : start + ROW_GROUP] for name, column in numbers.items()}
                table = pa.table({"path": pa.array(islice(paths, ROW_GROUP), pa.string()), **columns})
                writer = writer or open_files.enter_context(pq.ParquetWriter(unfinished, table.schema))
                writer.write_table(table)


def read_cluster_table(path: Path, rows: int | None = None) -> tuple[list[str], np.ndarray, np.ndarray]:
    """All of clusters.parquet: the paths, cluster (N,) int64 and distance (N,) float32, NaN where it does not say.

    Args:
        path: clusters.parquet.
        rows: how many images the run has, if that is known.

    Raises:
        OdcftError: the file does not exist, is not such a file, or is of another run.
    """
    table = _read(path, ["path", "cluster"], rows)
    cluster_N = table["cluster"].to_numpy().astype(np.int64)
    if len(cluster_N) and cluster_N.min() < 0:
        raise OdcftError(f"{path} is damaged: it has clusters below 0.")
    try:
        distance_N = _read(path, ["distance"], rows)["distance"].to_numpy().astype(np.float32)
    except OdcftError:
        distance_N = np.full(len(table), np.nan, np.float32)
    return table["path"].to_pylist(), cluster_N, distance_N
