import pytest
import torch

from odcft.clustering.neighbour_agreement import neighbour_agreement


def test_agreement_of_neighbours():
    angle = torch.deg2rad(torch.tensor([0.0, 1, 3, 90, 91, 93]))
    one = torch.stack([angle.cos(), angle.sin()], 1)
    assert neighbour_agreement(one, 5 * one, k=2) == 1
    # The fourth to sixth change places with the first to third for half of all images: no neighbour is left.
    assert neighbour_agreement(one, one[[0, 3, 1, 4, 2, 5]], k=1) == pytest.approx(
        sum([{0: 1, 1: 0, 2: 1, 3: 4, 4: 3, 5: 4}[i] == {0: 2, 2: 0, 4: 2, 1: 3, 3: 1, 5: 3}[i] for i in range(6)]) / 6
    )
    draw = torch.Generator().manual_seed(0)
    assert neighbour_agreement(*torch.randn(2, 1500, 9, generator=draw), k=10) == pytest.approx(10 / 1499, abs=0.004)
    for bad in (0, 6):
        with pytest.raises(ValueError, match="k is"):
            neighbour_agreement(one, one, k=bad)
