"""Numbers one can check by hand: two or three clusters on the axes of a plane."""

import pytest
import torch
import torch.nn.functional as F

from odcft.clustering import loss_weights, memory, small_clusters
from odcft.clustering.memory import UNIT, VARIANTS, new_memory, set_centroids, to_units, update_samples

PAPER, OFFICIAL = VARIANTS["paper"], VARIANTS["official"]


def plane_memory(points, labels, clusters, **kwargs):
    mem = new_memory(torch.tensor(points, dtype=torch.float32), torch.tensor(labels), clusters, **kwargs)
    set_centroids(mem, mem.sums_KD)
    return mem


def fresh_sums(mem):
    sums = torch.zeros_like(mem.sums_KD)
    return sums.index_add_(0, mem.labels_S, to_units(mem.features_SD))


def test_centroid_is_the_mean_of_normalised_features():
    mem = plane_memory([[2, 0], [0, 3], [0, 5]], [0, 0, 1], 2)
    assert mem.centroids_KD.tolist() == [[0.5, 0.5], [0, 1]]
    assert mem.sizes_K.tolist() == [2, 1]


def test_empty_cluster_keeps_its_centroid():
    mem = plane_memory([[1, 0], [0, 1]], [0, 1], 2)
    memory.change_labels(mem, torch.tensor([1]), torch.tensor([0]))
    mem.sizes_K = torch.tensor([2, 0])
    set_centroids(mem, mem.sums_KD)
    assert mem.centroids_KD.tolist() == [[0.5, 0.5], [0, 1]]
    assert mem.minus_half_squares_K.tolist() == [-0.25, -0.5]


@pytest.mark.parametrize("rows", [3, 65536])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_memory_is_made_of_so_many_rows_at_a_time_and_takes_over_what_it_can(monkeypatch, rows, dtype):
    monkeypatch.setattr(memory, "ROWS", rows)
    given = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    for features in (given.clone(), given.half()):
        expected = features.double() / features.double().norm(dim=1, keepdim=True)
        mem = new_memory(features, labels, 4, dtype)
        assert mem.features_SD.dtype == dtype
        assert (mem.features_SD.data_ptr() == features.data_ptr()) is (features.dtype == dtype)
        assert torch.allclose(
            mem.features_SD.double(), expected, atol=1e-3 if torch.float16 in (dtype, features.dtype) else 1e-6
        )
        assert torch.equal(mem.sums_KD, fresh_sums(mem))
        assert mem.counts_K.tolist() == mem.sizes_K.tolist() == [4, 2, 2, 0]
        assert not mem.centroids_KD.any()
        assert not mem.minus_half_squares_K.any()


def test_features_have_unit_length_however_short_they_were():
    mem = plane_memory([[3e-6, 4e-6], [0, 0]], [0, 1], 2)
    assert mem.features_SD.flatten().tolist() == pytest.approx([0.6, 0.8, 0, 0])
    kept = plane_memory([[3e-6, 4e-6], [7, 0]], [0, 1], 2, normalise=False)
    assert kept.features_SD.flatten().tolist() == pytest.approx([3e-6, 4e-6, 7, 0])
    for rules in (PAPER, OFFICIAL):
        mem = plane_memory([[1, 0]], [0], 2)
        update_samples(mem, torch.tensor([0]), torch.tensor([[0.0, 5e-6]]), 1.0, rules)
        assert mem.features_SD[0].tolist() == pytest.approx([0, 1])
    mem = plane_memory([[1, 0]], [0], 2)  # halves that cancel but for a hundredth: that is what is left, at full length
    update_samples(mem, torch.tensor([0]), torch.tensor([[-0.9998, 0.02]]), 0.5, OFFICIAL)
    assert mem.features_SD[0].tolist() == pytest.approx([0.01, 1], abs=1e-3)


def test_blend_is_equation_2():
    mem = plane_memory([[1, 0], [0, 1]], [0, 1], 2)
    update_samples(mem, torch.tensor([0]), torch.tensor([[0.0, 7.0]]), 0.25, PAPER)
    assert mem.features_SD[0].tolist() == [0.75, 0.25]  # 0.25 (0, 1) + 0.75 (1, 0), not normalised again


def test_official_normalises_again():
    mem = plane_memory([[1, 0], [0, 1]], [0, 1], 2)
    update_samples(mem, torch.tensor([0]), torch.tensor([[0.0, 7.0]]), 0.5, OFFICIAL)
    assert mem.features_SD[0].tolist() == pytest.approx([0.5**0.5, 0.5**0.5])


