"""Batches of images, and the order in which training sees them."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from odcft import seeds
from odcft.data import shared_memory
from odcft.data.augmentation import random_crop
from odcft.data.decoded_cache import DecodedCache
from odcft.data.image_reading import image_of, pixels_of
from odcft.data.images import Images
from odcft.data.jpeg_crops import crop_of_decoded, jpeg_crop
from odcft.data.view import View, centre_crop
from odcft.distributed import dist, ownership, stop_signals
from odcft.distributed.accelerator import ASYNCHRONOUS
from odcft.errors import OdcftError
from odcft.recipe import AugmentRecipe
from odcft.text import printable


@dataclass
class Crops:
    """A dataset of fixed-size crops: maps (epoch, index) to pixels and index.

    Attributes:
        images: the images.
        view: how images are prepared; with `augment`, only its size and intensity matter.
        augment: the strengths of random crops, or None for centre crops.
        seed: of the run; seed and epoch matter only with `augment`.
        decoder: `data.decoder`; matters only with `augment`.
        cache: where to keep decoded images (`data.cache`); used only with `augment`.
    """

    images: Images
    view: View
    augment: AugmentRecipe | None = None
    seed: int = 0
    decoder: str = "pil"
    cache: DecodedCache | None = None

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor | str, int]:
        """Return the pixels (3, size, size) uint8, or why the image cannot be read; and the image's index."""
        epoch, index = key
        try:
            if self.augment is not None:
                return self._random_crop(epoch, index, self.augment), index
            return _to_tensor(centre_crop(pixels_of(self.images, index, self.view), self.view)), index
        except OdcftError as error:
            return printable(error), index
        except Exception as error:  # Pillow raises a dozen types for broken files; none may stop a long run
            said = error.strerror if isinstance(error, OSError) else None  # without errno and path
            return printable(said or f"{type(error).__name__}: {error}"), index

    def _random_crop(self, epoch: int, index: int, augment: AugmentRecipe) -> Tensor:
        """The crop (3, size, size) uint8 of a training image. Raises as `pixels_of`."""
        size, rng = self.view.size, partial(random.Random, seeds.seed(self.seed, "crop", epoch, index))
        cache = self.cache
        if cache is not None and (kept := cache.get(index)) is not None:
            pixels, orientation = kept
            if orientation:
                return crop_of_decoded(pixels, orientation, size, augment, rng())
            return _to_tensor(random_crop(image_of(pixels), size, augment, rng()))
        data = None if self.images.reader is not None else self.images.read(index)
        if self.decoder == "turbo" and data is not None and self.view.bands == 3:
            crop = jpeg_crop(data, size, augment, rng(), None if cache is None else partial(cache.put, index))
            if crop is not None:
                return crop
        image = pixels_of(self.images, index, self.view, data)
        if cache is not None and max(image.size) < cache.side:
            cache.put(index, np.asarray(image))
        return _to_tensor(random_crop(image, size, augment, rng()))


def _to_tensor(image: Any) -> Tensor:
    """The pixels (C, H, W) of a Pillow image or a BandStack."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@dataclass
class Batch:
    """What a data loader yields.

    Attributes:
        pixels: (B, 3, size, size) uint8.
        index_B: (B,), the index of each image in `Images`.
        unreadable: index to reason, for the images that could not be read.
    """

    pixels: Tensor
    index_B: Tensor
    unreadable: dict[int, str]

    def pin_memory(self) -> "Batch":
        """Copy to pinned memory (the data loader calls this)."""
        return Batch(self.pixels.pin_memory(), self.index_B.pin_memory(), self.unreadable)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle to send from a data worker to the training process, through shared memory if possible."""
        pixels = shared_memory.pack_pixels(self.pixels)
        return _unpickle_batch, (pixels, tuple(self.pixels.shape), self.index_B.tolist(), self.unreadable)


def _unpickle_batch(
    pixels: Tensor | bytes, shape: tuple[int, ...], index: list[int], unreadable: dict[int, str]
) -> Batch:
    return Batch(shared_memory.unpack_pixels(pixels, shape), torch.tensor(index, dtype=torch.int64), unreadable)


