"""Images that break while a run trains."""

from pathlib import Path

import pytest
import torch

from odcft.data.batches import Batch
from odcft.data.images import Images
from odcft.errors import OdcftError
from odcft.run.broken_images import NAMED, BrokenImages


def images(count):
    return Images(Path("set"), Path("set"), [f"{i}.png" for i in range(count)])


def batch(*unreadable, good=4):
    return Batch(
        torch.zeros(good, 3, 8, 8, dtype=torch.uint8), torch.arange(good), dict.fromkeys(unreadable, "cut off")
    )


def test_each_image_is_counted_once_and_the_first_few_are_named():
    said = []
    broken = BrokenImages(images(1000), 0.1, said.append)
    batches = [batch(*range(8)), batch(), batch(3, 4, 9)]
    assert list(broken.checked(iter(batches), 7)) == batches
    assert said[0] == "Step 7: 0.png can no longer be read (cut off); skipped."
    assert len(said) == NAMED
    assert broken.report() == 9
    assert said[-1] == "Broken      9 images could no longer be read and had to be skipped."


@pytest.mark.parametrize(("share", "allowed"), [(0.0, 0), (0.01, 2), (0.02, 4), (1.0, 200)])
def test_more_than_the_share_of_the_recipe_ends_the_run(share, allowed):
    broken = BrokenImages(images(200), share, lambda line: None)
    broken.add(dict.fromkeys(range(allowed), "cut off"), 3)
    if share < 1:
        with pytest.raises(
            OdcftError, match=rf"^Step 4: {allowed + 1} of 200 images can no .* data.max_broken={share:g} "
        ):
            broken.add({199: "cut off"}, 4)


def test_one_image_of_a_small_set_may_break():
    broken = BrokenImages(images(12), 0.01, lambda line: None)
    broken.add({3: "cut off"}, 0)
    with pytest.raises(OdcftError, match="2 of 12 images"):
        broken.add({4: "cut off"}, 0)


def test_a_batch_without_images_ends_the_run():
    broken = BrokenImages(images(1000), 1, lambda line: None)
    with pytest.raises(OdcftError, match="Step 5: hardly any image"):
        list(broken.checked(iter([batch(*range(7), good=1)]), 5))


def test_the_images_of_all_ranks_are_counted(on_threads):
    def work():
        from odcft.distributed import dist

        broken = BrokenImages(images(100), 0.1, lambda line: None)
        broken.add({dist.rank(): "cut off", dist.rank() + 2: "cut off"}, 0)
        return broken.report(), broken.owned

    assert on_threads(2, work) == [(4, 50), (4, 50)]