def test_sample_joins_its_nearest_centroid():
    mem = plane_memory([[1, 0], [1, 0], [0, 1]], [0, 0, 1], 2)
    moved = update_samples(mem, torch.tensor([0]), torch.tensor([[0.0, 1.0]]), 0.9, PAPER)
    assert moved.tolist() == [True]
    assert mem.labels_S.tolist() == [1, 0, 1]
    assert mem.counts_K.tolist() == [1, 2]


def test_kept_labels_stay_while_features_and_sums_follow():
    mem = plane_memory([[1, 0], [1, 0], [0, 1]], [0, 0, 1], 2)
    moved = update_samples(mem, torch.tensor([0]), torch.tensor([[0.0, 1.0]]), 0.75, PAPER, keep_labels=True)
    assert moved.tolist() == [False]
    assert mem.labels_S.tolist() == [0, 0, 1]
    assert mem.features_SD[0].tolist() == [0.25, 0.75]
    assert torch.equal(mem.sums_KD, fresh_sums(mem))


def test_dot_product_prefers_the_long_centroid_where_distance_does_not():
    centroids = torch.tensor([[1.0, 0.0], [0.3, 0.3]])
    feature = torch.tensor([[0.4, 0.3]])
    halves = memory.minus_half_squares(centroids)
    assert memory.nearest_centroid(feature, centroids, halves, PAPER).tolist() == [1]
    assert memory.nearest_centroid(feature, centroids, halves, OFFICIAL).tolist() == [0]


def test_image_twice_in_a_batch_the_last_wins_and_counts_once():
    mem = plane_memory([[1, 0], [0, 1], [0, 1]], [0, 1, 1], 2)
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    update_samples(mem, torch.tensor([0, 1, 0]), features, 1.0, PAPER)
    assert mem.features_SD[0].tolist() == [0, 1]
    assert mem.labels_S.tolist() == [1, 0, 1]
    assert mem.counts_K.tolist() == [1, 2]
    assert torch.equal(mem.sums_KD, fresh_sums(mem))


def test_nearest_centroid_is_the_one_at_the_least_distance():
    """Centroids of all lengths, in float64 and by the definition (eq. 3)."""
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(300, 3, generator=draw)
    centroids = torch.randn(20, 3, generator=draw) * torch.arange(1, 21).unsqueeze(1) / 8
    square = (features.double().unsqueeze(1) - centroids.double()).square().sum(2)
    halves = memory.minus_half_squares(centroids)
    assert torch.allclose(halves.double(), -centroids.double().square().sum(1) / 2)
    assert torch.equal(memory.nearest_centroid(features, centroids, halves, PAPER), square.argmin(1))
    product = features.double() @ centroids.double().T
    assert torch.equal(memory.nearest_centroid(features, centroids, halves, OFFICIAL), product.argmax(1))


@pytest.mark.parametrize("scores", [1, 7 * 3, 7 * 64, 1 << 19])
@pytest.mark.parametrize("K", [1, 31, 64, 100, 200])
@pytest.mark.parametrize("rules", [PAPER, OFFICIAL])
def test_scores_in_pieces_give_the_first_of_the_best_as_all_at_once_do(monkeypatch, rules, K, scores):
    """Whole numbers, of which many are equally near: within a piece, and in two."""
    monkeypatch.setattr(memory, "SCORES", scores)
    for seed in range(10):
        draw = torch.Generator().manual_seed(seed)
        features = torch.randint(-2, 3, (7, 3), generator=draw).float()
        centroids = torch.randint(-2, 3, (K, 3), generator=draw).float()
        halves = memory.minus_half_squares(centroids)
        found = memory.nearest_centroid(features, centroids, halves, rules)
        shorter = halves if rules is PAPER else torch.zeros(K)
        assert torch.equal(found, (features @ centroids.T + shorter).argmax(1))
    assert memory.nearest_centroid(features[:0], centroids, halves, rules).shape == (0,)


