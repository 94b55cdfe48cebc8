"""Measure how many images a second one core prepares for training, compared with torchvision's own transforms on PIL.

    python benchmarks/input_pipeline.py DATA --size 224 [--images 240] [--decoder turbo|pil] [--json]

The augmentation is the same (the paper's), and both read the files and end with a batch:

- ours: what a data worker does (read, decode, crop, resize, flip, to a uint8 batch). Colours and rotation then run on
  the GPU.
- ours_cpu: the same, followed by rotation and colours on the CPU, to a float batch.
- torchvision: RandomResizedCrop, RandomHorizontalFlip, RandomRotation, ColorJitter, RandomGrayscale and ToTensor, to a
  float batch.
- decode, decode_pil: reading and decoding alone, by libjpeg-turbo (if all are JPEGs) and by Pillow.

One thread. Five rounds, alternated, so that a machine that slows down slows all; the results are medians. Time is that
of the processor, so other programs on the machine matter little, and waiting for a disk does not count.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from PIL import Image
from torchvision import transforms

from odcft.data import jpeg_crops
from odcft.data.augmentation import augment_batch
from odcft.data.batches import Batch, Crops, make_loader, sequential_batches
from odcft.data.image_decoding import read_image
from odcft.data.images import Images
from odcft.data.sources import find_images
from odcft.data.view import View
from odcft.recipe import AugmentRecipe

ROUNDS, BATCH = 5, 60


class TorchvisionCrops(torch.utils.data.Dataset):
    """The same augmentation by torchvision's transforms on PIL images."""

    def __init__(self, images: Images, size: int, recipe: AugmentRecipe) -> None:
        self.images = images
        jitter = (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(size, recipe.crop_scale, recipe.crop_ratio),
                transforms.RandomHorizontalFlip(recipe.flip),
                transforms.RandomRotation(recipe.rotation),
                transforms.ColorJitter(*jitter),
                transforms.RandomGrayscale(recipe.gray),
                transforms.ToTensor(),
            ]
        )

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(self.images.path(index)).convert("RGB"))


def our_batches(crops: Crops, count: int) -> Iterator[Batch]:
    """The first `count` images as a data worker prepares them, in batches."""
    for batch in make_loader(crops, sequential_batches(range(count), BATCH), 0, torch.device("cpu")):
        if batch.unreadable:
            index, reason = next(iter(batch.unreadable.items()))
            raise SystemExit(f"{crops.images.names[index]} cannot be read ({reason}). Measure without it.")
        yield batch


def consume(items: Iterable[object]) -> None:
    """Make all items, keeping none."""
    for _ in items:
        pass


def pipelines(images: Images, count: int, size: int, decoder: str) -> dict[str, Callable[[], None]]:
    """What is measured: each processes the first `count` images once."""
    recipe, generator = AugmentRecipe(), torch.Generator().manual_seed(0)
    crops, theirs = Crops(images, View(size), recipe, 0, decoder), TorchvisionCrops(images, size, recipe)
    measured: dict[str, Callable[[], None]] = {
        "ours": lambda: consume(our_batches(crops, count)),
        "ours_cpu": lambda: consume(augment_batch(b.pixels, recipe, generator) for b in our_batches(crops, count)),
        "torchvision": lambda: consume(torch.utils.data.DataLoader(theirs, BATCH, sampler=range(count))),
        "decode_pil": lambda: consume(read_image(images.read(index)) for index in range(count)),
    }
    if jpeg_crops.is_available() and all(images.read(index)[:2] == b"\xff\xd8" for index in range(count)):
        import simplejpeg

        measured["decode"] = lambda: consume(simplejpeg.decode_jpeg(images.read(index)) for index in range(count))
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a folder or list of images")
    parser.add_argument("--size", type=int, default=224, help="pixels of a crop")
    parser.add_argument("--images", type=int, default=240, help="how many images to use, from the first")
    parser.add_argument("--decoder", choices=("turbo", "pil"), default="turbo", help="data.decoder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = find_images(args.data)
    count = min(args.images, len(images))
    runs = pipelines(images, count, args.size, args.decoder)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for name in runs:  # a first round that does not count
        runs[name]()
    for number in range(ROUNDS):
        for name in runs if number % 2 else reversed(runs):
            began = time.process_time()
            runs[name]()
            seconds[name].append(time.process_time() - began)
    rates = {name: count / statistics.median(times) for name, times in seconds.items()}

    def ratio(name: str) -> float:
        pairs = zip(seconds[name], seconds["torchvision"], strict=True)
        return statistics.median(theirs / mine for mine, theirs in pairs)

    result = {**rates, "ratio": ratio("ours"), "ratio_cpu": ratio("ours_cpu"), "images": count, "size": args.size}
    if args.json:
        print(json.dumps(result))
        return
    print(f"{count} images at {args.size} pixels, decoder {args.decoder}; images a second of one core")
    for name, rate in rates.items():
        print(f"  {name:12} {rate:8.0f}   {ratio(name):5.2f} times torchvision's")


if __name__ == "__main__":
    main()