def collate(items: list[tuple[Tensor | str, int]]) -> Batch:
    """Stack the images that were read; list those that were not."""
    good = [(pixels, index) for pixels, index in items if isinstance(pixels, Tensor)]
    bad = {index: reason for reason, index in items if isinstance(reason, str)}
    pixels = torch.stack([p for p, _ in good]) if good else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    return Batch(pixels, torch.tensor([index for _, index in good], dtype=torch.int64), bad)


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Steps per epoch over `count` images; `batch_size` counts the images of all ranks."""
    share = count // dist.world_size()
    return max(1, share // min(batch_size // dist.world_size(), share))


class TrainingOrder:
    """The batches of a run from some step on: every rank reshuffles its own images each epoch; all take as many steps.

    The order is a pure function of seed and step, so a run can resume anywhere.

    Args:
        count: N, the images of all ranks.
        batch: images per batch on this rank.
        epochs: in the whole run.
        seed: of the run.
        first_step: the first step to yield a batch for.
        draw: the rows of an epoch, in order; by default each image once, shuffled.
        reads_ahead: whether the next epoch may be drawn before this one ends; if not, iterating ends with the epoch.
    """

    def __init__(
        self,
        count: int,
        batch: int,
        epochs: int,
        seed: int,
        first_step: int = 0,
        draw: Callable[[torch.Generator], Tensor] | None = None,
        *,
        reads_ahead: bool = True,
    ) -> None:
        self.count, self.owned = count, torch.tensor(ownership.my_images(count))
        self.batch = min(batch, count // dist.world_size())  # of this rank
        self.steps_per_epoch = steps_per_epoch(count, batch * dist.world_size())
        self.steps = self.steps_per_epoch * epochs
        self.seed, self.first_step, self.reads_ahead = seed, first_step, reads_ahead
        self.draw = draw or (lambda generator: torch.randperm(len(self.owned), generator=generator))

    def __len__(self) -> int:
        return self.steps - self.first_step

    def images_left(self) -> int:
        """How many images all ranks will see from `first_step` on."""
        return len(self) * self.batch * dist.world_size()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epochs = range(self.first_step // self.steps_per_epoch, self.steps // self.steps_per_epoch)
        for epoch in epochs if self.reads_ahead else epochs[:1]:
            generator = seeds.generator(self.seed, "order", epoch, dist.rank())
            order = self.owned[self.draw(generator)]
            first = (
                self.first_step - epoch * self.steps_per_epoch
                if epoch == self.first_step // self.steps_per_epoch
                else 0
            )
            for step in range(first, self.steps_per_epoch):
                yield [(epoch, i) for i in order[step * self.batch : (step + 1) * self.batch].tolist()]


class TrainingBatches:
    """The batches of a run, an epoch at a time, from loader processes that live as long as the run.

    Args:
        crops: the images, with augmentation.
        order: which images make a batch. Unless it ends with every epoch, the processes read ahead into the next one.
        workers: loader processes.
        device: the device that the batches will be moved to.
    """

    def __init__(self, crops: Crops, order: TrainingOrder, workers: int, device: torch.device) -> None:
        self.order = order
        self._loader = make_loader(crops, order, workers, device, persistent=True)
        self._running: Iterator[Batch] | None = None

    def close(self) -> None:
        """Stop the loader processes, and forget what they have read ahead; the next `of_epoch` starts new ones."""
        self._running = self._loader._iterator = None

    def of_epoch(self, step: int) -> Iterator[Batch]:
        """The batches from a step of the run to the end of its epoch."""
        if self._running is None or not self.order.reads_ahead:
            self.order.first_step = step
            self._running = iter(self._loader)
        for _ in range(step, (step // self.order.steps_per_epoch + 1) * self.order.steps_per_epoch):
            yield next(self._running)


def sequential_batches(indices: range, batch: int) -> list[list[tuple[int, int]]]:
    """Batches of these images, in order, all for epoch 0."""
    return [[(0, i) for i in indices[start : start + batch]] for start in range(0, len(indices), batch)]


def make_loader(
    crops: Crops,
    batches: TrainingOrder | list[list[tuple[int, int]]],
    workers: int,
    device: torch.device,
    *,
    persistent: bool = False,
) -> torch.utils.data.DataLoader:
    """A loader of `Batch`es.

    Args:
        crops: the images.
        batches: lists of (epoch, index).
        workers: loader processes; they read as far ahead as fits in shared memory.
        device: the device that the batches will be moved to.
        persistent: whether to keep the processes for the next iteration.
    """
    images = batches.batch if isinstance(batches, TrainingOrder) else max(map(len, batches), default=0)
    queue = shared_memory.fitting_queue(workers, crops.view.bands * crops.view.size**2 * images)
    workers = shared_memory.usable_workers(workers)
    return torch.utils.data.DataLoader(
        crops,  # type: ignore[arg-type]
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type in ASYNCHRONOUS,
        prefetch_factor=queue.ahead if workers else None,
        persistent_workers=persistent and workers > 0,
        worker_init_fn=partial(_init_worker, queue.shared),
    )


def _init_worker(shared: bool, worker: int) -> None:
    torch.set_num_threads(1)
    stop_signals.ignore_signals_in_worker()
    if not shared:
        shared_memory.use_pipes()
    shared_memory.exit_instead_of_hanging()