def test_last_of_each_row():
    assert memory.last_of_each(torch.tensor([5, 3, 5, 9, 3, 5])).tolist() == [5, 4, 5, 3, 4, 5]
    rows = torch.randint(40, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    last = {row: place for place, row in enumerate(rows)}
    assert memory.last_of_each(torch.tensor(rows)).tolist() == [last[row] for row in rows]


@pytest.mark.parametrize("at_a_time", [1, 4096])
def test_moved_rows_take_their_sums_and_counts_with_them(monkeypatch, at_a_time):
    monkeypatch.setattr(memory, "MOVED", at_a_time)
    mem = plane_memory([[2, 0], [0, 3], [3, 4], [1, 0]], [0, 0, 1, 1], 3)
    before, centroids = mem.features_SD.clone(), mem.centroids_KD.clone()
    memory.change_labels(mem, torch.tensor([2, 0]), torch.tensor([2, 1]))
    assert mem.labels_S.tolist() == [1, 0, 2, 1]
    assert mem.labels_S.dtype == torch.int32
    assert mem.counts_K.tolist() == [1, 2, 1]
    assert (mem.sums_KD.double() * UNIT).flatten().tolist() == pytest.approx([0, 1, 2, 0, 0.6, 0.8], abs=1e-6)
    assert torch.equal(mem.sums_KD, fresh_sums(mem))
    assert torch.equal(mem.features_SD, before)
    assert torch.equal(mem.centroids_KD, centroids)
    memory.change_labels(mem, torch.tensor([], dtype=torch.int64), torch.tensor([], dtype=torch.int64))
    assert mem.counts_K.tolist() == [1, 2, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("variant", ["paper", "official"])
def test_sums_do_not_drift(dtype, variant):
    """Not a little drift: none. After any number of updates the sums are those of the images, to the last bit."""
    draw = torch.Generator().manual_seed(0)
    mem = new_memory(torch.randn(500, 16, generator=draw), torch.randint(7, (500,), generator=draw), 7, dtype)
    set_centroids(mem, mem.sums_KD)
    for step in range(300):
        rows = torch.randint(500, (32,), generator=draw)  # with replacement
        update_samples(mem, rows, torch.randn(32, 16, generator=draw), 0.5, VARIANTS[variant])
        mem.sizes_K.copy_(mem.counts_K)
        if step % 10 == 9:
            set_centroids(mem, mem.sums_KD)
    assert torch.equal(mem.sums_KD, fresh_sums(mem))
    assert torch.equal(mem.counts_K, torch.bincount(mem.labels_S, minlength=7))


def test_recomputing_all_centroids_changes_only_the_involved():
    """Why "involved only" (paper) and "all" (official code) need no switch."""
    draw = torch.Generator().manual_seed(0)
    mem = new_memory(torch.randn(60, 8, generator=draw), torch.randint(9, (60,), generator=draw), 9)
    set_centroids(mem, mem.sums_KD)
    before, labels = mem.centroids_KD.clone(), mem.labels_S.clone()
    rows = torch.tensor([0, 1])
    update_samples(mem, rows, torch.randn(2, 8, generator=draw), 0.5, PAPER)
    mem.sizes_K.copy_(mem.counts_K)
    set_centroids(mem, mem.sums_KD)
    involved = set(labels[rows].tolist()) | set(mem.labels_S[rows].tolist())
    untouched = [k for k in range(9) if k not in involved]
    assert torch.equal(mem.centroids_KD[untouched], before[untouched])


def test_fixed_point_is_exact_for_half_precision():
    values = torch.randn(1000).half()
    assert torch.equal((to_units(values).double() * UNIT).half(), values)


def test_loss_weights():
    sizes = torch.tensor([1, 4, 16, 0])
    assert loss_weights.loss_weights(sizes, PAPER).tolist() == [1, 0.5, 0.25, 1]
    empty = loss_weights.loss_weights(torch.tensor([0, 1]), OFFICIAL)
    assert float(empty[0] / empty[1]) == pytest.approx(1e5**0.5, rel=1e-4)
    official = loss_weights.loss_weights(sizes[:3], OFFICIAL)
    assert official.sum().item() == pytest.approx(1)
    assert (official / official[0]).tolist() == pytest.approx([1, 0.5, 0.25], rel=1e-4)


def test_weighted_loss_does_not_depend_on_the_scale_of_the_weights():
    """A published rewrite divides by the batch size instead, and so trains with a 10,000 times smaller loss."""
    logits, labels = torch.randn(8, 3), torch.randint(3, (8,))
    sizes = torch.tensor([5, 50, 500])
    ours, theirs = (
        F.cross_entropy(logits, labels, loss_weights.loss_weights(sizes, rules)) for rules in (PAPER, OFFICIAL)
    )
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)


def test_threshold_itself_is_small_in_the_paper_only():
    sizes = torch.tensor([19, 20, 21])
    assert small_clusters.is_small(sizes, 20, PAPER).tolist() == [True, True, False]
    assert small_clusters.is_small(sizes, 20, OFFICIAL).tolist() == [True, False, False]
