"""The paper's augmentation (sec. 3.4). Data workers only decode and crop; the rest runs on whole batches on the device.

Every factor is drawn separately for each image, from a generator on the CPU, so it is the same on any device.
"""

import math
import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from odcft.data.heap import keep_freed_memory
from odcft.recipe import AugmentRecipe

_GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision
CACHED_PIXELS = 50_000  # of the images that a core of a CPU augments at a time


class Crop(NamedTuple):
    """A random crop as drawn: its box (left, top, right, bottom) in pixels, and whether it is flipped left to right."""

    box: tuple[int, int, int, int]
    flipped: bool


def draw_crop(width: int, height: int, recipe: AugmentRecipe, rng: random.Random) -> Crop:
    """Draw a random area and aspect ratio, as torchvision's RandomResizedCrop, and whether to flip."""
    for _ in range(10):
        area = width * height * rng.uniform(*recipe.crop_scale)
        ratio = math.exp(rng.uniform(math.log(recipe.crop_ratio[0]), math.log(recipe.crop_ratio[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            break
    else:  # ten tries did not fit (the image is very long): take the centre square
        w = h = min(width, height)
        left, top = (width - w) // 2, (height - h) // 2
    return Crop((left, top, left + w, top + h), rng.random() < recipe.flip)


def random_crop(image: Image.Image, size: int, recipe: AugmentRecipe, rng: random.Random) -> Image.Image:
    """Crop a random area and aspect ratio, resize it to size x size and perhaps flip it.

    As torchvision's RandomResizedCrop and RandomHorizontalFlip.
    """
    crop = draw_crop(*image.size, recipe, rng)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=crop.box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.flipped else image


class Changes(NamedTuple):
    """What was drawn for each image of a batch, on the CPU."""

    degrees_B: Tensor | None  # to rotate by
    factors_4B: Tensor  # one row for each of JITTERS
    order_B4: list[list[int]]  # each image gets the four jitters in its own order
    gray_B: list[bool]  # which images become gray

    def of(self, rows: slice) -> "Changes":
        """The changes of some images."""
        degrees_B = None if self.degrees_B is None else self.degrees_B[rows]
        return Changes(degrees_B, self.factors_4B[:, rows], self.order_B4[rows], self.gray_B[rows])


def _draw_changes(count: int, recipe: AugmentRecipe, generator: torch.Generator) -> Changes:
    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(count).uniform_(low, high, generator=generator)

    degrees_B = uniform(-recipe.rotation, recipe.rotation) if recipe.rotation else None
    hue_B = uniform(-recipe.hue, recipe.hue)
    strengths = (recipe.brightness, recipe.contrast, recipe.saturation)
    factors_4B = torch.stack([*(uniform(max(0.0, 1 - s), 1 + s) for s in strengths), hue_B])
    order_B4 = torch.rand(count, 4, generator=generator).argsort(1).tolist()
    gray_B = (torch.rand(count, generator=generator) < recipe.gray).tolist() if recipe.gray else [False] * count
    return Changes(degrees_B, factors_4B, order_B4, gray_B)


def augment_batch(images: Tensor, recipe: AugmentRecipe, generator: torch.Generator) -> Tensor:
    """Turn images, jitter their colours and make some of them gray: the augmentation that follows `random_crop`.

    Args:
        images: (B, 3, H, W), float in 0..1 or uint8; of images of other bands, only place, brightness and contrast
            change.
        recipe: the strength of each change.
        generator: on the CPU.

    Returns:
        (B, 3, H, W) float in 0..1.
    """
    if images.shape[1] != 3:
        recipe = recipe.model_copy(update={"saturation": 0.0, "hue": 0.0, "gray": 0.0})
    images = _flip_and_turn(images, recipe, generator)
    changes = _draw_changes(len(images), recipe, generator)
    if images.device.type != "cpu":
        return _apply(changes, images, recipe)
    keep_freed_memory()
    # On a CPU the whole batch would leave the cache between one operation and the next. A few images at a time do not:
    # the same values, in a third of the time.
    group = max(1, CACHED_PIXELS * torch.get_num_threads() // (images.shape[2] * images.shape[3]))
    changed = torch.empty(images.shape)
    for start in range(0, len(images), group):
        rows = slice(start, start + group)
        changed[rows] = _apply(changes.of(rows), images[rows], recipe)
    return changed


def _apply(changes: Changes, images: Tensor, recipe: AugmentRecipe) -> Tensor:
    """Apply what was drawn for these images. Rows are listed on the CPU, so nothing waits for the device."""

    def on_device(drawn: Tensor) -> Tensor:
        return drawn.to(images.device, non_blocking=True)

    images = images.to(torch.float32).div_(255) if images.dtype == torch.uint8 else images.clone()
    if changes.degrees_B is not None:
        images = rotate(images, changes.degrees_B)
    strengths = (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    factors_4B = on_device(changes.factors_4B).view(4, -1, 1, 1, 1)
    for position in range(4):
        for number, (strength, jitter) in enumerate(zip(strengths, JITTERS, strict=True)):
            chosen = [row for row, order in enumerate(changes.order_B4) if order[position] == number]
            if strength and len(chosen) == len(images):
                images = jitter(images, factors_4B[number])
            elif strength and chosen:
                rows = on_device(torch.tensor(chosen))
                images = images.index_copy(0, rows, jitter(images[rows], factors_4B[number][rows]))
    if chosen := [row for row, is_gray in enumerate(changes.gray_B) if is_gray]:
        rows = on_device(torch.tensor(chosen))
        images = images.index_copy(0, rows, _gray(images[rows]).expand(-1, 3, -1, -1))
    return images


def _flip_and_turn(images: Tensor, recipe: AugmentRecipe, generator: torch.Generator) -> Tensor:
    """Flip images top to bottom and rotate them by quarter turns; draws nothing if the recipe has neither."""
    B, device = len(images), images.device
    if recipe.vertical_flip:
        flipped = torch.rand(B, generator=generator).view(B, 1, 1, 1) < recipe.vertical_flip
        images = torch.where(flipped.to(device, non_blocking=True), images.flip(2), images)
    if recipe.quarter_turns:
        images = rotate_quarters(images, torch.randint(4, (B,), generator=generator).to(device, non_blocking=True))
    return images


def rotate_quarters(images: Tensor, turn_B: Tensor) -> Tensor:
    """Rotate each image by a number of quarter turns: (B, C, H, H) and (B,) of 0..3 to (B, C, H, H)."""
    rotated_4BCHH = torch.stack([torch.rot90(images, k, (2, 3)) for k in range(4)])
    row_B = turn_B * len(images) + torch.arange(len(images), device=images.device)
    return rotated_4BCHH.flatten(0, 1).index_select(0, row_B)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Rotate each image about its centre, corners black: (B, C, H, W) and (B,) on the CPU to (B, C, H, W)."""
    height, width = images.shape[2:]
    radians = torch.deg2rad(degrees).view(-1, 1, 1)
    cos, sin = (of_angle.to(images.device, non_blocking=True) for of_angle in (radians.cos(), radians.sin()))
    # Where each pixel comes from, with pixel centres in -1..1. F.affine_grid makes the same grid by a matrix product,
    # which takes eight times as long on a CPU and on a GPU may be rounded to TF32 (a twentieth of a pixel).
    x = torch.linspace(-1, 1, width, device=images.device).mul_(width - 1).div_(width)
    y = torch.linspace(-1, 1, height, device=images.device).mul_(height - 1).div_(height).unsqueeze(1)
    grid = torch.stack([x * cos - y * (sin * height / width), x * (sin * width / height) + y * cos], 1)
    return F.grid_sample(images, grid.permute(0, 2, 3, 1), mode="nearest", padding_mode="zeros", align_corners=False)


# The changes below work in place where they can: on a CPU, what counts is how much memory they touch.


def _gray(images: Tensor) -> Tensor:
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    red, green, blue = images.split(1, 1)
    return (_GRAY[0] * red).add_(_GRAY[1] * green).add_(_GRAY[2] * blue)


def _adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    return images.mul_(factor).clamp_(0, 1)


def _adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    gray = _gray(images)
    gray.copy_(gray.mean((1, 2, 3), keepdim=True))  # not expanded: lerp would take four times as long
    return torch.lerp(gray, images, factor, out=images).clamp_(0, 1)


def _adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_gray(images), images, factor, out=images).clamp_(0, 1)


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue circle of HSV by `shift` of a full turn: (B, 3, H, W) in 0..1 and (B, 1, 1, 1) to (B, 3, H, W)."""
    red, green, blue = images.split(1, 1)
    value, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = value - low
    span = torch.clamp(chroma, min=1e-8, out=low)
    # 0 where that channel is the largest, else 1. lerp chooses by them in a third of the time of == and torch.where.
    not_red, not_green = (value - red).sign_(), (value - green).sign_()
    hue = (blue - red).div_(span).add_(2)  # of six: where green is the largest
    hue.lerp_((red - green).div_(span).add_(4), not_green)
    hue = (green - blue).div_(span).lerp_(hue, not_red).add_(6 * shift)
    channels = hue + hue.new_tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1)
    channels.sub_((channels / 6).floor_(), alpha=6)  # remainder(6), in a third of the time
    share = torch.minimum(channels, 4 - channels).clamp_(0, 1).mul_(chroma)
    return torch.sub(value, share, out=share)


JITTERS = (_adjust_brightness, _adjust_contrast, _adjust_saturation, shift_hue)  # the rows of `factors_4B`
