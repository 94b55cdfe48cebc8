"""Crops, batches, and the order in which training sees them."""

import os

import torch

from odcft.data.batches import Crops, TrainingOrder, collate
from odcft.data.sources import find_images
from odcft.data.view import View
from odcft.recipe import AugmentRecipe


def test_an_unreadable_image_is_reported_and_not_raised(tmp_path, make_images):
    make_images(tmp_path, 2)
    (tmp_path / "a" / "000.png").write_bytes(b"\x89PNG broken")
    crops = Crops(find_images(tmp_path), View(16, 1.0))
    batch = collate([crops[(0, 0)], crops[(0, 1)]])
    assert batch.index_B.tolist() == [1]
    assert list(batch.unreadable) == [0]
    assert batch.pixels.shape == (1, 3, 16, 16)


def test_crops_depend_on_seed_epoch_and_image_only(tmp_path, make_images):
    images = find_images(make_images(tmp_path, 4))
    crops = Crops(images, View(16), AugmentRecipe(), 3)
    assert torch.equal(crops[(5, 1)][0], crops[(5, 1)][0])
    assert not torch.equal(crops[(5, 1)][0], crops[(6, 1)][0])
    assert not torch.equal(crops[(5, 1)][0], Crops(images, View(16), AugmentRecipe(), 4)[(5, 1)][0])


def test_epoch_sees_every_image_once():
    order = TrainingOrder(12, 4, 2, seed=0)
    batches = list(order)
    assert order.steps == len(batches) == 6
    for epoch in (0, 1):
        seen = [key for batch in batches[3 * epoch : 3 * epoch + 3] for key in batch]
        assert sorted(seen) == [(epoch, i) for i in range(12)]


def test_order_can_resume_at_any_step():
    whole = list(TrainingOrder(11, 3, 4, seed=0))
    assert list(TrainingOrder(11, 3, 4, seed=0, first_step=7)) == whole[7:]


def test_fewer_images_than_a_batch_make_one_batch():
    assert len(list(TrainingOrder(5, 128, 2, seed=0))) == 2


def test_data_workers_report_the_same_broken_images(tmp_path, make_images, make_checkpoint):
    from odcft.files import read_column
    from odcft.recipe import load_recipe
    from odcft.train import fine_tune

    make_images(tmp_path / "set", 16)
    for i in (0, 5, 6, 11):
        path = tmp_path / "set" / "ab"[i % 2] / f"{i:03d}.png"
        path.write_bytes(path.read_bytes()[: 40 + 10 * i])
    os.mkfifo(tmp_path / "set" / "pipe.png")
    (tmp_path / "l.txt").write_text(
        "\n".join(["set/pipe.png", *(f"set/{n}" for n in find_images(tmp_path / "set").names)])
    )
    checkpoint = str(make_checkpoint(tmp_path / "c.pth"))
    told = []
    for workers in (0, 2):
        quick = ["optim.batch_size=4", "optim.epochs=1", "neck.hidden=16", "neck.dim=8", "log.tensorboard=false"]
        run = tmp_path / f"run{workers}"
        done = fine_tune(
            checkpoint, str(tmp_path / "l.txt"), run, load_recipe("small", [*quick, f"data.workers={workers}"])
        )
        told.append((done["images"], done["unreadable"], done["loss"], (run / "quarantine.csv").read_text()))
    assert told[0] == told[1]
    assert told[0][:2] == (12, 5)
    assert read_column(tmp_path / "run0" / "quarantine.csv", "reason")[0] == "a pipe, not a file"
