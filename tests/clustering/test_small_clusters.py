"""Small clusters are emptied and refilled (paper, sec. 3.2)."""

from collections import Counter

import pytest
import torch

from odcft.clustering import small_clusters
from odcft.clustering.memory import UNIT, VARIANTS, new_memory, set_centroids
from odcft.clustering.small_clusters import SmallClusterWatch, handle_small_clusters, rows_of_clusters
from odcft.clustering.two_means import Halves, split_in_two
from odcft.distributed import dist, ownership

PAPER, OFFICIAL = VARIANTS["paper"], VARIANTS["official"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make(features, labels, clusters, normalise=True):
    mem = new_memory(torch.tensor(features), torch.tensor(labels), clusters, normalise=normalise)
    set_centroids(mem, mem.sums_KD)
    return mem


def on_a_line(clusters, empty=0):
    """A memory of these clusters of numbers, and some empty ones after them."""
    labels = [label for label, numbers in enumerate(clusters) for _ in numbers]
    return make([[float(x)] for numbers in clusters for x in numbers], labels, len(clusters) + empty, normalise=False)


def contents(mem):
    """The numbers of each cluster, sorted."""
    by_label = [sorted(mem.features_SD[mem.labels_S == k, 0].tolist()) for k in range(len(mem.counts_K))]
    assert mem.sizes_K.tolist() == mem.counts_K.tolist() == [len(numbers) for numbers in by_label]
    return by_label


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
    """A collapsed network gives all images the same feature; K-Means cannot split them, but the run must continue."""
    mem = make([[1.0, 0.0]] * 30, [0] * 30, 3)
    handle_small_clusters(mem, 5, PAPER, generator())
    assert int(mem.sizes_K.min()) > 5


def test_nothing_happens_where_the_largest_cannot_give_two_normal_halves():
    mem = make(EAST + NORTH + LOST, [0] * 6 + [1] * 4 + [2], 3)
    before = mem.labels_S.clone()
    assert handle_small_clusters(mem, 3, PAPER, generator()) == 0  # 6 < 2 x 4
    assert torch.equal(mem.labels_S, before)


def test_rows_of_several_clusters():
    mem = make([[1.0, 0.0]] * 6, [2, 0, 2, 1, 0, 2], 4)
    assert rows_of_clusters(mem, [2, 3, 0]).tolist() == [0, 1, 2, 4, 5]
    assert rows_of_clusters(mem, [3]).tolist() == rows_of_clusters(mem, []).tolist() == []


# ---------------------------------------------------------------- a threshold above images / K (fig. 4)


def spread_thin(seed):
    """1,000 images in 50 clusters of random size, 20 on average; 5 are empty."""
    draw = generator(seed)
    labels = (torch.rand(1000, generator=draw) ** 3 * 45).long()
    mem = new_memory(torch.randn(1000, 8, generator=draw), labels, 50)
    set_centroids(mem, mem.sums_KD)
    return mem, draw


@pytest.mark.parametrize("rules", [PAPER, OFFICIAL], ids=["paper", "official"])
@pytest.mark.parametrize("seed", range(3))
def test_a_threshold_above_the_mean_size_is_repaired_in_few_calls_that_each_leave_fewer_small(seed, rules):
    mem, draw = spread_thin(seed)
    small = int((mem.sizes_K <= 40).sum())
    calls = 0
    while handle_small_clusters(mem, 40, rules, draw):
        calls += 1
        before, small = small, int((mem.sizes_K <= 40).sum())
        assert calls < 10
        assert small < before or rules is OFFICIAL
    assert int(mem.sizes_K.max()) < 82  # nothing left to split in two normal halves
    assert int(mem.sizes_K.min()) > 0
    assert int(mem.sizes_K.sum()) == 1000
    assert not SmallClusterWatch().repair_is_due(mem.sizes_K, 40, rules)  # though most clusters are small


def test_a_threshold_above_the_mean_size_does_not_move_most_images_at_once():
    mem, draw = spread_thin(0)
    while handle_small_clusters(mem, 40, PAPER, draw):
        pass
    moved = []
    for _ in range(100):  # a batch of 32 moves at random, mostly to the first clusters; then the repair
        rows = torch.randperm(1000, generator=draw)[:32]
        small_clusters.change_labels(mem, rows, (torch.rand(32, generator=draw) ** 3 * 50).long())
        mem.sizes_K, before = mem.counts_K.clone(), mem.labels_S.clone()
        handle_small_clusters(mem, 40, PAPER, draw)
        moved.append(int((mem.labels_S != before).sum()))
    assert 0 < sum(moved) / len(moved) < 20  # 8; 108 if all small clusters are handled
    assert max(moved) < 100  # 50; 990 if all small clusters are handled


def test_with_too_few_images_the_smallest_clusters_are_handled_and_the_others_stay():
    mem = on_a_line([[0, 1, 2, 10, 11, 12], [50], [60, 61], [70, 71]])  # 11 images, 4 clusters of at least 3
    assert handle_small_clusters(mem, 2, PAPER, generator()) == 1
    assert contents(mem)[2:] == [[60, 61], [70, 71]]
    assert sorted(contents(mem)[:2]) == [[0, 1, 2, 10], [11, 12, 50]]
    assert handle_small_clusters(mem, 2, PAPER, generator()) == 0


def test_with_too_few_images_an_empty_cluster_is_refilled_even_if_none_is_normal():
    mem = on_a_line([[0, 9], [20]], empty=1)
    assert handle_small_clusters(mem, 5, PAPER, generator()) == 1
    assert sorted(contents(mem)) == [[0], [9], [20]]


# ---------------------------------------------------------------- when, and which


def test_watch_tells_of_this_step_on_a_cpu_and_nothing_where_no_answer_has_come_yet(monkeypatch):
    watch = SmallClusterWatch()
    assert watch.repair_is_due(torch.tensor([3, 9]), 3, PAPER) is True
    assert watch.repair_is_due(torch.tensor([4, 9]), 3, PAPER) is False
    assert watch.repair_is_due(torch.tensor([3, 9]), 3, OFFICIAL) is False
    monkeypatch.setattr(watch.reader, "read", lambda value: None)
    assert watch.repair_is_due(torch.tensor([3, 9]), 3, PAPER) is False


@pytest.mark.parametrize(("rules", "min_cluster"), [(PAPER, 2), (OFFICIAL, 3)])
def test_largest_is_cut_from_twice_the_smallest_normal_size_on(rules, min_cluster):
    """The smallest normal cluster has 3 images for both: more than 2 (paper), at least 3 (official code)."""
    mem = on_a_line([[0, 1, 2, 10, 11, 12], [50, 50, 50], [47, 47]])
    assert handle_small_clusters(mem, min_cluster, rules, generator()) == 1
    assert sorted(contents(mem)) == [[0, 1, 2], [10, 11, 12], [47, 47, 50, 50, 50]]
    mem = on_a_line([[0, 1, 2, 10, 11], [50, 50, 50], [47, 47]])
    assert handle_small_clusters(mem, min_cluster, rules, generator()) == 0
    assert contents(mem) == [[0, 1, 2, 10, 11], [50, 50, 50], [47, 47]]


def test_two_images_make_two_clusters_where_only_an_empty_one_is_small():
    mem = on_a_line([[3, 5]], empty=1)
    assert handle_small_clusters(mem, 0, PAPER, generator()) == 1
    assert sorted(contents(mem)) == [[3], [5]]


def test_nothing_happens_where_no_cluster_is_small():
    mem = on_a_line([[1, 2, 3, 4], [5, 6]])
    assert handle_small_clusters(mem, 1, PAPER, generator()) == 0
    assert contents(mem) == [[1, 2, 3, 4], [5, 6]]


@pytest.mark.parametrize("rows", [1, 4096])
def test_images_of_small_clusters_go_to_the_nearest_normal_one_by_the_rules(monkeypatch, rows):
    """From 30, 12 is nearer than 100, but the product with 100 is larger; 99 goes to 100 in either case."""
    monkeypatch.setattr(small_clusters, "ROWS", rows)
    clusters = [[99], [12] * 4, [30], [100] * 4, [-50] * 6 + [-90] * 6]
    mem = on_a_line(clusters)
    handle_small_clusters(mem, 1, PAPER, generator())
    assert contents(mem)[1] == [12, 12, 12, 12, 30]
    assert contents(mem)[3] == [99, 100, 100, 100, 100]
    mem = on_a_line(clusters)
    handle_small_clusters(mem, 2, OFFICIAL, generator())
    assert contents(mem)[1] == [12] * 4
    assert contents(mem)[3] == [30, 99, 100, 100, 100, 100]


@pytest.mark.parametrize("seed", range(6))
def test_halves_of_a_split_cluster_may_be_split_again(seed):
    """9 is cut into 4 and 5, 5 into 2 and 3, and only then it is the turn of a cluster that had 4 from the start."""
    line = [0, 1, 10, 11, 1000, 1001, 1010, 1011, 1012]
    mem = on_a_line([line, [70, 71, 90, 91]], empty=1)
    handle_small_clusters(mem, 0, PAPER, generator(seed))
    assert sorted(contents(mem)) == [[0, 1, 10, 11], [70, 71, 90, 91], line[4:]]
    mem = on_a_line([[60, 60, 60], line, [70, 70, 70]], empty=2)
    assert handle_small_clusters(mem, 0, PAPER, generator(seed)) == 2
    assert sorted(contents(mem)) == [line[:4], [60] * 3, [70] * 3, line[4:6], line[6:]]
    mem = on_a_line([[60, 60, 60], line, [70, 70, 70]], empty=3)
    assert handle_small_clusters(mem, 0, PAPER, generator(seed)) == 3
    assert sorted(contents(mem)) == [[0, 1], [10, 11], [60] * 3, [70] * 3, line[4:6], line[6:]]
    assert mem.centroids_KD.flatten().tolist() == [sum(numbers) / len(numbers) for numbers in contents(mem)]
    assert mem.minus_half_squares_K.tolist() == pytest.approx([-(float(c) ** 2) / 2 for c in mem.centroids_KD])


def test_of_two_largest_the_first_is_split():
    mem = on_a_line([[1, 2], [10, 11, 20, 21], [30, 31, 40, 41], [50]], empty=1)
    handle_small_clusters(mem, 0, PAPER, generator())
    assert sorted(contents(mem)) == [[1, 2], [10, 11], [20, 21], [30, 31, 40, 41], [50]]


@pytest.mark.parametrize("rules", [PAPER, OFFICIAL])
def test_fewer_images_than_clusters_leave_clusters_empty(rules):
    mem = on_a_line([[1, 2, 3]], empty=4)
    assert handle_small_clusters(mem, int(rules is OFFICIAL), rules, generator()) == 2
    assert sorted(contents(mem)) == [[], [], [1], [2], [3]]


def test_rather_a_small_cluster_than_an_empty_one():
    """Two are empty, and 8 can be cut into two normal ones (4 and 4) once: the other takes half of a half."""
    mem = on_a_line([[0, 0, 0, 0, 8, 8, 8, 8]], empty=2)
    assert handle_small_clusters(mem, 3, PAPER, generator()) == 2
    assert sorted(mem.sizes_K.tolist()) == [2, 2, 4]
    mem = on_a_line([[0, 1, 2, 3, 4, 5, 6]], empty=2)  # 3 and 4, and 4 gives 2 and 2
    assert handle_small_clusters(mem, 2, PAPER, generator()) == 2
    assert sorted(mem.sizes_K.tolist()) == [2, 2, 3]


def test_half_may_be_a_single_image_in_the_code_and_is_never_small_in_the_paper():
    clusters = [[0, 0, 0, 0, 0, 0, 90], [-40, -40, -40]]
    mem = on_a_line(clusters, empty=1)
    handle_small_clusters(mem, 3, OFFICIAL, generator())
    assert sorted(contents(mem)) == [[-40] * 3, [0] * 6, [90]]  # and one pass it is: the single one stays
    mem = on_a_line(clusters, empty=1)
    handle_small_clusters(mem, 2, PAPER, generator())
    assert sorted(contents(mem)) == [[-40] * 3, [0] * 4, [0, 0, 90]]


def test_either_half_is_as_often_the_new_one(monkeypatch):
    """Whatever the cut calls the second side: here it is always the 8 and the 9."""

    def cut(features, images, at_least, directions_CD, on_all_ranks):
        (features_MD,) = features
        second_M = features_MD[:, 0] > 5
        sums_2D = torch.stack([features_MD[~second_M].sum(0), features_MD[second_M].sum(0)]).double() / UNIT
        return [Halves(second_M, sums_2D.long(), [int((~second_M).sum()), int(second_M.sum())])]

    monkeypatch.setattr(small_clusters, "split_in_two", cut)
    seen = Counter()
    for seed in range(400):
        mem = on_a_line([[1, 2, 3, 8, 9]], empty=1)
        handle_small_clusters(mem, 0, PAPER, generator(seed))
        assert mem.centroids_KD.flatten().tolist() == [sum(numbers) / len(numbers) for numbers in contents(mem)]
        seen[tuple(contents(mem)[1])] += 1
    assert set(seen) == {(1, 2, 3), (8, 9)}
    assert 160 < seen[8, 9] < 240  # 200, give or take four standard deviations
    mem = on_a_line([[1, 2, 3, 8, 9]], empty=1)
    handle_small_clusters(mem, 1, OFFICIAL, generator())
    assert contents(mem) == [[1, 2, 3], [8, 9]]


def test_the_code_draws_its_start_from_seed_0_whatever_the_run_s_generator():
    """On a circle every start gives another cut."""
    angles = torch.arange(32) * torch.pi / 16
    points = torch.stack([angles.cos(), angles.sin()], 1)
    drawn = generator(5)
    state = drawn.get_state()
    mem = make(points.tolist(), [0] * 32, 2, normalise=False)
    handle_small_clusters(mem, 1, OFFICIAL, drawn)
    assert torch.equal(drawn.get_state(), state)
    for seed in (0, 1):
        (halves,) = split_in_two([points], [torch.arange(32)], [1], torch.randn(1, 2, generator=generator(seed)))
        assert torch.equal(mem.labels_S == 1, halves.second_M) is (seed == 0)


@pytest.mark.parametrize("rules", [PAPER, OFFICIAL], ids=["paper", "official"])
@pytest.mark.parametrize("seed", range(3))
def test_splits_made_at_once_are_those_made_one_by_one(monkeypatch, rules, seed):
    """Clusters of all sizes, with outliers: often a half is larger than the cluster that was expected next."""
    whole, calls = small_clusters.split_in_two, {}

    def refilled(at_most):
        monkeypatch.setattr(small_clusters, "SPLIT", at_most)
        draw, clusters = generator(seed), calls.setdefault(at_most, [])

        def watched(features, *args, **kwargs):
            clusters.append(len(features))
            return whole(features, *args, **kwargs)

        monkeypatch.setattr(small_clusters, "split_in_two", watched)
        labels = (torch.rand(900, generator=draw) ** 2 * 30).long()
        mem = new_memory(torch.randn(900, 6, generator=draw) ** 5, labels, 60, normalise=False)
        set_centroids(mem, mem.sums_KD)
        assert handle_small_clusters(mem, 5, rules, draw) >= 30
        return mem

    one_by_one, at_once = refilled(0), refilled(2048)
    assert torch.equal(one_by_one.labels_S, at_once.labels_S)
    assert torch.equal(one_by_one.centroids_KD, at_once.centroids_KD)
    assert max(calls[0]) == 1
    assert max(calls[2048]) > 1
    assert sum(calls[2048]) > len(calls[0]) > len(calls[2048])  # some were made again


# ---------------------------------------------------------------- any number of ranks


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("case", ["spread", "equal", "few"])
@pytest.mark.parametrize("rules", [PAPER, OFFICIAL])
@pytest.mark.parametrize("gathered", [1 << 28, 70 * 16, 0])
def test_ranks_come_to_what_one_comes_to(on_threads, monkeypatch, ranks, case, rules, gathered):
    """Images spread out, all the same (so that their numbers decide), and so few that a rank has no member of some.

    Whether members are gathered at once, in pieces (of 70 images of 16 bytes), or not at all makes no difference.
    """
    images = 14 if case == "few" else 203
    features = torch.randn(images, 4, generator=generator(1)) if case != "equal" else torch.full((images, 4), 0.3)
    labels = torch.randint(7, (images,), generator=generator(2))
    labels[labels > 3] = 2

    def work():
        mine = list(ownership.my_images(images))
        mem = new_memory(features[mine], labels[mine], 9)
        mem.sizes_K = dist.all_sum(mem.counts_K)
        set_centroids(mem, dist.all_sum(mem.sums_KD))
        filled = handle_small_clusters(mem, 1 if case == "few" else 18, rules, generator(3))
        return filled, mem.sizes_K, mem.centroids_KD, dist.all_sum(mem.counts_K), mem.labels_S

    alone = work()
    assert alone[0] >= 4
    monkeypatch.setattr(small_clusters, "GATHERED", gathered)
    parts = on_threads(ranks, work)
    for filled, sizes_K, centroids_KD, counts_K, _ in parts:
        assert filled == alone[0]
        assert torch.equal(sizes_K, alone[1])
        assert torch.equal(centroids_KD, alone[2])
        assert torch.equal(counts_K, sizes_K)
    for rank, part in enumerate(parts):
        assert torch.equal(part[4], alone[4][rank::ranks])
