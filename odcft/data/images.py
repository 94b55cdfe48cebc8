"""The images of a data set, in a fixed order: their names, and where their bytes are."""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from odcft.data.custom_reader import Reader
from odcft.data.image_files import file_size, read_file
from odcft.data.index_cache import THREADS
from odcft.data.names import Names
from odcft.data.stores.tables import TableStore

_NOUN = re.compile(r"\b(archive|device|file|folder|image|line|link|member|pipe|socket)\b")  # what to pluralise


class Store(Protocol):
    """Where the bytes of images are, by row."""

    def read(self, row: int) -> bytes:
        """The encoded bytes of an image. Raises an OdcftError or an OSError if they cannot be read."""

    def take(self, rows: np.ndarray) -> "Store":
        """The store of these rows, in this order."""

    def sizes(self) -> np.ndarray | None:
        """The size of each image in bytes, int64 (N,), if they are known."""


@dataclass
class Images:
    """The images of a DATA argument, in a fixed order.

    Loader processes share the names and all else that grows with their number.

    Attributes:
        source: the path as the user gave it.
        root: the folder that names are relative to, or its URL.
        names: one for each image: the path of its file, or of the shard and in the shard. As the file system has them:
            bytes that are not UTF-8 become surrogates (PEP 383).
        labels: one for each image, where a list or a tar has some; several labels of one image are joined by ";".
        skipped: what is not read, as an extension or a phrase ("pipe", "line without a path"), to how often.
        store: where the bytes are, if not in one file for each image.
        reader: the user's function that reads them, instead of odcft's decoders.
    """

    source: Path | str
    root: Path | str
    names: Names
    labels: Names | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    store: Store | None = None
    reader: Reader | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.names, Names):
            self.names = Names(self.names)
        if self.labels is not None and not isinstance(self.labels, Names):
            self.labels = Names(self.labels)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        """The path of image `index`; of one in a shard, what to call it."""
        return os.path.join(self.root, self.names[index])

    def read(self, index: int) -> bytes:
        """The encoded bytes of image `index`.

        Raises:
            OdcftError: it is not a regular file, or it is too large.
            OSError: it cannot be read.
        """
        return read_file(self.path(index)) if self.store is None else self.store.read(index)

    def sizes(self) -> np.ndarray | None:
        """The size of each image in bytes, int64 (N,): -1 where there is no regular file; None if not known."""
        if self.store is not None:
            return self.store.sizes()
        pieces = [range(start, min(start + 1024, len(self))) for start in range(0, len(self), 1024)]
        with ThreadPoolExecutor(THREADS) as pool:
            found = pool.map(lambda rows: [file_size(self.path(row)) for row in rows], pieces)
            return np.fromiter((size for piece in found for size in piece), np.int64, len(self))

    def without(self, bad: set[int]) -> "Images":
        """A copy without the images of these indices."""
        if not bad:
            return self
        keep = np.ones(len(self), bool)
        keep[list(bad)] = False
        return self.take(np.flatnonzero(keep))

    def take(self, rows: np.ndarray) -> "Images":
        """A copy with these images only, in this order."""
        labels = None if self.labels is None else self.labels.take(rows)
        store = None if self.store is None else self.store.take(rows)
        return replace(self, names=self.names.take(rows), labels=labels, store=store)

    @property
    def classes_are_folders(self) -> bool:
        """Whether the folder of an image is all that says its class."""
        return self.labels is None and not isinstance(self.store, TableStore)

    def class_labels(self) -> Sequence[str]:
        """The labels that `evaluate` uses: those of the list, the .cls members, the column; or the image's folder."""
        if self.labels is not None:
            return self.labels
        if isinstance(self.store, TableStore):
            return self.store.labels()
        return Names(os.path.dirname(name) for name in self.names)

    def skipped_summary(self) -> str:
        """What was skipped, as a phrase: "300 .heic, 2 .xml, 1 pipe"; "" if nothing was."""
        return summary(self.skipped)


def summary(skipped: dict[str, int], limit: int = 6) -> str:
    """Counts as a phrase, the largest first: "300 .heic, 2 .xml, 1 pipe"; more than `limit` kinds are added up."""
    most_frequent_first = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    phrases = []
    for what, count in most_frequent_first[:limit]:
        if count > 1 and not what.startswith("."):
            what = _NOUN.sub(r"\g<0>s", what, count=1)
        phrases.append(f"{count:,} {what}")
    if others := sum(count for _, count in most_frequent_first[limit:]):
        phrases.append(f"{others:,} of {len(most_frequent_first) - limit} other kinds")
    return ", ".join(phrases)
