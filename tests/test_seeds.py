"""Every draw has a stream of its own, and the same weights stand on every rank from the first step on."""

import itertools

import pytest
import torch

from odcft import seeds
from odcft.backbone.load import load_backbone


def test_no_two_draws_have_the_same_seed():
    """As bare numbers an epoch's order (seed, epoch, rank) and a crop (seed, epoch, image) were one, and so were
    the head and the halves of step 1."""
    drawn = {}
    for run, (stream, names) in itertools.product((0, 1, 2**40), seeds.STREAMS.items()):
        for where in itertools.product(range(4), repeat=len(names.split(", ")) if names else 0):
            drawn.setdefault(seeds.seed(run, stream, *where), []).append((run, stream, where))
    assert all(len(same) == 1 for same in drawn.values())
    assert all(0 <= one < 2**63 for one in drawn)


def test_a_draw_that_does_not_say_where_is_a_mistake():
    with pytest.raises(AssertionError, match="epoch, image"):
        seeds.seed(0, "crop", 3)


def test_weights_do_not_depend_on_what_was_drawn_before_and_change_nothing_after():
    def drawn():
        with seeds.seeded_init(3, "neck", 0):
            return torch.rand(4)

    first = drawn()
    torch.rand(7)
    state = torch.get_rng_state()
    assert torch.equal(drawn(), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_weights_follow_the_seed_and_the_member():
    def weights(**where):
        return load_backbone("scratch:test_resnet", **where).backbone.net.state_dict()["conv1.0.weight"]

    first = weights(seed=1)
    torch.rand(7)
    assert torch.equal(weights(seed=1), first)
    assert not torch.equal(weights(seed=2), first)
    assert not torch.equal(weights(seed=1, member=1), first)


def test_what_a_partial_checkpoint_lacks_follows_the_seed(tmp_path):
    state = load_backbone("scratch:test_resnet").backbone.net.state_dict()
    torch.save({"arch": "test_resnet", "state_dict": dict(list(state.items())[:40])}, tmp_path / "part.pth")
    (first, second, other) = (
        load_backbone(tmp_path / "part.pth", allow_partial=True, seed=seed).backbone.net.state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_a_resnet_from_scratch_is_the_papers(arch):
    """timm starts the last norm of each block at zero."""
    state = load_backbone(f"scratch:{arch}").backbone.net.state_dict()
    norms = [tensor for name, tensor in state.items() if ".bn" in name and name.endswith("weight")]
    assert norms
    assert all((tensor == 1).all() for tensor in norms)
