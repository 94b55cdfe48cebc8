"""Images: which there are, how they are read, and in what order training sees them."""

import csv
import hashlib
import io
import math
import os
import random
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from odcft import dist, seeds, shared_memory, stopping
from odcft.augment import centre_crop, random_crop
from odcft.errors import OdcftError
from odcft.inputs import View
from odcft.pixels import image_size, read_deep, read_image, special
from odcft.recipe import AugmentRecipe
from odcft.words import shown

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


def same_content(images: Images) -> list[list[int]]:
    """Images whose files are the same, byte by byte.

    Only files of one size are read. Those that cannot be are in no group.

    Returns:
        The numbers of two and more images each, ascending; groups by their first image.
    """
    sizes: dict[int, list[int]] = {}
    for index in range(len(images)):
        with suppress(OSError):
            about = os.stat(images.path(index))
            if stat.S_ISREG(about.st_mode):
                sizes.setdefault(about.st_size, []).append(index)
    groups: dict[bytes, list[int]] = {}
    for index in sorted(i for rows in sizes.values() if len(rows) > 1 for i in rows):
        with suppress(OSError), open(images.path(index), "rb") as file:
            found = hashlib.blake2b(digest_size=16)
            while piece := file.read(1 << 20):
                found.update(piece)
            groups.setdefault(found.digest(), []).append(index)
    return [rows for rows in groups.values() if len(rows) > 1]


@dataclass
class Crops:
    """A dataset of fixed-size crops: (epoch, index) to pixels and index.

    Attributes:
        images: the images.
        view: how they are seen; with `augment` its size and intensity alone play a part.
        augment: random crops (of the recipe's strengths), or None for the middle of the image.
        seed: of the run; without `augment`, seed and epoch play no part.
    """

    images: Images
    view: View
    augment: AugmentRecipe | None = None
    seed: int = 0

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor | str, int]:
        """(3, size, size) uint8, or why the image cannot be read; and the image's number."""
        epoch, index = key
        try:
            image = read_image(self.images.path(index), self.view.intensity)
            if self.augment is not None:
                draw = random.Random(seeds.seed(self.seed, "crop", epoch, index))
                image = random_crop(image, self.view.size, self.augment, draw)
            else:
                image = centre_crop(image, self.view)
        except OdcftError as error:
            return shown(error), index
        except Exception as error:  # PIL raises a dozen kinds for broken files; none may end a run of days
            said = error.strerror if isinstance(error, OSError) else None  # the system's, in words; the path is known
            return shown(said or f"{type(error).__name__}: {error}"), index
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), index


@dataclass
class Batch:
    """What a loader gives: (B, 3, size, size) uint8, their images' numbers (B,), and those that could not be read."""

    pixels: Tensor
    index_B: Tensor
    unreadable: dict[int, str]

    def pin_memory(self) -> "Batch":
        """(called by the loader)"""
        return Batch(self.pixels.pin_memory(), self.index_B.pin_memory(), self.unreadable)

    def __reduce__(self) -> tuple[Any, ...]:
        """(called in a worker)"""
        pixels = shared_memory.handed_over(self.pixels)
        return _received, (pixels, tuple(self.pixels.shape), self.index_B.tolist(), self.unreadable)


def _received(pixels: Tensor | bytes, shape: tuple[int, ...], index: list[int], unreadable: dict[int, str]) -> Batch:
    return Batch(shared_memory.received(pixels, shape), torch.tensor(index, dtype=torch.int64), unreadable)


def collate(items: list[tuple[Tensor | str, int]]) -> Batch:
    """Stack what was read, and list what was not."""
    good = [(pixels, index) for pixels, index in items if isinstance(pixels, Tensor)]
    bad = {index: reason for reason, index in items if isinstance(reason, str)}
    pixels = torch.stack([p for p, _ in good]) if good else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    return Batch(pixels, torch.tensor([index for _, index in good], dtype=torch.int64), bad)


