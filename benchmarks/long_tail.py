"""A long-tailed subset of labelled images, as in fig. 6 of the paper: a list file, not copies.

    python benchmarks/long_tail.py DATA --ratio 64 --out long_tail.csv [--images 100000] [--classes 300] [--seed 0]

The largest class has RATIO times as many images as the smallest (1: all the same size). In between, sizes follow the
density of the Pareto distribution with power 6, as in ImageNet-LT (Liu et al., CVPR 2019), which the paper refers to.
The paper does not say how it cut the tail off; here the classes are at equal distances on the x axis, over the stretch
that gives the ratio. Larger classes of DATA come first, those of equal size in a random order. If the classes are too
small for so many images, the list has as many as this shape allows. Images with no label or several are left out.
"""

import argparse
import csv
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from odcft import files
from odcft.data.image_files import is_url
from odcft.data.images import Images
from odcft.data.sources import find_images
from odcft.errors import OdcftError

MADE_BY = "long_tail.py"
HEADER = ("path", "label", "made_by")  # the last column tells this script's lists from others
POWER = 6  # of the Pareto distribution (Liu et al. 2019)

# N images, C classes.


def main() -> None:
    args = parse_arguments()
    try:
        images = find_images(args.data)
        by_class, left_out = rows_by_class(images)
        by_class = random_classes(by_class, args.classes, args.seed)
        rows = long_tail(by_class, args.ratio, args.images, args.seed)
        refuse_existing(args.out, args.overwrite)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic_file(args.out) as unfinished:
            write_list(images, np.concatenate(list(rows.values())), unfinished)
    except (OdcftError, OSError) as error:
        sys.exit(refused(error))
    sizes = {label: len(mine) for label, mine in rows.items()}
    values: dict[str, Any] = {"out": str(args.out), "images": sum(sizes.values()), "classes": len(sizes)}
    values |= {"largest": max(sizes.values()), "smallest": min(sizes.values()), "left_out": left_out, "sizes": sizes}
    if args.json:
        print(json.dumps(values))
        return
    print("Wrote {out}: {images:,} images of {classes:,} classes of {smallest:,} to {largest:,}.".format(**values))
    if left_out:
        print(f"Left out    {left_out:,} images with no label or several.")
    if args.images and values["images"] < args.images:
        print(f"Note        The classes are too small for {args.images:,} images at a ratio of {args.ratio:g}.")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="labelled images: one folder per class, or a list with labels")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.csv", help="list to write")
    parser.add_argument("--ratio", type=float, required=True, help="largest class to smallest, 1 or more")
    parser.add_argument("--images", type=int, help="how many images in all (default: as many as the shape allows)")
    parser.add_argument("--classes", type=int, help="how many classes, chosen at random (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace a list that this script wrote")
    parser.add_argument("--json", action="store_true", help="print the sizes as JSON")
    args = parser.parse_args()
    if not 1 <= args.ratio < float("inf"):
        parser.error(f"--ratio {args.ratio:g}: give 1 (all classes the same size) or more")
    for name, least in (("images", 1), ("classes", 2), ("seed", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: give {least} or more")
    if args.out.suffix.lower() != ".csv":
        parser.error(f"--out {args.out}: give the name of a .csv file")
    return args


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Refuse to write where something is, unless it is a list of this script's and may be overwritten."""
    if not (out.exists() or out.is_symlink()):
        return
    if not overwrite:
        raise OdcftError(f"{out} exists. Choose another place, or pass --overwrite.")
    with suppress(OSError):
        if out.is_file() and not out.is_symlink():
            with out.open("rb") as file:
                if file.readline(100).rstrip(b"\r\n").decode(errors="replace") == ",".join(HEADER):
                    return
    raise OdcftError(f"{out} was not written by long_tail.py, so --overwrite will not touch it. Choose another place.")


def refused(error: Exception) -> int:
    """Print a mistake of the user on one line; return the exit code."""
    print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
    return 2


def rows_by_class(images: Images) -> tuple[dict[str, np.ndarray], int]:
    """The numbers of the images of each class, by its name, and how many images have no label or several.

    Raises:
        OdcftError: fewer than two classes.
    """
    by_class: dict[str, list[int]] = {}
    for row, label in enumerate(images.class_labels()):
        if label and (images.classes_are_folders or ";" not in label):
            by_class.setdefault(label, []).append(row)
    if len(by_class) < 2:
        raise OdcftError(
            f"{images.source}: {len(by_class)} classes found, but two or more are needed. Put each class into its own "
            "folder, or give a list with a column `label`."
        )
    found = {label: np.array(by_class[label]) for label in sorted(by_class)}
    return found, len(images) - sum(map(len, found.values()))


def random_classes(by_class: dict[str, np.ndarray], count: int | None, seed: int) -> dict[str, np.ndarray]:
    """So many of the classes, or all of them if `count` is None or there are no more."""
    if count is None or count >= len(by_class):
        return by_class
    names = np.random.default_rng((seed, 1)).choice(sorted(by_class), count, replace=False)
    return {name: by_class[name] for name in sorted(names.tolist())}


def profile(classes: int, ratio: float) -> np.ndarray:
    """The relative size (C,) of each class, from 1 down to 1 / ratio."""
    x = np.linspace(1, ratio ** (1 / (POWER + 1)), classes)
    return x ** -(POWER + 1.0)


def most_images(sizes: list[int], ratio: float) -> int:
    """The largest long-tailed subset that classes of these sizes allow."""
    shape = profile(len(sizes), ratio)
    return int(np.floor(shape * _largest(sizes, shape) + 1e-9).sum())


def long_tail(by_class: dict[str, np.ndarray], ratio: float, images: int | None, seed: int) -> dict[str, np.ndarray]:
    """Draw a long-tailed subset.

    Args:
        by_class: image numbers by class.
        ratio: the largest class to the smallest, up to rounding.
        images: how many; fewer if the classes are too small, None for as many as possible.
        seed: of the order of the classes and of the images.

    Returns:
        Image numbers by class, the largest class first.

    Raises:
        OdcftError: the smallest class would have no image.
    """
    random = np.random.default_rng((seed, 2))
    names = sorted(random.permutation(sorted(by_class)).tolist(), key=lambda name: -len(by_class[name]))
    sizes = [len(by_class[name]) for name in names]
    shape = profile(len(names), ratio)
    exact = shape * _largest(sizes, shape)
    if images is not None:
        exact *= min(1.0, images / exact.sum())
    counts = np.floor(exact + 1e-9).astype(int)
    missing = min(round(float(exact.sum())), images or int(counts.sum())) - int(counts.sum())
    for place in np.argsort(counts - exact, kind="stable")[: max(0, missing)]:  # the largest remainders are rounded up
        counts[place] += counts[place] < sizes[place]
    if counts[-1] < 1:
        raise OdcftError(
            f"With {int(counts.sum()):,} images and a ratio of {ratio:g} the smallest class would have none. "
            "Choose a smaller ratio, fewer classes or more images."
        )
    return {
        name: np.sort(random.permutation(by_class[name])[:count])
        for name, count in zip(names, counts.tolist(), strict=True)
    }


def _largest(sizes: list[int], shape: np.ndarray) -> float:
    """The largest size of the first class for which every class has enough images. sizes: descending."""
    return float((np.array(sorted(sizes, reverse=True)) / shape).min())


def write_list(images: Images, rows: np.ndarray, out: Path) -> None:
    """Write these images with their labels as a list, by their full paths.

    Raises:
        OdcftError: the images are in shards, so they have no paths.
    """
    if images.store is not None or is_url(str(images.root)):
        raise OdcftError(
            f"{images.source}: its images are in shards or at a URL, where a list cannot name them. Give a folder."
        )
    labels = images.class_labels()
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        table = csv.writer(file)
        table.writerow(HEADER)
        table.writerows([os.path.abspath(images.path(row)), labels[row], MADE_BY] for row in sorted(rows.tolist()))


if __name__ == "__main__":
    main()
