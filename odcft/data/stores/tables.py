"""Tables that hold encoded images: files of chunks (row groups, record batches), of which one is read at a time."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from odcft.data.index_cache import Index
from odcft.data.names import Names
from odcft.data.shared_arrays import SharesArrays
from odcft.data.stores.lists import label_column
from odcft.errors import OdcftError

# Names of the column of images, by precedence
IMAGE_COLUMNS = ("image", "img", "image_bytes", "bytes", "content", "data", "jpg", "jpeg", "png", "webp")
KEPT_BYTES = 256 << 20  # of decoded chunks, in each process
MAX_LABEL = 4096  # characters

Result = TypeVar("Result")
# A chunk of one column: (path, number of the chunk, column) to a pyarrow array.
ReadChunk = Callable[[str, int, str], Any]


@dataclass(frozen=True)
class Columns:
    """What the columns of a table are for.

    Attributes:
        image: the column of encoded images: bytes, or a struct with a field `bytes`.
        label: the column of labels, or None.
        classes: the names of integer labels, if the file has them.
        several: columns of which any could be the labels.
    """

    image: str
    label: str | None
    classes: list[str] | None = None
    several: tuple[str, ...] = ()


class TableStore(SharesArrays):
    """Images in tables.

    Attributes:
        paths: of the files.
        columns: what their columns are for.
        chunks: for each chunk of all files, in order: number of the file, number of the chunk in it; int64 (C, 2).
        starts: the row that each chunk begins with, and the number of all rows; int64 (C + 1,).
        read_chunk: reads a column of a chunk.
        rows: which rows of the tables the images are; None for all.
    """

    def __init__(
        self,
        paths: list[str],
        columns: Columns,
        chunks: np.ndarray,
        starts: np.ndarray,
        read_chunk: ReadChunk,
        rows: np.ndarray | None = None,
    ) -> None:
        self.paths, self.columns, self.chunks, self.starts = paths, columns, chunks, starts
        self.read_chunk, self.rows = read_chunk, rows

    def read(self, row: int) -> bytes:
        """The bytes of an image."""
        row = row if self.rows is None else int(self.rows[row])
        chunk = int(np.searchsorted(self.starts, row, "right")) - 1
        file, number = self.chunks[chunk].tolist()
        column = _chunk(self.read_chunk, self.paths[file], number, self.columns.image)
        try:
            return _bytes_of(column[row - int(self.starts[chunk])])
        except (ValueError, IndexError, KeyError) as error:  # not UTF-8, or a chunk that has become shorter
            raise OdcftError(f"a damaged row ({error})") from None

    def take(self, rows: np.ndarray) -> "TableStore":
        """The store of these rows."""
        rows = rows if self.rows is None else self.rows[rows]
        return TableStore(self.paths, self.columns, self.chunks, self.starts, self.read_chunk, rows)

    def sizes(self) -> None:
        """Not known without reading all images."""

    def labels(self) -> Names:
        """The label of each image; "" where there is none.

        Raises:
            OdcftError: there are several columns of labels, or they hold something else.
        """
        if self.columns.several:
            raise OdcftError(
                f"{self.paths[0]} has several columns of labels: {', '.join(self.columns.several)}. "
                "Name the right one `label`."
            )
        all_labels = Names(self._labels())
        return all_labels if self.rows is None else all_labels.take(self.rows)

    def _labels(self) -> Iterator[str]:
        if self.columns.label is None:
            yield from ("" for _ in range(int(self.starts[-1])))
            return
        for file, number in self.chunks.tolist():
            for value in self.read_chunk(self.paths[file], number, self.columns.label):
                yield label_text(
                    told(self.paths[file], value.as_py, "labels", ""), self.columns.classes, self.paths[file]
                )


def _bytes_of(value: Any) -> bytes:
    """The bytes of a cell: of its field `bytes`, if it is a struct."""
    inner = value["bytes"] if hasattr(value, "keys") and value.is_valid else value
    if inner.is_valid:
        content = inner.as_py()
        if not isinstance(content, bytes):
            raise OdcftError(f"no bytes, but {type(content).__name__}")
        return content
    where = value["path"].as_py() if inner is not value and "path" in value.keys() else None  # noqa: SIM118
    raise OdcftError(f"no bytes, only a path ({where[:100]})" if isinstance(where, str) and where else "no bytes")


def label_text(value: Any, classes: Sequence[str] | None, path: str) -> str:
    """A label as text: a number as the name of its class, several joined by ";", none as ""."""
    if value is None:
        return ""
    if isinstance(value, list):
        return ";".join(label_text(one, classes, path) for one in value)
    if isinstance(value, int) and not isinstance(value, bool) and classes is not None:
        return classes[value] if 0 <= value < len(classes) else ""  # Hugging Face writes -1 for "not known"
    if not isinstance(value, str | int | float | bool) or len(str(value)) > MAX_LABEL:
        raise OdcftError(f"{path}: a label is {type(value).__name__}, not a number or a name. Give a column of those.")
    return str(value).strip()


def store_of_index(index: Index, root: str, read_chunk: ReadChunk) -> TableStore:
    """The store of an index, which may come from the cache.

    Raises:
        ValueError, KeyError, TypeError: it cannot be right.
    """
    files, columns = index.about["files"], index.about["columns"]
    chunks, starts = index.arrays["chunks"], index.arrays["starts"]
    texts = [*files, columns["image"], columns["label"] or "", *(columns["classes"] or ()), *columns["several"]]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("names of other types")
    if chunks.dtype != np.int64 or starts.dtype != np.int64 or chunks.shape != (len(starts) - 1, 2):
        raise ValueError("arrays of the wrong types")
    if starts[0] != 0 or (np.diff(starts) < 0).any() or starts[-1] != len(index.arrays["ends"]) - 1:
        raise ValueError("rows out of order")
    if len(chunks) and (chunks.min() < 0 or chunks[:, 0].max() >= len(files)):
        raise ValueError("chunks of no file")
    chosen = Columns(columns["image"], columns["label"], columns["classes"], tuple(columns["several"]))
    return TableStore([os.path.join(root, name) for name in files], chosen, chunks, starts, read_chunk)


_one_chunk = threading.Lock()  # a file of pyarrow serves one thread at a time
_kept: OrderedDict[tuple[int, str, int, str], tuple[Any, int]] = OrderedDict()  # chunks of this process


def _chunk(read_chunk: ReadChunk, path: str, number: int, column: str) -> Any:
    """A chunk, one of those kept from the last calls if possible."""
    key = (os.getpid(), path, number, column)
    with _one_chunk:
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key][0]
        for other in [other for other in _kept if other[0] != key[0]]:  # of the process that this one was forked from
            del _kept[other]
        chunk = read_chunk(path, number, column)
        _kept[key] = (chunk, chunk.nbytes)
        while len(_kept) > 1 and sum(size for _, size in _kept.values()) > KEPT_BYTES:
            _kept.popitem(last=False)
        return chunk


def told(path: str, work: Callable[[], Result], kind: str, remedy: str) -> Result:
    """Do something with a file; what pyarrow raises becomes a sentence.

    Args:
        path: of the file.
        work: what to do.
        kind: what the file should be.
        remedy: what to do if it is damaged.
    """
    try:
        return work()
    except OdcftError:
        raise
    except FileNotFoundError:
        raise OdcftError(f"{path} does not exist. {remedy}") from None
    except Exception as error:  # pyarrow raises a dozen types for damaged files
        why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise OdcftError(f"{path} cannot be read as {kind} ({why[:150]}). {remedy}") from None


def choose_columns(path: str, schema: Any, features: Any) -> Columns:
    """Choose the columns of images and of labels by type and name.

    Args:
        path: for messages.
        schema: pyarrow's.
        features: what `datasets` of Hugging Face says about the columns, from a file: any JSON.

    Raises:
        OdcftError: no column, or several, can be the images.
    """
    fields = {field.name: field.type for field in schema}
    fitting = [name for name, kind in fields.items() if _holds_images(kind)]
    described = features if isinstance(features, dict) else {}
    kinds = {name: one.get("_type") for name, one in described.items() if isinstance(one, dict)}
    named = [name for name in fitting if kinds.get(name) == "Image"]
    image = next((c for name in IMAGE_COLUMNS for c in fitting if c.strip().lower() == name), None)
    for some in (named, fitting):
        if len(some) == 1:
            image = some[0]
            break
    if image is None:
        found = ", ".join(f"{name} ({kind})" for name, kind in fields.items()) or "none"
        if len(fitting) > 1:
            raise OdcftError(
                f"{path} has several columns that may be the images: {', '.join(fitting)[:200]}. "
                "Name the right one `image`."
            )
        raise OdcftError(
            f"{path} has no column of encoded images; its columns are: {found[:200]}. "
            "It needs one of bytes, or of {bytes, path}."
        )
    label, several = label_column(list(fields)), tuple[str, ...]()
    if label is None:
        several = tuple(name for name in fields if kinds.get(name) == "ClassLabel")
        label, several = (several[0], ()) if len(several) == 1 else (None, several)
    return Columns(image, label, _class_names(described.get(label)), several)


def _holds_images(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_images(kind.field(index).type)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _class_names(feature: Any) -> list[str] | None:
    """The names of the classes of a ClassLabel, or of a list of them."""
    while isinstance(feature, list) or (isinstance(feature, dict) and feature.get("_type") in ("Sequence", "List")):
        feature = feature.get("feature") if isinstance(feature, dict) else (feature or [None])[0]
    names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return [name.encode("utf-8", "backslashreplace").decode() for name in names]


def row_names(names: Sequence[str], counts: Sequence[int]) -> Iterator[str]:
    """Names of images: file and row, "part.parquet/0007", so that they sort as the rows do."""
    for name, count in zip(names, counts, strict=True):
        width = len(str(max(0, count - 1)))
        for row in range(count):
            yield f"{name}/{row:0{width}d}"
