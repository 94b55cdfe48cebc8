"""Which rank owns which image, and in which row it keeps it."""

import pytest
import torch

from odcft.distributed import dist, ownership


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 17])
def test_every_image_has_one_owner_and_one_row(on_threads, ranks, count):
    def work():
        mine = [image for image in range(count) if ownership.is_mine(image)]
        assert mine == list(ownership.my_images(count))
        assert [ownership.row_of(image) for image in mine] == list(range(len(mine)))
        assert [ownership.image_of(row) for row in range(len(mine))] == mine
        images = torch.arange(count)
        assert images[ownership.is_mine(images)].tolist() == mine
        assert ownership.image_of(ownership.row_of(torch.tensor(mine))).tolist() == mine
        return mine

    assert sorted(image for mine in on_threads(ranks, work) for image in mine) == list(range(count))


def test_rows_of_a_snapshot_from_another_number_of_ranks(monkeypatch):
    monkeypatch.setattr(dist, "rank", lambda: 1)
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    assert ownership.image_of(torch.arange(4)).tolist() == [1, 3, 5, 7]
    assert ownership.image_of(torch.arange(4), rank=2, ranks=3).tolist() == [2, 5, 8, 11]
    assert ownership.image_of(3, rank=0, ranks=1) == 3
