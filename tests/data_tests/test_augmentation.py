"""The augmentation, compared with torchvision, colorsys or values worked out here."""

import colorsys
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from odcft.data import augmentation
from odcft.data.augmentation import augment_batch, random_crop, rotate, rotate_quarters, shift_hue
from odcft.recipe import AugmentRecipe

STILL = AugmentRecipe(
    crop_scale=(1, 1), crop_ratio=(1, 1), flip=0, rotation=0, brightness=0, contrast=0, saturation=0, hue=0, gray=0
)


def only(**changes):
    return STILL.model_copy(update=changes)


# ---------------------------------------------------------------- crops


class Drawn:
    """A fake random.Random that returns the numbers given by the test and records what it was asked for."""

    def __init__(self, uniform, randint=(), flip=0.9):
        self.answers, self.corners, self.flip = list(uniform), list(randint), flip
        self.asked = []

    def uniform(self, low, high):
        self.asked.append((low, high))
        return self.answers.pop(0)

    def randint(self, low, high):
        self.asked.append((low, high))
        return self.corners.pop(0)

    def random(self):
        return self.flip


PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8))


def cut(image, box, size):
    return np.array(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def test_a_random_crop_has_the_area_and_shape_that_were_drawn():
    draw = Drawn([0.25, math.log(1.5)], [7, 11])
    recipe = only(crop_scale=(0.2, 0.5), crop_ratio=(0.5, 2))
    # a quarter of 60 x 40 is 600 pixels; with an aspect ratio of 1.5: 30 x 20
    assert np.array_equal(np.array(random_crop(PHOTO, 16, recipe, draw)), cut(PHOTO, (7, 11, 37, 31), 16))
    assert draw.asked == [(0.2, 0.5), (math.log(0.5), math.log(2)), (0, 60 - 30), (0, 40 - 20)]


def test_a_crop_may_fill_the_image_and_no_more():
    whole = random_crop(PHOTO, 16, STILL, Drawn([1, math.log(1.5)], [0, 0]))
    assert np.array_equal(np.array(whole), cut(PHOTO, (0, 0, 60, 40), 16))
    again = Drawn([1, 0, 0.25, 0], [1, 2])  # 49 x 49 does not fit, 24 x 24 does
    assert np.array_equal(np.array(random_crop(PHOTO, 16, STILL, again)), cut(PHOTO, (1, 2, 25, 26), 16))
    flat = Drawn([1, math.log(3), 0.25, 0], [1, 2])  # 85 x 28 is too wide
    assert np.array_equal(np.array(random_crop(PHOTO, 16, STILL, flat)), cut(PHOTO, (1, 2, 25, 26), 16))


def test_an_empty_crop_is_drawn_again():
    dot = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 3, 3)).astype(np.uint8))
    for ratio in (4, 0.25):  # 2 x 0 and 0 x 2
        draw = Drawn([0.08, math.log(ratio), 1, 0], [0, 0])
        assert np.array_equal(np.array(random_crop(dot, 8, STILL, draw)), cut(dot, (0, 0, 3, 3), 8))
    one = Drawn([0.12, 0], [2, 1])  # one pixel is not empty
    assert np.array_equal(np.array(random_crop(dot, 8, STILL, one)), cut(dot, (2, 1, 3, 2), 8))


@pytest.mark.parametrize("size", [(61, 8), (8, 61), (60, 9)])
def test_the_centre_is_cropped_if_ten_tries_do_not_fit(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3)).astype(np.uint8))
    draw = Drawn([1, 0] * 20, [0] * 40)
    side, left, top = min(size), (size[0] - min(size)) // 2, (size[1] - min(size)) // 2
    expected = cut(image, (left, top, left + side, top + side), 16)
    assert np.array_equal(np.array(random_crop(image, 16, STILL, draw)), expected)
    assert len(draw.asked) == 2 * 10


def test_a_crop_is_flipped_as_often_as_the_recipe_says():
    for flip, drawn, flipped in ((0.5, 0.49, True), (0.5, 0.5, False), (0, 0.0, False), (1, 0.999, True)):
        shown = np.array(random_crop(PHOTO, 16, only(flip=flip), Drawn([0.25, 0], [0, 0], drawn)))
        assert np.array_equal(shown[:, ::-1] if flipped else shown, cut(PHOTO, (0, 0, 24, 24), 16))


# ---------------------------------------------------------------- colours and angles


def draw():
    return torch.Generator().manual_seed(0)


def test_no_strength_no_change():
    images = torch.rand(4, 3, 8, 8)
    assert torch.equal(augment_batch(images, STILL, draw()), images)


