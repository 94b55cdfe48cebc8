"""Patches, permutations, and training on jigsaw puzzles."""

import torch

from odcft.pretexts.jigsaw import cut_patches, distant_permutations
from odcft.pretexts.training import train_pretext


def test_permutations_are_far_apart():
    chosen = distant_permutations(9, 20)
    assert chosen[0].tolist() == list(range(9))
    assert torch.equal(chosen.sort(1).values, torch.arange(9).expand(20, 9))
    distances = (chosen.unsqueeze(0) != chosen.unsqueeze(1)).sum(2)[~torch.eye(20, dtype=torch.bool)]
    assert distances.min() >= 7
    assert len(distant_permutations(4, 24).unique(dim=0)) == 24


def test_patches_stay_within_their_cells_and_leave_gaps():
    H = 32
    place = torch.arange(H * H, dtype=torch.float32).view(1, 1, H, H).expand(50, 1, H, H)
    patches = cut_patches(place, 2, torch.Generator().manual_seed(0)).view(50, 4, 14, 14)
    for cell in range(4):
        rows, columns = patches[:, cell] // H, patches[:, cell] % H
        assert rows.min() == 16 * (cell // 2)
        assert rows.max() == 16 * (cell // 2) + 15
        assert columns.min() == 16 * (cell % 2)
        assert columns.max() == 16 * (cell % 2) + 15
    gaps = (patches[:, 1, 0, 0] - patches[:, 0, 0, 13]) % H - 1
    assert 0 <= gaps.min() < gaps.max() <= 4


def test_jigsaw_in_bfloat16_keeps_weights_finite_that_see_only_padding(tmp_path, rows_of_stripes, quick_recipe):
    """On one-pixel maps, torch's bfloat16 gradients of taps that see only padding are uninitialised memory."""
    out = tmp_path / "j.pth"
    recipe = quick_recipe("optim.epochs=1", "optim.precision=bfloat16")
    train_pretext("jigsaw", rows_of_stripes, "resnet18", out, recipe)
    weights = torch.load(out)["state_dict"]["backbone.layer4.0.conv1.weight"]
    assert weights.abs().max() < 1
