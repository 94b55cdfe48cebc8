"""Images: which there are, how they are read, and in what order training sees them."""

import csv
import io
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from odcft.data.image_decoding import special
from odcft.errors import OdcftError

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".jp2")
LISTS = {".txt": None, ".csv": ",", ".tsv": "\t"}


@dataclass
class Images:
    """The images of a DATA argument, in a fixed order: image i is `names[i]`, under `root`.

    Names are as the file system has them: bytes that are no UTF-8 are surrogates (PEP 383).
    """

    source: Path  # as the user named it
    root: Path
    names: list[str]  # relative to root
    labels: list[str] | None = None  # of a list file; several joined by ";"
    skipped: dict[str, int] = field(default_factory=dict)  # what is not read (an ending, or words) to how often

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        """Where image `index` is."""
        return os.path.join(self.root, self.names[index])

    def without(self, bad: set[int]) -> "Images":
        """The images that are left when some are taken out."""
        keep = [i for i in range(len(self)) if i not in bad]
        labels = [self.labels[i] for i in keep] if self.labels else None
        return Images(self.source, self.root, [self.names[i] for i in keep], labels, self.skipped)

    def classes(self) -> list[str]:
        """What `evaluate` takes for labels: those of the list, or each image's folder."""
        return self.labels if self.labels is not None else [os.path.dirname(name) for name in self.names]

    def not_read(self) -> str:
        """What there is besides these images, for a sentence: "300 .heic, 2 .xml, 1 pipe"; "" if there is nothing."""
        return _counted(self.skipped)


def _counted(skipped: dict[str, int], most: int = 6) -> str:
    often = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    words = []
    for what, count in often[:most]:
        noun, blank, rest = what.partition(" ")
        words.append(f"{count:,} {noun}{'s' if count > 1 and not what.startswith('.') else ''}{blank}{rest}")
    if others := sum(count for _, count in often[most:]):
        words.append(f"{others:,} of {len(often) - most} other kinds")
    return ", ".join(words)


def find_images(data: str | Path) -> Images:
    """The images of a folder (searched recursively, sorted by path) or of a list file.

    A folder that several links lead to is read once, under its own name where it has one here. What is no image to
    odcft is counted in `skipped`.

    Args:
        data: a folder; a `.txt` with one path a line; or a `.csv`/`.tsv` with the header `path` or `path,label`.
            Paths in a list are relative to the list file; a path that is there again is one image, and its labels are
            joined.

    Raises:
        OdcftError: nothing there, no image in it, or a list that is not one.
    """
    path = Path(data)
    try:
        path.lstat()
        if not path.exists():
            raise FileNotFoundError  # a link to nowhere
    except (FileNotFoundError, NotADirectoryError):
        raise OdcftError(f"{path}: no such folder or list file of images.") from None
    except OSError as error:
        raise OdcftError(f"{path} cannot be read: {error.strerror}.") from None
    if path.is_dir():
        names, skipped = _walk(path)
        if not names:
            what = f"holds no images (but {_counted(skipped)})" if skipped else "is empty"
            raise OdcftError(f"{path} {what}. odcft looks for {', '.join(ENDINGS)}, also in sub-folders.")
        return Images(path, path, sorted(names), None, dict(skipped))
    if path.suffix.lower() not in LISTS or not path.is_file():
        raise OdcftError(f"{path} is a file, not images. Give a folder, or a list file ({', '.join(LISTS)}).")
    return _read_list(path)


def _walk(top: Path) -> tuple[list[str], Counter[str]]:
    """Names of all images under a folder, in no order, and what else there is."""
    names: list[str] = []
    skipped: Counter[str] = Counter()
    met: set[tuple[int, int]] = set()
    folders, links = [""], list[str]()
    while folders or links:
        links.sort()  # folders are looked into under their own names first, so links cannot change what they are called
        at = folders.pop() if folders else links.pop(0)
        try:
            about = os.stat(os.path.join(top, at))
            if (about.st_dev, about.st_ino) in met:
                skipped["folder met again"] += 1
                continue
            met.add((about.st_dev, about.st_ino))
            with os.scandir(os.path.join(top, at)) as entries:
                found = list(entries)
        except OSError:
            skipped["folder not to be opened"] += 1
            continue
        for entry in found:
            name = os.path.join(at, entry.name)
            kind, is_image, hidden = _kind(entry), entry.name.lower().endswith(ENDINGS), entry.name.startswith(".")
            if hidden:
                if kind == "folder" or is_image:
                    skipped["folder of a hidden name" if kind == "folder" else "image of a hidden name"] += 1
            elif kind == "folder":
                (links if entry.is_symlink() else folders).append(name)
            elif kind != "file":
                skipped[kind] += 1
            elif is_image:
                names.append(name)
            else:
                skipped[os.path.splitext(entry.name)[1].lower() or "file without an ending"] += 1
    return names, skipped


def _kind(entry: os.DirEntry) -> str:
    """What an entry is: "folder", "file" (so is a link to nowhere, which cannot be read), or as `special` says."""
    try:
        if entry.is_dir():
            return "folder"
        return "file" if entry.is_file() else special(entry.stat().st_mode)
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
        raise OdcftError(f"{path} is empty: it should hold one image path a line, relative to {path.parent}.")
    labels: dict[str, list[str]] = {}
    names: dict[str, str] = {}  # by what they lead to
    for name, label in rows:
        there = os.path.normpath(name)
        parts = labels.setdefault(names.setdefault(there, name), [])
        parts += [part for part in map(str.strip, label.split(";")) if part and part not in parts]
    skipped["line met again"] = len(rows) - len(names)
    joined = [";".join(parts) for parts in labels.values()] if labelled else None
    return Images(path, path.parent, list(labels), joined, {what: n for what, n in skipped.items() if n})


def _read_table(path: Path, text: str, header: str) -> tuple[list[tuple[str, str]], bool]:
    """Path and label of each line of a .csv or .tsv, and whether it has labels."""
    if len(header) > csv.field_size_limit():
        raise OdcftError(f"{path}, line 1: {len(header):,} letters are no header. Is it the table you mean?")
    usual = LISTS[path.suffix.lower()] or ","
    for delimiter in (usual, ",", ";", "\t"):
        columns = [c.strip().lower() for c in next(csv.reader([header], delimiter=delimiter, skipinitialspace=True))]
        if "path" in columns:
            break
    else:
        found = ", ".join(next(csv.reader([header], delimiter=usual, skipinitialspace=True))) or "none"
        raise OdcftError(
            f"{path} needs a header with a column `path` (and, for evaluate, `label`), and a line for each image. "
            f"Its columns are: {found[:200]}."
        )
    places = [columns.index("path"), *([columns.index("label")] if "label" in columns else [])]
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        cells = [[*(line[p].strip() if p < len(line) else "" for p in places), ""] for line in lines if line]
    except csv.Error as error:
        raise OdcftError(f"{path}, line {lines.line_num}: {error}. Is it the table you mean?") from None
    return [(cell[0], cell[1]) for cell in cells[1:]], "label" in columns
