"""Which images a DATA argument names: those of a folder, or of a list file."""

import csv
import io
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from odcft.data.custom_reader import Reader
from odcft.data.image_files import ENDINGS, read_file, skipped_ending, special_kind
from odcft.errors import OdcftError

LISTS = {".txt": None, ".csv": ",", ".tsv": "\t"}  # extension to its usual delimiter
_NOUN = re.compile(r"\b(device|file|folder|image|line|pipe|socket)\b")  # the word of a `skipped` phrase to pluralise


@dataclass
class Images:
    """The images of a DATA argument, in a fixed order.

    Names are as the file system has them: bytes that are not UTF-8 become surrogates (PEP 383).

    Attributes:
        source: the path as the user gave it.
        root: the folder that names are relative to.
        names: one path for each image.
        labels: of a list file, one for each image; several labels of one image are joined by ";".
        skipped: what is not read, as an extension or a phrase ("pipe", "line without a path"), to how often.
        reader: the user's function that reads them, instead of odcft's decoders.
    """

    source: Path
    root: Path
    names: list[str]
    labels: list[str] | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    reader: Reader | None = None

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        """The path of image `index`."""
        return os.path.join(self.root, self.names[index])

    def read(self, index: int) -> bytes:
        """The encoded bytes of image `index`.

        Raises:
            OdcftError: it is not a regular file, or it is too large.
            OSError: it cannot be read.
        """
        return read_file(self.path(index))

    def without(self, bad: set[int]) -> "Images":
        """A copy without the images of these indices."""
        keep = [i for i in range(len(self)) if i not in bad]
        labels = [self.labels[i] for i in keep] if self.labels else None
        return Images(self.source, self.root, [self.names[i] for i in keep], labels, self.skipped, self.reader)

    def class_labels(self) -> list[str]:
        """The labels that `evaluate` uses: those of the list file, or the name of each image's folder."""
        return self.labels if self.labels is not None else [os.path.dirname(name) for name in self.names]

    def skipped_summary(self) -> str:
        """What was skipped, as a phrase: "300 .heic, 2 .xml, 1 pipe"; "" if nothing was."""
        return _summary(self.skipped)


def _summary(skipped: dict[str, int], limit: int = 6) -> str:
    most_frequent_first = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    phrases = []
    for what, count in most_frequent_first[:limit]:
        if count > 1 and not what.startswith("."):
            what = _NOUN.sub(r"\g<0>s", what, count=1)
        phrases.append(f"{count:,} {what}")
    if others := sum(count for _, count in most_frequent_first[limit:]):
        phrases.append(f"{others:,} of {len(most_frequent_first) - limit} other kinds")
    return ", ".join(phrases)


def find_images(data: str | Path, reader: Reader | None = None) -> Images:
    """Find the images of a folder (searched recursively, sorted by path) or of a list file.

    A folder that can be reached in several ways through symlinks is read once, under its real name if that is inside
    `data`. Everything that is not an image is counted in `skipped`.

    Args:
        data: a folder; a `.txt` with one path per line; or a `.csv`/`.tsv` with the header `path` or `path,label`.
            Paths in a list file are relative to its folder. A path that is listed several times is one image with all
            its labels.
        reader: the user's function that reads the images. With it, all files of a folder count as images.

    Raises:
        OdcftError: `data` does not exist, holds no images, or is not a readable list.
    """
    path = Path(data)
    try:
        path.lstat()
        if not path.exists():
            raise FileNotFoundError  # a dangling symlink
    except (FileNotFoundError, NotADirectoryError):
        raise OdcftError(
            f"{path} does not exist. Give a folder of images, or a list file ({', '.join(LISTS)})."
        ) from None
    except OSError as error:
        raise OdcftError(f"{path} cannot be read: {error.strerror}.") from None
    if path.is_dir():
        names, skipped = _walk(path, every_file=reader is not None)
        if not names:
            what = f"holds no images (but {_summary(skipped)})" if skipped else "is empty"
            raise OdcftError(f"{path} {what}. odcft looks for {', '.join(ENDINGS)}, in sub-folders too.")
        return Images(path, path, sorted(names), None, dict(skipped), reader)
    if path.suffix.lower() not in LISTS or not path.is_file():
        raise OdcftError(
            f"{path} is neither a folder nor a list. Give a folder of images, or a list file ({', '.join(LISTS)})."
        )
    images = _read_list(path)
    images.reader = reader
    return images


