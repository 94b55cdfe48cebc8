"""The paper's augmentation (sec. 3.4), on whole batches where the network is, so that loader processes
only decode and crop.

Every factor is drawn for each image by itself, from a generator on the CPU: the same on any device.
"""

import math
import random

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from odcft.recipe import AugmentRecipe

_GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision


def random_crop(image: Image.Image, size: int, recipe: AugmentRecipe, draw: random.Random) -> Image.Image:
    """A part of random area and shape, resized to size x size (as torchvision's RandomResizedCrop), perhaps flipped."""
    width, height = image.size
    box = None
    for _ in range(10):
        area = width * height * draw.uniform(*recipe.crop_scale)
        ratio = math.exp(draw.uniform(math.log(recipe.crop_ratio[0]), math.log(recipe.crop_ratio[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = draw.randint(0, width - w), draw.randint(0, height - h)
            box = (left, top, left + w, top + h)
            break
    if box is None:  # the image is too long: the middle
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    if draw.random() < recipe.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def augment_batch(images: Tensor, recipe: AugmentRecipe, generator: torch.Generator) -> Tensor:
    """Rotate, jitter the colours and drop them: what is left of the augmentation after `random_crop`.

    Args:
        images: (B, 3, H, W) float in 0..1.
        recipe: strengths.
        generator: on the CPU.

    Returns:
        (B, 3, H, W), in 0..1.
    """
    B, device = len(images), images.device

    def there(drawn: Tensor) -> Tensor:
        return drawn.to(device, non_blocking=True)

    def uniform(low: float, high: float) -> Tensor:
        return there(torch.empty(B).uniform_(low, high, generator=generator).view(B, 1, 1, 1))

    def factors(strength: float) -> Tensor:
        return uniform(max(0.0, 1 - strength), 1 + strength)

    if recipe.rotation:
        degrees = torch.empty(B).uniform_(-recipe.rotation, recipe.rotation, generator=generator)
        images = _rotate(images, degrees)
    hue = uniform(-recipe.hue, recipe.hue)
    changes = [
        (recipe.brightness, _brightness, factors(recipe.brightness)),
        (recipe.contrast, _contrast, factors(recipe.contrast)),
        (recipe.saturation, _saturation, factors(recipe.saturation)),
        (recipe.hue, _hue, hue),
    ]
    # Each image goes through the four changes in an order of its own. Which images go through which change at which
    # place is known on the host, so nothing has to come back from the device.
    order_B4 = torch.rand(B, len(changes), generator=generator).argsort(1)
    for place in range(len(changes)):
        for number, (strength, change, factor) in enumerate(changes):
            if strength:
                rows = there((order_B4[:, place] == number).nonzero()[:, 0])
                images = images.index_copy(0, rows, change(images[rows], factor[rows]))
    if recipe.gray:
        is_gray = there((torch.rand(B, generator=generator) < recipe.gray).view(B, 1, 1, 1))
        images = torch.where(is_gray, _gray(images), images)
    return images


def turned(images: Tensor, turn_B: Tensor) -> Tensor:
    """Turn each image by so many quarters: (B, C, H, H) and (B,) of 0..3 to (B, C, H, H)."""
    four_4BCHH = torch.stack([torch.rot90(images, k, (2, 3)) for k in range(4)])
    place_B = turn_B * len(images) + torch.arange(len(images), device=images.device)
    return four_4BCHH.flatten(0, 1).index_select(0, place_B)


def _rotate(images: Tensor, degrees: Tensor) -> Tensor:
    B, _, height, width = images.shape
    radians = torch.deg2rad(degrees)
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros(B)
    rows = [torch.stack([cos, -sin * height / width, zero], 1), torch.stack([sin * width / height, cos, zero], 1)]
    grid = F.affine_grid(
        torch.stack(rows, 1).to(images.device, non_blocking=True), list(images.shape), align_corners=False
    )
    return F.grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def _gray(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    return (_GRAY[0] * red + _GRAY[1] * green + _GRAY[2] * blue).unsqueeze(1)


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).clamp_(0, 1)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = _gray(images).mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean, images, factor).clamp_(0, 1)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_gray(images), images, factor).clamp_(0, 1)


def _hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the colour circle of HSV by `shift` of a full turn."""
    red, green, blue = images.split(1, 1)
    value, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = value - low
    span = chroma.clamp(min=1e-8)
    sixth = torch.where(
        value == red,
        (green - blue) / span,
        torch.where(value == green, (blue - red) / span + 2, (red - green) / span + 4),
    )
    sixth = sixth + 6 * shift  # 0..6 is once around
    places = (sixth + sixth.new_tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1)).remainder(6)
    return value - chroma * torch.minimum(places, 4 - places).clamp_(0, 1)
