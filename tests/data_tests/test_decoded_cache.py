"""Images kept decoded in memory give the same crops, to the bit, as those that are read again."""

import copy
import os
import random
import time

import numpy as np
import pytest
import torch
from image_files import write_tiff
from PIL import Image

from odcft.data import decoded_cache
from odcft.data.batches import Crops, TrainingBatches, TrainingOrder, make_loader
from odcft.data.custom_reader import make_reader
from odcft.data.decoded_cache import DecodedCache, make_cache
from odcft.data.sources import find_images
from odcft.data.view import View
from odcft.recipe import AugmentRecipe

RECIPE, CPU = AugmentRecipe(), torch.device("cpu")
KEPT = ("gray", "cmyk", "alpha", "palette", "deep", *(f"turned{n}" for n in range(1, 9)))
LARGE = ("large", "long")


def photo(width, height, seed=0):
    """Smooth colours, no two corners alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def images(tmp_path):
    """Small images of every kind that is decoded in its own way, and two that are too large to keep at 32 pixels."""
    photo(40, 30, 1).convert("L").save(tmp_path / "gray.jpg")
    photo(40, 30, 2).convert("CMYK").save(tmp_path / "cmyk.jpg")
    photo(33, 50, 3).convert("RGBA").rotate(20).save(tmp_path / "alpha.png")
    photo(33, 50, 4).convert("P").save(tmp_path / "palette.png")
    deep = np.random.default_rng(5).integers(0, 65536, (40, 50), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        photo(63, 45, orientation).save(tmp_path / f"turned{orientation}.jpg", exif=exif)
    photo(300, 200, 9).save(tmp_path / "large.jpg")
    photo(64, 20, 9).save(tmp_path / "long.jpg")
    found = find_images(tmp_path)
    assert sorted(name.split(".")[0] for name in found.names) == sorted((*KEPT, *LARGE))
    return found


@pytest.mark.parametrize("decoder", ["turbo", "pil"])
def test_crops_are_the_same_to_the_bit_and_read_nothing_again(images, decoder, monkeypatch):
    if decoder == "turbo":
        pytest.importorskip("simplejpeg")
    view = View(32, intensity=(1000, 50000))
    cache = make_cache(images, view)
    assert cache.rows == len(images)
    plain = Crops(images, view, RECIPE, 3, decoder)
    expected = {(epoch, i): plain[epoch, i][0] for epoch in range(6) for i in range(len(images))}
    cached, reads, read = Crops(images, view, RECIPE, 3, decoder, cache), [], type(images).read
    monkeypatch.setattr(type(images), "read", lambda self, index: reads.append(index) or read(self, index))
    for (epoch, i), pixels in expected.items():
        if i == 0:
            reads.clear()
        assert torch.equal(cached[epoch, i][0], pixels), (epoch, images.names[i])
        if i == len(images) - 1:
            again = {images.names[index].split(".")[0] for index in reads}
            assert again == ({*KEPT, *LARGE} if epoch == 0 else set(LARGE))


def test_features_and_evaluation_do_not_use_it(images):
    cache = DecodedCache(len(images), 4096, 64)
    assert isinstance(Crops(images, View(32), cache=cache)[0, 0][0], torch.Tensor)
    assert cache.get(0) is None


def test_images_of_many_bands(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 48, 5), dtype=np.uint8)
    for number in range(2):
        write_tiff(tmp_path / f"{number}.tif", pixels[number], photometric=1, extra=[0] * 4)
    images, view = find_images(tmp_path), View(32, bands=5)
    cache = make_cache(images, view)
    plain, cached = Crops(images, view, RECIPE), Crops(images, view, RECIPE, cache=cache)
    for epoch in range(3):
        assert all(torch.equal(plain[epoch, i][0], cached[epoch, i][0]) for i in range(2))
    assert np.array_equal(cache.get(1)[0], pixels[1])


def test_a_broken_image_is_reported_until_it_is_kept_and_one_that_is_kept_keeps_its_pixels(tmp_path):
    for name in ("a.png", "b.png"):
        photo(32, 32).save(tmp_path / name)
    images = find_images(tmp_path)
    crops = Crops(images, View(32), RECIPE, cache=make_cache(images, View(32)))
    (tmp_path / "a.png").write_bytes(b"no image")
    assert isinstance(crops[0, 0][0], str)
    before = crops[1, 1][0]
    (tmp_path / "b.png").unlink()
    assert torch.equal(crops[1, 1][0], before)
    photo(32, 32).save(tmp_path / "a.png")
    assert isinstance(crops[1, 0][0], torch.Tensor)


def test_a_slot_that_is_half_written_counts_as_empty():
    cache = DecodedCache(3, 100, 64)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    assert cache.get(1) is None
    cache.put(1, pixels, 6)
    found, orientation = cache.get(1)
    assert np.array_equal(found, pixels)
    assert orientation == 6
    slot = cache.nbytes // 3
    written = os.pread(cache._file, slot, slot)
    for at in range(len(written)):
        os.pwrite(cache._file, bytes([written[at] ^ 255]), slot + at)
        assert cache.get(1) is None, at
        os.pwrite(cache._file, written[at : at + 1], slot + at)
    assert cache.get(1) is not None
    os.pwrite(cache._file, written, 2 * slot)
    assert cache.get(2) is None  # another image's


def test_what_does_not_fit_is_not_kept():
    cache = DecodedCache(2, 100, 20)
    for index, shape in ((0, (10, 11, 3)), (0, (20, 2, 3)), (0, (5, 5, 4)), (2, (5, 5, 3))):
        cache.put(index, np.ones(shape, np.uint8))
        assert cache.get(index) is None
    cache.put(1, np.ones((10, 10, 3), np.uint8))
    assert cache.get(1) is not None


def test_it_takes_a_quarter_of_the_free_memory_of_a_machine_at_most(images, monkeypatch):
    whole = make_cache(images, View(32))
    slot = whole.nbytes // len(images)
    assert slot - 50 < 3 * 63 * 45 < slot
    monkeypatch.setattr(decoded_cache, "free_host_memory", lambda: 4 * 2 * 5 * slot)
    assert make_cache(images, View(32)).rows == 10
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    part = make_cache(images, View(32))
    assert part.rows == 5
    plain, cached = Crops(images, View(32), RECIPE), Crops(images, View(32), RECIPE, cache=part)
    for epoch in range(2):
        assert all(torch.equal(plain[epoch, i][0], cached[epoch, i][0]) for i in range(len(images)))
    for free in (0, None):
        monkeypatch.setattr(decoded_cache, "free_host_memory", lambda free=free: free)
        assert make_cache(images, View(32)) is None


def test_there_is_none_where_it_would_not_pay_or_cannot_be_had(images, tmp_path, monkeypatch):
    assert make_cache(images, View(8)) is None  # all are too large
    reader = make_reader(lambda path: np.zeros((32, 32, 3), np.uint8))
    assert make_cache(find_images(tmp_path, reader=reader), View(32)) is None  # who knows what it returns the next time

    def refuse(*args):
        raise OSError("no memory")

    monkeypatch.setattr(os, "memfd_create", refuse)
    assert make_cache(images, View(32)) is None
    monkeypatch.delattr(os, "memfd_create")  # not Linux
    assert make_cache(images, View(32)) is None


def test_a_full_memory_is_not_an_error(monkeypatch):
    def refuse(*args):
        raise OSError("no space left")

    cache = DecodedCache(1, 100, 64)
    monkeypatch.setattr(os, "pwritev", refuse)
    cache.put(0, np.ones((5, 5, 3), np.uint8))
    assert cache.get(0) is None


def test_the_memory_is_given_back():
    cache = DecodedCache(1, 100, 64)
    file = cache._file
    os.fstat(file)
    del cache
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)


def test_a_process_that_is_not_forked_does_without(images):
    assert copy.copy(make_cache(images, View(32))) is None  # copied as it is pickled


def test_loader_processes_fill_it_for_each_other_and_for_the_training_process(images):
    cache = make_cache(images, View(32))
    order = TrainingOrder(len(images), 4, 1, seed=0)
    crops = Crops(images, View(32), RECIPE, cache=cache)
    seen = [i for batch in make_loader(crops, order, 1, CPU) for i in batch.index_B.tolist()]
    kept = [images.names[i].split(".")[0] for i in seen if cache.get(i) is not None]
    assert sorted(kept) == sorted({images.names[i].split(".")[0] for i in seen} - set(LARGE))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_any_number_of_workers_and_a_resumed_run_give_the_same_bits(images, workers):
    def epochs(cache, workers, first):
        crops = Crops(images, View(32), RECIPE, 3, "pil", cache)
        batches = TrainingBatches(crops, TrainingOrder(len(images), 4, 4, seed=0), workers, CPU)
        steps = batches.order.steps_per_epoch
        found = [batch.pixels for epoch in range(first, 4) for batch in batches.of_epoch(epoch * steps)]
        batches.close()
        return found

    plain = epochs(None, 0, 0)
    cached, resumed = (epochs(make_cache(images, View(32)), workers, first) for first in (0, 2))
    assert all(torch.equal(a, b) for a, b in zip(plain, cached, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain[len(plain) // 2 :], resumed, strict=True))


@pytest.mark.slow
def test_processes_that_write_one_slot_at_once_never_show_a_mixture():
    context = torch.multiprocessing.get_context("fork")
    cache, until = DecodedCache(1, 64 * 64, 65), time.monotonic() + 2

    def write(value):
        shape = (64, 64, 3) if value < 3 else (30, 64, 3)
        while time.monotonic() < until:
            cache.put(0, np.full(shape, value, np.uint8), value)

    writers = [context.Process(target=write, args=(value,)) for value in (1, 2, 3)]
    for writer in writers:
        writer.start()
    seen = set()
    while time.monotonic() < until:
        if (kept := cache.get(0)) is not None:
            assert (kept[0] == kept[1]).all()
            assert kept[0].shape[0] == (64 if kept[1] < 3 else 30)
            seen.add(kept[1])
        time.sleep(random.random() / 1e4)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert seen == {1, 2, 3}