def _walk(top: Path, every_file: bool) -> tuple[list[str], Counter[str]]:
    """Return the names of all images under a folder, in any order, and a count of everything else."""
    names: list[str] = []
    skipped: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()
    folders, links = [""], list[str]()
    while folders or links:
        links.sort()  # symlinks come after all real folders, so that they cannot change the names of images
        folder = folders.pop() if folders else links.pop(0)
        try:
            status = os.stat(os.path.join(top, folder))
            if (status.st_dev, status.st_ino) in seen:
                skipped["folder already read"] += 1
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(os.path.join(top, folder)) as listing:
                entries = list(listing)
        except OSError:
            skipped["folder that cannot be opened"] += 1
            continue
        for entry in entries:
            name = os.path.join(folder, entry.name)
            kind, hidden = _kind(entry), entry.name.startswith(".")
            is_image = every_file or entry.name.lower().endswith(ENDINGS)
            if hidden:
                if kind == "folder" or is_image:
                    skipped["hidden folder" if kind == "folder" else "hidden image"] += 1
            elif kind == "folder":
                (links if entry.is_symlink() else folders).append(name)
            elif kind != "file":
                skipped[kind] += 1
            elif is_image:
                names.append(name)
            else:
                skipped[skipped_ending(entry.name)] += 1
    return names, skipped


def _kind(entry: os.DirEntry) -> str:
    """Return "folder", "file" (also for a dangling symlink, which will be unreadable), or what `special_kind` says."""
    try:
        if entry.is_dir():
            return "folder"
        return "file" if entry.is_file() else special_kind(entry.stat().st_mode)
    except OSError:
        return "file"


def _read_list(path: Path) -> Images:
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            text = file.read()
    except OSError as error:
        raise OdcftError(f"{path} cannot be read: {error.strerror}.") from None
    if "\0" in text:
        raise OdcftError(f"{path} is not a text file of paths. If it is a table, save it as CSV, in UTF-8.")
    lines = re.split("\r\n|\r|\n", text)
    skipped: Counter[str] = Counter()
    labelled = False
    rows = [(line.strip(), "") for line in lines if line.strip()]
    if path.suffix.lower() != ".txt":
        rows, labelled = _read_table(path, text, lines[0])
        skipped["line without a path"] = sum(not name for name, _ in rows)
        rows = [row for row in rows if row[0]]
    if not rows:
        raise OdcftError(f"{path} lists no images. It should hold one image path per line, relative to {path.parent}.")
    labels: dict[str, list[str]] = {}
    names: dict[str, str] = {}  # normalised path to the spelling that came first
    for name, label in rows:
        parts = labels.setdefault(names.setdefault(os.path.normpath(name), name), [])
        parts += [part for part in map(str.strip, label.split(";")) if part and part not in parts]
    skipped["duplicate line"] = len(rows) - len(names)
    joined = [";".join(parts) for parts in labels.values()] if labelled else None
    return Images(path, path.parent, list(labels), joined, {what: n for what, n in skipped.items() if n})


def _read_table(path: Path, text: str, header: str) -> tuple[list[tuple[str, str]], bool]:
    """Return the path and label of each line of a .csv or .tsv, and whether there is a column of labels."""
    if len(header) > csv.field_size_limit():
        raise OdcftError(
            f"{path}, line 1: {len(header):,} characters are too many for a header. Is this the right file?"
        )
    default = LISTS[path.suffix.lower()] or ","
    for delimiter in (default, ",", ";", "\t"):
        columns = [c.strip().lower() for c in next(csv.reader([header], delimiter=delimiter, skipinitialspace=True))]
        if "path" in columns:
            break
    else:
        found = ", ".join(next(csv.reader([header], delimiter=default, skipinitialspace=True))) or "none"
        raise OdcftError(
            f"{path} has no column `path`; its columns are: {found[:200]}. "
            "It needs a header with `path` (and, for evaluate, `label`), and one line for each image."
        )
    positions = [columns.index("path"), *([columns.index("label")] if "label" in columns else [])]
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        cells = [[*(line[p].strip() if p < len(line) else "" for p in positions), ""] for line in lines if line]
    except csv.Error as error:
        raise OdcftError(f"{path}, line {lines.line_num}: {error}. Is this the right file?") from None
    return [(cell[0], cell[1]) for cell in cells[1:]], "label" in columns
