"""Names of any number of images in one array of bytes: loader processes share it, and no name is a Python object."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import overload

import numpy as np

from odcft.data.shared_arrays import SharesArrays, shared

PIECE = 1 << 16  # names that are encoded, decoded or copied at a time
ENCODING = ("utf-8", "surrogateescape")


class Names(SharesArrays, Sequence[str]):
    """N strings, read-only: file names, or labels. Bytes that are not UTF-8 become surrogates (PEP 383).

    Attributes:
        bytes_B: all names one after the other, as UTF-8, uint8 (B,).
        ends: where each begins and the last one ends, int64 (N + 1,).
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        joined, ends = bytearray(), [np.zeros(1, np.int64)]
        for piece in _pieces(names):
            encoded = [name.encode(*ENCODING) for name in piece]
            lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
            ends.append(np.cumsum(lengths) + len(joined))
            joined += b"".join(encoded)
        self.bytes_B = shared(np.frombuffer(joined, np.uint8))
        self.ends = shared(np.concatenate(ends))

    @classmethod
    def of_arrays(cls, bytes_B: np.ndarray, ends: np.ndarray) -> "Names":
        """Names in arrays that are already there, for example in a mapped file.

        Raises:
            ValueError: the arrays do not match.
        """
        if bytes_B.dtype != np.uint8 or ends.dtype != np.int64 or bytes_B.ndim != 1 or ends.ndim != 1 or not len(ends):
            raise ValueError("arrays of the wrong types")
        if ends[0] != 0 or ends[-1] != len(bytes_B) or (ends[1:] < ends[:-1]).any():
            raise ValueError("offsets out of order")
        names = cls.__new__(cls)
        names.bytes_B, names.ends = bytes_B, ends
        return names

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Names": ...
    def __getitem__(self, index: int | slice) -> "str | Names":
        if isinstance(index, slice):
            return self.take(np.arange(*index.indices(len(self))))
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"name {index} of {count}")
        index += count * (index < 0)
        return self.bytes_B[self.ends[index] : self.ends[index + 1]].tobytes().decode(*ENCODING)

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), PIECE):
            ends = self.ends[start : start + PIECE + 1]
            piece, offsets = self.bytes_B[ends[0] : ends[-1]].tobytes(), (ends - ends[0]).tolist()
            for begin, end in pairwise(offsets):
                yield piece[begin:end].decode(*ENCODING)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self.rows_of((name,))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Names):
            return np.array_equal(self.ends, other.ends) and np.array_equal(self.bytes_B, other.bytes_B)
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        some = ", ".join(map(repr, self[:3]))
        return f"Names([{some}{', …' if len(self) > 3 else ''}], {len(self):,} in all)"

    def rows_of(self, wanted: Collection[str]) -> dict[str, int]:
        """The rows of those of the wanted names that are here, found in one pass."""
        wanted = set(wanted)
        return {name: row for row, name in enumerate(self) if name in wanted} if wanted else {}

    def take(self, rows: np.ndarray) -> "Names":
        """The names of these rows, in this order."""
        lengths = np.diff(self.ends)[rows]
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        joined = np.empty(ends[-1], np.uint8)
        for start in range(0, len(rows), PIECE):
            here = slice(start, start + PIECE)
            shift = np.repeat(self.ends[:-1][rows[here]] - ends[:-1][here], lengths[here])
            first, last = ends[start], ends[min(start + PIECE, len(rows))]
            joined[first:last] = self.bytes_B[shift + np.arange(first, last)]
        return Names.of_arrays(shared(joined), shared(ends))


def _pieces(names: Iterable[str]) -> Iterator[list[str]]:
    piece: list[str] = []
    for name in names:
        piece.append(name)
        if len(piece) == PIECE:
            yield piece
            piece = []
    if piece:
        yield piece
