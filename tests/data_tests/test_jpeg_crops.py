"""Crops of JPEGs at reduced size, compared with what Pillow decodes and crops."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

from odcft.data import jpeg_crops
from odcft.data.augmentation import draw_crop, random_crop
from odcft.data.batches import Crops, TrainingOrder, make_loader
from odcft.data.image_decoding import read_image
from odcft.data.jpeg_crops import jpeg_crop
from odcft.data.sources import find_images
from odcft.data.view import View
from odcft.recipe import AugmentRecipe

simplejpeg = pytest.importorskip("simplejpeg")
RECIPE = AugmentRecipe()


def photo(width, height, seed=0):
    """Smooth colours with some detail, no two corners alike."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray(np.clip(pixels + draw.integers(-8, 9, pixels.shape), 0, 255).astype(np.uint8))


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


def by_pillow(data, size, seed):
    return torch.from_numpy(np.array(random_crop(read_image(data), size, RECIPE, random.Random(seed)))).permute(2, 0, 1)


def difference(ours, theirs):
    return (ours.int() - theirs.int()).abs().float().mean().item()


@pytest.fixture
def scales(monkeypatch):
    """The shapes that were decoded."""
    decoded, whole = [], simplejpeg.decode_jpeg

    def decode(*args, **kwargs):
        pixels = whole(*args, **kwargs)
        decoded.append(pixels.shape[:2])
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode)
    return decoded


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_crop_of_a_small_photo_is_pillows_up_to_rounding(mode):
    data = jpeg(photo(150, 110).convert(mode))
    for seed in range(12):
        crop = draw_crop(150, 110, RECIPE, random.Random(seed))
        theirs = read_image(data).crop(crop.box).resize((64, 64), Image.Resampling.BILINEAR)
        expected = np.array(theirs)[:, ::-1] if crop.flipped else np.array(theirs)
        ours = jpeg_crop(data, 64, RECIPE, random.Random(seed))
        assert ours.dtype == torch.uint8
        assert ours.shape == (3, 64, 64)
        rounded = torch.from_numpy(expected.copy()).permute(2, 0, 1)
        assert (ours.int() - rounded.int()).abs().max() <= 1
        assert difference(ours, rounded) < 0.2


def test_a_large_photo_is_decoded_at_reduced_size_and_never_below_the_crops(scales):
    data, chosen = jpeg(photo(1100, 850)), set()
    for seed in range(20):
        ours, theirs = jpeg_crop(data, 64, RECIPE, random.Random(seed)), by_pillow(data, 64, seed)
        assert difference(ours, theirs) < 3
        left, top, right, bottom = draw_crop(1100, 850, RECIPE, random.Random(seed)).box
        (height, _), scale = scales[-1], round(850 / scales[-1][0])
        assert height == -(-850 // scale)
        assert min(right - left, bottom - top) >= 64 * scale
        assert scale == 8 or min(right - left, bottom - top) < 64 * 2 * scale
        chosen.add(scale)
    assert {4, 8} <= chosen


@pytest.mark.parametrize("size", [(90, 60), (330, 250)])
@pytest.mark.parametrize("orientation", [*range(1, 9), 9, 0])
def test_a_rotated_photo_is_upright(orientation, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(photo(*size), exif=exif)
    for seed in range(4):
        assert difference(jpeg_crop(data, 32, RECIPE, random.Random(seed)), by_pillow(data, 32, seed)) < 1.5


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


WHOLE = jpeg(photo(80, 60))
FRAME = WHOLE.index(b"\xff\xc0")  # the header with the size
OTHERS = {
    "PNG": png(photo(20, 20)),
    "CMYK": jpeg(photo(20, 20).convert("CMYK")),
    "empty": b"",
    "three bytes": b"\xff\xd8\xff",
    "cut": WHOLE[: len(WHOLE) // 2],
    "flipped": WHOLE[: len(WHOLE) // 2] + bytes(255 - b for b in WHOLE[len(WHOLE) // 2 :]),
    "huge": WHOLE[: FRAME + 5] + b"\xff\xff\xff\xff" + WHOLE[FRAME + 9 :],
    "two headers": WHOLE[:FRAME] + WHOLE[FRAME : FRAME + 5] + b"\x7f\xff\x7f\xff" + WHOLE[FRAME + 9 : FRAME + 19]
    + WHOLE[FRAME:],
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_anything_but_a_sound_jpeg_is_left_to_pillow(kind, tmp_path):
    assert jpeg_crop(OTHERS[kind], 16, RECIPE, random.Random(0)) is None
    (tmp_path / "image.jpg").write_bytes(OTHERS[kind])
    pixels, reasons = [], []
    for decoder in ("turbo", "pil"):
        found, _ = Crops(find_images(tmp_path), View(16), RECIPE, 0, decoder)[0, 0]
        (reasons if isinstance(found, str) else pixels).append(found)
    assert len(reasons) == 2 or torch.equal(*pixels)  # the draws do not depend on what was tried first
    assert not reasons or reasons[0] == reasons[1]


def test_no_memory_is_taken_for_a_size_that_only_libjpeg_sees(monkeypatch):
    """Whatever Pillow understood of the header, libjpeg-turbo gets room for that and no more."""
    monkeypatch.setattr(jpeg_crops, "_plain_header", lambda data: (16, 16, 1))
    assert jpeg_crop(WHOLE, 16, RECIPE, random.Random(0)) is None


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"comment": b"a" * 300}, {"exif": b"Exif\0\0"}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_header_says_what_pillow_understands(mode, options):
    data = jpeg(photo(37, 21).convert(mode), **options)
    by_pillow = jpeg_crops._header(data)
    assert by_pillow == (None if mode == "CMYK" else (37, 21, 1))
    assert jpeg_crops._plain_header(data) == (None if "exif" in options else by_pillow)
    assert all(jpeg_crops._plain_header(data[:cut]) in (None, by_pillow) for cut in range(2, len(data), 7))


def test_a_photo_beyond_pillows_limit_is_not_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80 * 60 - 1)
    assert jpeg_crop(WHOLE, 16, RECIPE, random.Random(0)) is None


def test_a_buffer_is_used_again_and_crops_do_not_change(monkeypatch):
    first = jpeg_crop(WHOLE, 16, RECIPE, random.Random(0))
    kept = first.clone()
    jpeg_crop(jpeg(photo(80, 60, seed=1)), 16, RECIPE, random.Random(0))
    assert torch.equal(first, kept)
    monkeypatch.setattr(jpeg_crops, "KEPT_BYTES", 100)  # too large to keep
    assert torch.equal(jpeg_crop(WHOLE, 16, RECIPE, random.Random(0)), kept)


def folder(tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(photo(70 + 40 * number, 60 + 30 * number, number)))
    Image.open(tmp_path / "0.jpg").save(tmp_path / "7.png")
    return find_images(tmp_path)


def test_features_and_evaluation_see_what_pillow_decodes(tmp_path):
    images = folder(tmp_path)
    for index in range(len(images)):
        assert torch.equal(Crops(images, View(32), decoder="turbo")[0, index][0], Crops(images, View(32))[0, index][0])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_any_number_of_workers_gives_the_same_bits(tmp_path, workers):
    crops = Crops(folder(tmp_path), View(32), RECIPE, 3, "turbo")
    order = TrainingOrder(7, 3, 2, seed=0)
    alone = [batch.pixels for batch in make_loader(crops, order, 0, torch.device("cpu"))]
    shared = [batch.pixels for batch in make_loader(crops, order, workers, torch.device("cpu"))]
    assert len(alone) == 4
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
