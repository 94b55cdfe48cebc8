"""Images: which there are, how they are read, and in what order training sees them."""

import csv
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from odcft import dist, seeds, shared_memory, stopping
from odcft.augment import centre_crop, random_crop
from odcft.errors import OdcftError
from odcft.inputs import View
from odcft.recipe import AugmentRecipe

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".jp2")
LISTS = {".txt": None, ".csv": ",", ".tsv": "\t"}


@dataclass
class Images:
    """The images of a DATA argument, in a fixed order: image i is `names[i]`, under `root`."""

    source: Path  # as the user named it
    root: Path
    names: list[str]  # relative to root
    labels: list[str] | None = None  # of a list file; several joined by ";"

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        """Where image `index` is."""
        return os.path.join(self.root, self.names[index])

    def without(self, bad: set[int]) -> "Images":
        """The images that are left when some are taken out."""
        keep = [i for i in range(len(self)) if i not in bad]
        labels = [self.labels[i] for i in keep] if self.labels else None
        return Images(self.source, self.root, [self.names[i] for i in keep], labels)

    def classes(self) -> list[str]:
        """What `evaluate` takes for labels: those of the list, or each image's folder."""
        return self.labels if self.labels is not None else [os.path.dirname(name) for name in self.names]


def find_images(data: str | Path) -> Images:
    """The images of a folder (searched recursively, sorted by path) or of a list file.

    Args:
        data: a folder; a `.txt` with one path a line; or a `.csv`/`.tsv` with the header `path` or `path,label`.
            Paths in a list are relative to the list file.

    Raises:
        OdcftError: nothing there, no image in it, or a list that is not one.
    """
    path = Path(data)
    if not path.exists():
        raise OdcftError(f"{path}: no such folder or list file of images.")
    if path.is_dir():
        names = []
        for folder, inner, files in os.walk(path, followlinks=True):
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            at = os.path.relpath(folder, path)
            names += [
                os.path.normpath(os.path.join(at, name))
                for name in files
                if name.lower().endswith(ENDINGS) and not name.startswith(".")
            ]
        if not names:
            what = "is empty" if not any(path.iterdir()) else "holds no images"
            raise OdcftError(f"{path} {what}. odcft looks for {', '.join(ENDINGS)}, also in sub-folders.")
        return Images(path, path, sorted(names))
    if path.suffix.lower() not in LISTS:
        raise OdcftError(f"{path} is a file, not images. Give a folder, or a list file ({', '.join(LISTS)}).")
    return _read_list(path)


def _read_list(path: Path) -> Images:
    delimiter = LISTS[path.suffix.lower()]
    labels: list[str] | None = None
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if delimiter is None:
                names = [line.strip() for line in file if line.strip()]
            else:
                rows = list(csv.DictReader(file, delimiter=delimiter))
                if not rows or "path" not in rows[0]:
                    raise OdcftError(
                        f"{path} needs a header with a column `path` (and, for evaluate, `label`), "
                        "and a line for each image."
                    )
                names = [row["path"] for row in rows]
                labels = [row["label"] or "" for row in rows] if "label" in rows[0] else None
    except UnicodeDecodeError:
        raise OdcftError(f"{path} is not a text file of paths.") from None
    if not names:
        raise OdcftError(f"{path} is empty: it should hold one image path a line, relative to {path.parent}.")
    return Images(path, path.parent, names, labels)


def read_image(path: str) -> Image.Image:
    """One image as RGB.

    Raises:
        OSError, ValueError, SyntaxError and others of PIL's, for a file that is no complete image.
    """
    with Image.open(path) as image:
        if image.mode in ("I;16", "I;16B", "I;16L", "I"):  # 16 bits a pixel: PIL's own conversion would clip to white
            return Image.fromarray((np.asarray(image).astype(np.float32) / 257).clip(0, 255).astype(np.uint8)).convert(
                "RGB"
            )
        return image.convert("RGB")


@dataclass
class Crops:
    """A dataset of fixed-size crops: (epoch, index) to pixels and index.

    Attributes:
        images: the images.
        view: how they are seen; with `augment` its size alone plays a part.
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
            image = read_image(self.images.path(index))
            if self.augment is not None:
                draw = random.Random(seeds.seed(self.seed, "crop", epoch, index))
                image = random_crop(image, self.view.size, self.augment, draw)
            else:
                image = centre_crop(image, self.view)
        except Exception as error:  # PIL raises a dozen kinds for broken files; none may end a run of days
            return f"{type(error).__name__}: {error}", index
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
            with Image.open(images.path(index)) as image:
                sides.append(min(image.size))
        except Exception:  # it will be reported when it is its turn
            continue
    return int(np.median(sides)) if sides else 0


def automatic_size(network_size: int, fixed: bool, side: int) -> int:
    """Pixels of the input where nothing else says: the network's own size, or the images' where they are smaller.

    Small images are not blown up, but brought to the next multiple of 8, unless the network takes one size only.

    Args:
        network_size: pixels of the input that the network was made for.
        fixed: whether it takes no other.
        side: of the images (`usual_side`), 0 if unknown.
    """
    return network_size if fixed or side == 0 else min(network_size, max(32, -(-side // 8) * 8))
