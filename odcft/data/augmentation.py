"""The paper's augmentation (sec. 3.4). Data workers only decode and crop; the rest runs on whole batches on the device.

Every factor is drawn separately for each image, from a generator on the CPU, so it is the same on any device.
"""

import math
import random

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from odcft.recipe import AugmentRecipe

_GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision


def random_crop(image: Image.Image, size: int, recipe: AugmentRecipe, rng: random.Random) -> Image.Image:
    """Crop a random area and aspect ratio, resize it to size x size and perhaps flip it.

    As torchvision's RandomResizedCrop and RandomHorizontalFlip.
    """
    width, height = image.size
    box = None
    for _ in range(10):
        area = width * height * rng.uniform(*recipe.crop_scale)
        ratio = math.exp(rng.uniform(math.log(recipe.crop_ratio[0]), math.log(recipe.crop_ratio[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            box = (left, top, left + w, top + h)
            break
    if box is None:  # ten tries did not fit (the image is very long): take the centre square
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    if rng.random() < recipe.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def augment_batch(images: Tensor, recipe: AugmentRecipe, generator: torch.Generator) -> Tensor:
    """Turn images, jitter their colours and make some of them gray: the augmentation that follows `random_crop`.

    Args:
        images: (B, 3, H, W) float in 0..1; of images of other bands, only place, brightness and contrast change.
        recipe: the strength of each change.
        generator: on the CPU.

    Returns:
        (B, 3, H, W), in 0..1.
    """
    B, device = len(images), images.device
    if images.shape[1] != 3:
        recipe = recipe.model_copy(update={"saturation": 0.0, "hue": 0.0, "gray": 0.0})

    def on_device(drawn: Tensor) -> Tensor:
        return drawn.to(device, non_blocking=True)

    def uniform(low: float, high: float) -> Tensor:
        return on_device(torch.empty(B).uniform_(low, high, generator=generator).view(B, 1, 1, 1))

    def factors(strength: float) -> Tensor:
        return uniform(max(0.0, 1 - strength), 1 + strength)

    images = _flip_and_turn(images, recipe, generator)
    if recipe.rotation:
        degrees = torch.empty(B).uniform_(-recipe.rotation, recipe.rotation, generator=generator)
        images = rotate(images, degrees)
    hue = uniform(-recipe.hue, recipe.hue)
    jitters = [
        (recipe.brightness, _adjust_brightness, factors(recipe.brightness)),
        (recipe.contrast, _adjust_contrast, factors(recipe.contrast)),
        (recipe.saturation, _adjust_saturation, factors(recipe.saturation)),
        (recipe.hue, shift_hue, hue),
    ]
    # Each image gets the four jitters in its own order. The order is drawn on the CPU, so nothing has to be copied back
    # from the device to know which images get which jitter next.
    order_B4 = torch.rand(B, len(jitters), generator=generator).argsort(1)
    for position in range(len(jitters)):
        for number, (strength, jitter, factor) in enumerate(jitters):
            if strength:
                rows = on_device((order_B4[:, position] == number).nonzero()[:, 0])
                images = images.index_copy(0, rows, jitter(images[rows], factor[rows]))
    if recipe.gray:
        is_gray = on_device((torch.rand(B, generator=generator) < recipe.gray).view(B, 1, 1, 1))
        images = torch.where(is_gray, _gray(images), images)
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
    B, _, height, width = images.shape
    radians = torch.deg2rad(degrees)
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros(B)
    rows = [torch.stack([cos, -sin * height / width, zero], 1), torch.stack([sin * width / height, cos, zero], 1)]
    grid = F.affine_grid(
        torch.stack(rows, 1).to(images.device, non_blocking=True), list(images.shape), align_corners=False
    )
    return F.grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def _gray(images: Tensor) -> Tensor:
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    red, green, blue = images.unbind(1)
    return (_GRAY[0] * red + _GRAY[1] * green + _GRAY[2] * blue).unsqueeze(1)


def _adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).clamp_(0, 1)


def _adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = _gray(images).mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean, images, factor).clamp_(0, 1)


def _adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_gray(images), images, factor).clamp_(0, 1)


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue circle of HSV by `shift` of a full turn: (B, 3, H, W) in 0..1 and (B, 1, 1, 1) to (B, 3, H, W)."""
    red, green, blue = images.split(1, 1)
    value, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = value - low
    span = chroma.clamp(min=1e-8)
    hue = torch.where(
        value == red,
        (green - blue) / span,
        torch.where(value == green, (blue - red) / span + 2, (red - green) / span + 4),
    )
    hue = hue + 6 * shift  # 0..6 is one full turn
    channels = (hue + hue.new_tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1)).remainder(6)
    return value - chroma * torch.minimum(channels, 4 - channels).clamp_(0, 1)