@pytest.mark.parametrize(
    "recipe",
    [
        only(brightness=0.4),
        only(contrast=0.4),
        only(saturation=1.0),
        only(hue=0.5),
        only(gray=1.0),
        only(rotation=90.0),
    ],
)
def test_every_strength_changes_something_and_stays_in_range(recipe):
    images = torch.rand(16, 3, 8, 8)
    changed = augment_batch(images, recipe, draw())
    assert changed.shape == images.shape
    assert (changed != images).flatten(1).any(1).float().mean() > 0.7
    assert changed.min() >= 0
    assert changed.max() <= 1


def test_every_image_has_its_own_factors():
    images = torch.full((8, 3, 4, 4), 0.5)
    means = augment_batch(images, only(brightness=0.4), draw()).mean((1, 2, 3))
    assert len(means.unique()) == 8
    assert means.min() >= 0.3
    assert means.max() <= 0.7


# ---------------------------------------------------------------- by definition


def test_every_image_goes_through_its_own_changes_in_its_own_order():
    """All changes, one image at a time with torchvision's functions, from the same random numbers."""
    recipe = AugmentRecipe(rotation=0, brightness=0.4, contrast=0.3, saturation=1.5, hue=0.4, gray=0.3)
    images = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    ours = augment_batch(images, recipe, draw())
    generator, B = draw(), len(images)

    def uniform(low, high):
        return torch.empty(B).uniform_(low, high, generator=generator).tolist()

    hue = uniform(-0.4, 0.4)
    drawn = [uniform(0.6, 1.4), uniform(0.7, 1.3), uniform(0, 2.5), hue]
    changes = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    orders = torch.rand(B, 4, generator=generator).argsort(1).tolist()
    gray = (torch.rand(B, generator=generator) < 0.3).tolist()
    for i, image in enumerate(images):
        for number in orders[i]:
            image = changes[number](image, drawn[number][i])
        image = tv.rgb_to_grayscale(image, 3) if gray[i] else image
        assert torch.allclose(ours[i], image, atol=1e-4), i
    assert len(set(map(tuple, orders))) > 10
    assert 0 < sum(gray) < B


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_a_strength_above_one_never_inverts_an_image(name):
    images = torch.rand(64, 3, 4, 4)
    recipe = only(**{name: 3.0})
    generator = draw()
    torch.empty(64).uniform_(0, 0, generator=generator)  # drawn for the hue
    for one in ("brightness", "contrast", "saturation"):
        strength = 3.0 if one == name else 0.0
        factors = torch.empty(64).uniform_(max(0.0, 1 - strength), 1 + strength, generator=generator)
        if one == name:
            break
    assert factors.min() >= 0
    expected = [getattr(tv, f"adjust_{name}")(i, float(f)) for i, f in zip(images, factors, strict=True)]
    assert torch.allclose(augment_batch(images, recipe, draw()), torch.stack(expected), atol=1e-5)


def test_shifting_the_hue_keeps_value_and_saturation():
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 0.03, 0.5, 1.0])] * 3)  # gray, pure, two channels equal, dark
    colours = torch.cat([corners, torch.rand(200, 3)])
    shifts = torch.linspace(-0.5, 0.5, len(colours))
    ours = shift_hue(colours.view(-1, 3, 1, 1), shifts.view(-1, 1, 1, 1)).flatten(1)
    for colour, shift, found in zip(colours.tolist(), shifts.tolist(), ours.tolist(), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*colour)
        assert found == pytest.approx(colorsys.hsv_to_rgb((h + shift) % 1, s, v), abs=2e-5)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (12, 20)])
def test_rotation_is_torchvisions_about_the_middle_with_black_corners(height, width):
    images = torch.rand(6, 3, height, width)
    degrees = torch.tensor([-170.0, -30, -1, 3, 45, 90])
    ours = rotate(images, degrees)
    for image, angle, found in zip(images, degrees.tolist(), ours, strict=True):
        theirs = tv.rotate(image, angle, tv.InterpolationMode.NEAREST)
        assert (theirs != found).float().mean() < 0.05  # where two pixels are equally near
    assert (rotate(torch.ones(1, 3, height, width), torch.tensor([45.0]))[..., 0, 0] == 0).all()


def test_every_image_is_rotated_by_its_own_angle_within_the_recipes():
    images = torch.rand(6, 3, 16, 16)
    degrees = torch.empty(6).uniform_(-30, 30, generator=draw())
    assert torch.equal(augment_batch(images, only(rotation=30.0), draw()), rotate(images, degrees))


