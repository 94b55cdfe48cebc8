"""PCA whitening: variance one, no correlation, the same on any number of ranks."""

import pytest
import torch

from odcft.clustering import pca_whitening
from odcft.distributed import dist, ownership


def test_whitened_features_have_variance_one_and_no_correlation():
    draw = torch.Generator().manual_seed(0)
    features_SF = torch.randn(500, 6, generator=draw) @ torch.randn(6, 12, generator=draw) + 3
    white_SD = pca_whitening.whiten(features_SF, 4)
    assert white_SD.shape == (500, 4)
    assert torch.allclose(white_SD.mean(0), torch.zeros(4), atol=1e-4)
    assert torch.allclose(white_SD.T @ white_SD / 500, torch.eye(4), atol=1e-3)


def test_whitening_takes_the_main_directions_and_any_number_of_rows_at_a_time(monkeypatch):
    """Along (0.6, 0.8) the numbers are 3, 1, -1, -3 times 5, across it 2, -2, -2, 2: those are the coordinates."""
    along, across = torch.tensor([3.0, 1, -1, -3]), torch.tensor([2.0, -2, -2, 2])
    rows = along.unsqueeze(1) * torch.tensor([3.0, 4]) + across.unsqueeze(1) * torch.tensor([-0.8, 0.6]) + 7
    expected = torch.stack([across / 2, along / 5**0.5], 1)  # the main one last
    for at_a_time in (3, 16384):
        monkeypatch.setattr(pca_whitening, "ROWS", at_a_time)
        for components in (1, 2):
            white = pca_whitening.whiten(rows, components)
            assert white.shape == (4, components)
            assert torch.allclose(white.abs(), expected[:, -components:].abs(), atol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_small_variances_are_made_one_whatever_the_scale(scale):
    draw = torch.Generator().manual_seed(0)
    white = pca_whitening.whiten(torch.randn(400, 3, generator=draw) * torch.tensor([1.0, 0.03, 0.2]) * scale, 3)
    assert torch.allclose(white.T @ white / 400, torch.eye(3), atol=1e-2)


def test_directions_without_variance_stay_at_almost_nothing():
    line = torch.linspace(-1, 1, 50).unsqueeze(1) * torch.tensor([0.3, -0.7, 0.53])
    white = pca_whitening.whiten(line, 3)
    assert white[:, -1].square().mean() == pytest.approx(1, rel=1e-3)
    assert white[:, :2].abs().max() < 1e-3
    assert pca_whitening.whiten(torch.full((6, 3), 0.3), 3).abs().max() < 1e-3


def test_one_component_is_the_least():
    assert pca_whitening.whiten(torch.tensor([[1.0, 2]]), 8).tolist() == [[0]]
    assert pca_whitening.whiten(torch.tensor([[1.0, 2], [3, 5]]), 8).flatten().sort().values.tolist() == pytest.approx(
        [-1, 1]
    )
    assert pca_whitening.whiten(torch.randn(9, 2), 8).shape == (9, 2)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_whiten_as_one_and_take_rank_0_s_directions(on_threads, monkeypatch, ranks):
    """A library may give a direction or its opposite; here each rank but the first has the opposites."""
    eigh = torch.linalg.eigh

    def either(matrix):
        variance, direction = eigh(matrix)
        return variance, direction * (1 if dist.rank() == 0 else -1)

    monkeypatch.setattr(torch.linalg, "eigh", either)
    rows = torch.randn(23, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2, 3, 4]) + 5
    alone = pca_whitening.whiten(rows, 3)
    for rank, part in enumerate(
        on_threads(ranks, lambda: pca_whitening.whiten(rows[list(ownership.my_images(23))], 3))
    ):
        assert torch.allclose(part, alone[rank::ranks], atol=1e-4)