class TrainingOrder:
    """The batches of a run, from a step on: every rank shuffles its own images anew each epoch,
    and takes as many steps.

    It is a pure function of seed and step, so a run can go on anywhere. `draw` gives the rows of an epoch where they
    are not to be each image once.
    """

    def __init__(
        self,
        count: int,
        batch: int,
        epochs: int,
        seed: int,
        first_step: int = 0,
        draw: Callable[[torch.Generator], Tensor] | None = None,
    ) -> None:
        self.owned = torch.tensor(dist.owned(count))
        self.batch = min(batch, count // dist.world_size())  # of this rank
        self.steps_per_epoch = max(1, count // dist.world_size() // self.batch)
        self.steps = self.steps_per_epoch * epochs
        self.seed, self.first_step = seed, first_step
        self.draw = draw or (lambda generator: torch.randperm(len(self.owned), generator=generator))

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in range(self.first_step // self.steps_per_epoch, self.steps // self.steps_per_epoch):
            generator = seeds.generator(self.seed, "order", epoch, dist.rank())
            order = self.owned[self.draw(generator)]
            first = (
                self.first_step - epoch * self.steps_per_epoch
                if epoch == self.first_step // self.steps_per_epoch
                else 0
            )
            for step in range(first, self.steps_per_epoch):
                yield [(epoch, i) for i in order[step * self.batch : (step + 1) * self.batch].tolist()]


def in_order(indices: range, batch: int) -> list[list[tuple[int, int]]]:
    """Batches of these images, one after the other."""
    return [[(0, i) for i in indices[start : start + batch]] for start in range(0, len(indices), batch)]


def loader(crops: Crops, batches: object, workers: int, device: torch.device) -> torch.utils.data.DataLoader:
    """A loader of `Batch`es; batches are lists of (epoch, index)."""
    workers = shared_memory.usable_workers(workers)
    return torch.utils.data.DataLoader(
        crops,  # type: ignore[arg-type]
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
        worker_init_fn=_in_worker,
    )


def _in_worker(worker: int) -> None:
    torch.set_num_threads(1)
    stopping.ignore_in_worker()
    shared_memory.end_rather_than_wait()


def usual_side(images: Images, sample: int = 32) -> int:
    """The median shorter side, in pixels, of a few images spread over the set; 0 if none can be read."""
    sides = []
    for index in range(0, len(images), max(1, len(images) // sample)):
        try:
            sides.append(min(image_size(images.path(index))))
        except Exception:  # it will be reported when it is its turn
            continue
    return int(np.median(sides)) if sides else 0


def own_range(images: Images, full: bool = False, sample: int = 256) -> tuple[tuple[float, float] | None, str]:
    """Which values of images with more than 8 bits a channel to show as black and white, where nobody has said.

    Cameras of 12 bits write files of 16: their own range is taken where it is less than half of what the type could
    hold, and for floating point also where it is beyond 0..1. Up to a pixel in a thousand of an image and one image in
    fifty may lie beyond it at either end: hot pixels, frames gone wrong.

    Args:
        images: those to show.
        full: take the type's limits, whatever use is made of them.
        sample: how many of them at most, spread over the set, are looked at; fewer, but 16, where they are of more than
            a million pixels. Only those of more than 8 bits are decoded.

    Returns:
        (low, high), the type's own limits where the images make use of it; None for images of 8 bits, and of several
        types that are all made use of. And what to tell of it, "" where nothing is changed.
    """
    found: dict[tuple[str, tuple[float, float]], list[tuple[float, float]]] = {}
    sample = min(sample, max(16, (1 << 28) // max(1, usual_side(images) ** 2)))  # some seconds of decoding
    looked_at = range(0, len(images), max(1, -(-len(images) // sample)))
    for index in looked_at:
        with suppress(Exception):  # it will be reported when it is its turn
            deep = read_deep(images.path(index))
            if deep is not None and len(extremes := _extremes(deep.values)):
                found.setdefault((deep.kind, deep.full), []).append((extremes[0], extremes[1]))
    if full or all(_uses(ends, limits) for (_, limits), ends in found.items()):
        return (next(iter(found))[1] if len(found) == 1 else None), ""
    low, high = _ends([pair for pairs in found.values() for pair in pairs])
    count = f"{sum(map(len, found.values())):,} images of {' and of '.join(sorted({kind for kind, _ in found}))}"
    if len(looked_at) < len(images):
        count += f" (of {len(looked_at):,} looked at)"
    least, largest = next(iter(found))[1]
    inside = len(found) == 1 and least <= low < high <= largest
    use = f" use {100 * (high - low) / (largest - least):.2g} % of their range" if inside else ""
    return (low, high), f"{count}{use}: scaled by the set's own, {low:,.6g} is black and {high:,.6g} white."


def _extremes(values: np.ndarray, most: int = 1 << 18) -> list[float]:
    """The least and the largest value but for a thousandth at either end; [] where there is no number."""
    step = max(1, math.ceil(math.sqrt(values.size / most)))
    some = values[::step, ::step].ravel()
    if some.dtype.kind == "f":
        some = some[np.isfinite(some)]
    if not len(some):
        return []
    spare = len(some) // 1000
    some = np.partition(some, [spare, len(some) - 1 - spare])
    return [float(some[spare]), float(some[len(some) - 1 - spare])]


def _ends(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    spare = len(pairs) // 50
    return sorted(low for low, _ in pairs)[spare], sorted(high for _, high in pairs)[-1 - spare]


def _uses(pairs: list[tuple[float, float]], full: tuple[float, float]) -> bool:
    """Whether images make use of the range of their type, or there is nothing to tell apart in them."""
    low, high = _ends(pairs)
    return low >= high or (full[0] <= low and high <= full[1] and high - low >= (full[1] - full[0]) / 2)


def automatic_size(network_size: int, fixed: bool, side: int) -> int:
    """Pixels of the input where nothing else says: the network's own size, or the images' where they are smaller.

    Small images are not blown up, but brought to the next multiple of 8, unless the network takes one size only.

    Args:
        network_size: pixels of the input that the network was made for.
        fixed: whether it takes no other.
        side: of the images (`usual_side`), 0 if unknown.
    """
    return network_size if fixed or side == 0 else min(network_size, max(32, -(-side // 8) * 8))
