"""Small clusters are emptied and refilled (paper, sec. 3.2)."""

import pytest
import torch

from odcft.memory import UNIT, VARIANTS, new_memory, set_centroids
from odcft.small_clusters import handle_small_clusters, members, split_in_two

PAPER, OFFICIAL = VARIANTS["paper"], VARIANTS["official"]


def generator():
    return torch.Generator().manual_seed(0)


def make(features, labels, clusters):
    mem = new_memory(torch.tensor(features), torch.tensor(labels), clusters)
    set_centroids(mem, mem.sums_KD)
    return mem


# Six images to the east in two bunches, four to the north, one lost to the north-west.
EAST = [[1.0, 0.3]] * 3 + [[1.0, -0.3]] * 3
NORTH = [[0.0, 1.0]] * 4
LOST = [[-0.2, 1.0]]


def test_small_cluster_is_dispersed_to_the_nearest_and_refilled_from_the_largest():
    mem = make(EAST + NORTH + LOST, [0] * 6 + [1] * 4 + [2], 3)
    assert handle_small_clusters(mem, 1, PAPER, generator()) == 1
    assert mem.labels_S[10] == 1  # the lost one went north
    assert mem.sizes_K.tolist() == [3, 5, 3]  # the east was cut between its bunches
    assert len(set(mem.labels_S[:3].tolist())) == len(set(mem.labels_S[3:6].tolist())) == 1
    assert mem.counts_K.tolist() == [3, 5, 3]


def test_centroids_of_the_halves_are_their_means_at_once():
    mem = make(EAST + NORTH + LOST, [0] * 6 + [1] * 4 + [2], 3)
    handle_small_clusters(mem, 1, PAPER, generator())
    for half in (0, 2):
        mean = mem.features_SD[mem.labels_S == half].mean(0)
        assert torch.allclose(mem.centroids_KD[half], mean, atol=1e-6)


def test_new_cluster_is_a_random_half_in_the_paper_and_always_the_second_in_the_code():
    def half_that_stays(rules, min_cluster, seed):
        mem = make(EAST + NORTH + LOST, [0] * 6 + [1] * 4 + [2], 3)
        assert handle_small_clusters(mem, min_cluster, rules, torch.Generator().manual_seed(seed)) == 1
        return int(mem.labels_S[0] == 0)

    assert {half_that_stays(PAPER, 1, seed) for seed in range(12)} == {0, 1}
    assert len({half_that_stays(OFFICIAL, 2, seed) for seed in range(12)}) == 1


@pytest.mark.parametrize("seed", range(5))
def test_no_cluster_is_small_afterwards(seed):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(20, (600,), generator=draw)
    labels[labels > 12] = 3  # one huge cluster, and seven empty ones
    mem = new_memory(torch.randn(600, 8, generator=draw), labels, 20)
    set_centroids(mem, mem.sums_KD)
    handle_small_clusters(mem, 12, PAPER, draw)
    assert int(mem.sizes_K.min()) > 12
    assert int(mem.sizes_K.sum()) == 600
    assert torch.equal(mem.counts_K, torch.bincount(mem.labels_S, minlength=20))


def test_identical_images_are_cut_too():
    """A collapsed network gives one feature for all; K-Means finds nothing to cut, and the run must still go on."""
    mem = make([[1.0, 0.0]] * 30, [0] * 30, 3)
    handle_small_clusters(mem, 5, PAPER, generator())
    assert int(mem.sizes_K.min()) > 5


def test_nothing_happens_where_the_largest_cannot_give_two_normal_halves():
    mem = make(EAST + NORTH + LOST, [0] * 6 + [1] * 4 + [2], 3)
    before = mem.labels_S.clone()
    assert handle_small_clusters(mem, 3, PAPER, generator()) == 0  # 6 < 2 x 4
    assert torch.equal(mem.labels_S, before)


def test_split_finds_two_bunches():
    draw = torch.Generator().manual_seed(3)
    points = torch.cat([torch.randn(40, 16, generator=draw) + 2, torch.randn(25, 16, generator=draw) - 2])
    second, sums, sizes = split_in_two(points, torch.arange(65), 1, draw)
    assert sorted(sizes) == [25, 40]
    assert len(set(second[:40].tolist())) == len(set(second[40:].tolist())) == 1
    assert torch.allclose(sums[1].float() * UNIT, points[second].sum(0), atol=1e-5)


def test_split_leaves_enough_on_both_sides():
    points = torch.cat([torch.zeros(50, 2), torch.tensor([[9.0, 9.0]])])  # an outlier
    _, _, sizes = split_in_two(points, torch.arange(51), 10, generator())
    assert sorted(sizes) == [10, 41]


def test_members_of_several_clusters():
    mem = make([[1.0, 0.0]] * 6, [2, 0, 2, 1, 0, 2], 4)
    found = members(mem, [2, 3, 0])
    assert {label: rows.tolist() for label, rows in found.items()} == {0: [1, 4], 2: [0, 2, 5], 3: []}