def test_quarter_turns_are_rot90_of_each_image():
    images = torch.rand(9, 2, 5, 5)
    turns = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0, 1])
    expected = torch.stack([image.rot90(int(k), (1, 2)) for image, k in zip(images, turns, strict=True)])
    assert torch.equal(rotate_quarters(images, turns), expected)


def test_vertical_flips_and_quarter_turns_give_all_eight_positions_equally_often():
    off = AugmentRecipe(brightness=0, contrast=0, saturation=0, hue=0, gray=0, rotation=0)
    turning = off.model_copy(update={"vertical_flip": 0.5, "quarter_turns": True})
    image = torch.arange(4.0).view(1, 1, 2, 2).expand(4000, 3, 2, 2) / 4
    turned = augment_batch(image, turning, torch.Generator().manual_seed(0))
    positions, counts = turned[:, 0].reshape(-1, 4).unique(dim=0, return_counts=True)
    assert len(positions) == 8
    assert counts.min() > 400
    assert torch.equal(augment_batch(image, off, torch.Generator().manual_seed(0)), image)


def test_fields_that_are_off_draw_nothing():
    images = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    plain, generator = AugmentRecipe(), torch.Generator().manual_seed(0)
    augment_batch(images, plain, generator)
    drawn = generator.get_state()
    torch.Generator.manual_seed(generator, 0)
    augment_batch(images, plain.model_copy(update={"vertical_flip": 0.0, "quarter_turns": False}), generator)
    assert torch.equal(generator.get_state(), drawn)
    torch.Generator.manual_seed(generator, 0)
    augment_batch(images, plain.model_copy(update={"quarter_turns": True}), generator)
    assert not torch.equal(generator.get_state(), drawn)


# ---------------------------------------------------------------- on a CPU, a few images at a time


def test_bytes_are_augmented_as_floats_are_and_neither_is_changed():
    pixels = torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8)
    floats = pixels.float() / 255
    before = floats.clone()
    assert torch.equal(augment_batch(pixels, AugmentRecipe(), draw()), augment_batch(floats, AugmentRecipe(), draw()))
    assert torch.equal(floats, before)
    augment_batch(floats, only(brightness=0.4, contrast=0.4, saturation=1), draw())
    assert torch.equal(floats, before)


@pytest.mark.parametrize("pixels", [1, 16 * 16 * 2, 1 << 20])
def test_how_many_images_are_augmented_at_a_time_changes_nothing(monkeypatch, pixels):
    images = torch.rand(7, 3, 16, 16)
    together = augment_batch(images, AugmentRecipe(), draw())
    monkeypatch.setattr(augmentation, "CACHED_PIXELS", pixels)
    assert torch.allclose(augment_batch(images, AugmentRecipe(), draw()), together, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (12, 20), (33, 47)])
def test_rotation_reads_the_pixels_that_affine_grid_names(height, width):
    images, degrees = torch.rand(5, 3, height, width), torch.tensor([-40.0, -2, 0, 1.3, 90])
    cos, sin = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    rows = [torch.stack([cos, -sin * height / width, 0 * sin], 1), torch.stack([sin * width / height, cos, 0 * sin], 1)]
    grid = torch.nn.functional.affine_grid(torch.stack(rows, 1), [5, 3, height, width], align_corners=False)
    expected = torch.nn.functional.grid_sample(images, grid, "nearest", "zeros", align_corners=False)
    assert (rotate(images, degrees) != expected).float().mean() < 1e-3


def test_strengths_and_probabilities_have_the_statistics_of_torchvisions():
    """ColorJitter and RandomGrayscale of torchvision on the same flat colour, many times."""
    from torchvision.transforms import v2

    colour, count = torch.tensor([0.8, 0.5, 0.3]), 1500
    images = colour.view(1, 3, 1, 1).expand(count, 3, 2, 2)
    torch.manual_seed(0)
    theirs = v2.Compose([v2.ColorJitter(0.4, 0.4, 1.0, 0.5), v2.RandomGrayscale(0.2)])
    expected = torch.stack([theirs(image)[:, 0, 0] for image in images])
    found = augment_batch(images, AugmentRecipe(), draw())[:, :, 0, 0]
    for statistic in (lambda x: x.mean(0), lambda x: x.std(0), lambda x: x.amax(1).quantile(torch.tensor([0.1, 0.9]))):
        assert torch.allclose(statistic(found), statistic(expected), atol=0.03)
    is_gray = [(x.amax(1) - x.amin(1) < 0.01).float().mean().item() for x in (found, expected)]
    assert is_gray[0] == pytest.approx(is_gray[1], abs=0.03)
