"""Compare rotation and colour jitter of odcft, torchvision v2 and kornia: speed, and error.

    python benchmarks/colour_libraries.py [--size 224] [--batch 32] [--device cpu] [--json]      (kornia is optional)

Every image has its own factor, as in training. torchvision takes one factor a call, so it is called for each image. The
error is the largest difference of a pixel, in 0..1, from torchvision in float64, without the thousandth of pixels that
differ most: one half way between two others may be rotated to either. One thread; medians of five rounds, alternated.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from odcft.data import augmentation as ours
from odcft.data.heap import keep_freed_memory

Change = Callable[[Tensor, Tensor], Tensor]


def one_by_one(change: Callable[[Tensor, float], Tensor]) -> Change:
    """A function of one image and one factor, for a batch with a factor for each image."""

    def of_batch(images: Tensor, factor_B: Tensor) -> Tensor:
        return torch.stack([change(image, factor) for image, factor in zip(images, factor_B.tolist(), strict=True)])

    return of_batch


def libraries() -> dict[str, dict[str, Change]]:
    """The five changes by each library that is installed."""
    jitters = zip(("brightness", "contrast", "saturation", "hue"), ours.JITTERS, strict=True)

    def jitter(change: Change) -> Change:  # in place: on a copy, a few images at a time on a CPU
        def of_batch(images: Tensor, factor_B: Tensor) -> Tensor:
            group = 1 if images.device.type == "cpu" else len(images)
            factors = factor_B.to(images.device).view(-1, 1, 1, 1).split(group)
            return torch.cat([change(i.clone(), f) for i, f in zip(images.split(group), factors, strict=True)])

        return of_batch

    found: dict[str, dict[str, Change]] = {"odcft": {name: jitter(change) for name, change in jitters}}
    found["odcft"]["rotation"] = lambda images, factor_B: ours.rotate(images, factor_B)
    found["torchvision v2"] = {
        "brightness": one_by_one(tv.adjust_brightness),
        "contrast": one_by_one(tv.adjust_contrast),
        "saturation": one_by_one(tv.adjust_saturation),
        "hue": one_by_one(tv.adjust_hue),
        "rotation": one_by_one(lambda image, degrees: tv.rotate(image, degrees, tv.InterpolationMode.NEAREST)),
    }
    try:
        import kornia
    except ImportError:
        return found
    enhance = kornia.enhance
    found["kornia"] = {
        "brightness": lambda i, f: enhance.adjust_brightness_accumulative(i, f.to(i)),
        "contrast": lambda i, f: enhance.adjust_contrast_with_mean_subtraction(i, f.to(i)),
        "saturation": lambda i, f: enhance.adjust_saturation_with_gray_subtraction(i, f.to(i)),
        "hue": lambda i, f: enhance.adjust_hue(i, f.to(i) * 2 * torch.pi),
        "rotation": lambda i, f: kornia.geometry.rotate(i, f.to(i), mode="nearest"),
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()
    coarse = torch.rand(args.batch, 3, args.size // 8, args.size // 8)
    images = torch.nn.functional.interpolate(coarse, (args.size, args.size), mode="bilinear").to(args.device)
    spans = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.0, 2.0), "hue": (-0.5, 0.5)}
    factors = {name: torch.empty(args.batch).uniform_(*span) for name, span in {**spans, "rotation": (-2, 2)}.items()}
    found, result = libraries(), {}
    wait = torch.cuda.synchronize if images.is_cuda else lambda: None
    for name, factor_B in factors.items():
        exact = found["torchvision v2"][name](images.double(), factor_B.double())
        seconds: dict[str, list[float]] = {library: [] for library in found}
        for _ in range(6):
            for library, changes in found.items():
                wait()
                began = time.perf_counter() if images.is_cuda else time.process_time()
                changed = changes[name](images, factor_B)
                wait()
                now = time.perf_counter() if images.is_cuda else time.process_time()
                seconds[library].append(now - began)
                error = (changed - exact).abs().flatten().sort().values[: -(exact.numel() // 1000)].max().item()
                result[f"{name}, {library}"] = {"error": error}
        for library, times in seconds.items():  # the first does not count
            result[f"{name}, {library}"]["ms_per_image"] = 1e3 * statistics.median(times[1:]) / args.batch
    if args.json:
        print(json.dumps(result))
        return
    for name, figures in result.items():
        print(f"{name:28} {figures['ms_per_image']:7.3f} ms an image   error {figures['error']:.1e}")


if __name__ == "__main__":
    main()
