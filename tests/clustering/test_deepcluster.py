"""DeepCluster's parts: whitening, clusters drawn uniformly, K-Means again before an epoch."""

import pytest
import torch

from odcft.clustering import deepcluster
from odcft.clustering.clusters import restore, stored
from odcft.clustering.memory import new_memory
from odcft.distributed import dist, ownership
from odcft.plan import fill_autos
from odcft.recipe import DCRecipe, MemoryRecipe, Recipe


def plan(clusters, dtype="float32", **options):
    recipe = Recipe(method="dc", memory=MemoryRecipe(clusters=clusters, dtype=dtype), dc=DCRecipe(**options))
    return fill_autos(recipe)


def state_of(labels, clusters, balance="sampling"):
    features = torch.randn(len(labels), 8, generator=torch.Generator().manual_seed(0))
    return deepcluster.start(features, torch.tensor(labels), plan(clusters, balance=balance))


def bunches(noise=0.0):
    """20 rows at one place, 12 at another: without noise K-Means finds the two wherever it starts."""
    centres = torch.tensor([[9.0, 0, 1]] * 20 + [[-9.0, 5, 0]] * 12)
    return centres + noise * torch.randn(32, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("interval", "start", "epochs"), [(1, 0, [1, 2, 3, 4, 5]), (2, 0, [2, 4]), (1, 2.5, [3, 4, 5])]
)
def test_it_clusters_again_every_few_epochs_after_those_of_the_first_labels(interval, start, epochs):
    settings = plan(2, interval=interval)
    settings.memory.start_epochs = start
    assert [epoch for epoch in range(6) if deepcluster.clusters_again(settings, epoch)] == epochs


# ---------------------------------------------------------------- what K-Means sees


def test_rows_near_the_middle_have_unit_length_too():
    compact = deepcluster.features_for_kmeans(torch.tensor([[-1.0], [1.0], [0.01], [-0.01]]), plan(2))
    assert compact.flatten().abs().tolist() == pytest.approx([1, 1, 1, 1])


def test_fewer_images_than_components_give_fewer_components():
    features_SD = deepcluster.features_for_kmeans(torch.randn(5, 12), plan(2))
    assert features_SD.shape == (5, 4)
    assert torch.allclose(features_SD.norm(dim=1), torch.ones(5))


# ---------------------------------------------------------------- an epoch


def test_every_cluster_is_drawn_equally_often():
    labels = [0] * 90 + [1] * 9 + [2] * 1
    state = state_of(labels, 3)
    drawn = torch.tensor(labels)[deepcluster.draw(state, torch.Generator().manual_seed(1))]
    counts = torch.bincount(drawn, minlength=3)
    assert counts.sum() == 100
    assert counts.max() - counts.min() <= 1


def test_reweighting_draws_each_image_once_and_weighs_small_clusters_more():
    state = state_of([0] * 8 + [1] * 2, 2, "reweighting")
    assert sorted(deepcluster.draw(state, torch.Generator()).tolist()) == list(range(10))
    weight_K = deepcluster.targets(state, torch.arange(2))[1]
    assert torch.allclose(weight_K[1] / weight_K[0], torch.tensor(2.0))
    assert deepcluster.targets(state_of([0] * 8 + [1] * 2, 2), torch.arange(2))[1].unique().tolist() == [1.0]


@pytest.mark.parametrize("seed", range(8))
def test_clusters_of_the_same_size_are_drawn_with_each_image_once(seed):
    state = state_of([0, 1, 2] * 5, 3)
    assert sorted(deepcluster.draw(state, torch.Generator().manual_seed(seed)).tolist()) == list(range(15))


def test_images_of_a_cluster_come_in_any_order_and_large_clusters_in_part():
    state = state_of([0] * 12 + [1] * 4, 2)
    drawn = [deepcluster.draw(state, torch.Generator().manual_seed(seed)) for seed in range(200)]
    assert all((rows < 12).sum() == 8 for rows in drawn)
    seen = torch.bincount(torch.cat(drawn), minlength=16)
    assert (seen[:12] - 200 * 8 / 12).abs().max() < 40  # 133 times each of twelve
    assert seen[12:].tolist() == [400] * 4  # twice each of four
    first = torch.bincount(torch.stack([rows[0] for rows in drawn]), minlength=16)
    assert (first > 0).sum() > 12
    again = deepcluster.draw(state, torch.Generator().manual_seed(3))
    assert torch.equal(again, drawn[3])
    assert state.memory.labels_S.tolist() == [0] * 12 + [1] * 4


@pytest.mark.parametrize("images", [300_007, 100_000])
def test_rounding_takes_no_image_s_turn(monkeypatch, images):
    """Near the end of its range a draw put every image's place at the next one's, where numbers were of float32."""
    state = state_of([0, 1], 2)
    monkeypatch.setattr(deepcluster.torch, "rand", lambda *args, **options: torch.tensor(0.99))
    state.memory.labels_S, state.memory.sizes_K = torch.zeros(images, dtype=torch.int32), torch.tensor([images])
    drawn = deepcluster.draw(state, torch.Generator().manual_seed(0))
    assert torch.equal(drawn.sort().values, torch.arange(images))


def test_last_place_is_some_image_s_however_shares_are_rounded(monkeypatch):
    """999 clusters' shares of 100,000 images add up to a little less than their sum."""
    state = state_of([0, 1], 2)
    monkeypatch.setattr(deepcluster.torch, "rand", lambda *args, **options: torch.tensor(1 - 2.0**-24))
    state.memory.labels_S = (torch.arange(100_000) % 999).int()
    state.memory.sizes_K = torch.bincount(state.memory.labels_S)
    drawn = deepcluster.draw(state, torch.Generator().manual_seed(0))
    assert drawn.min() >= 0
    assert drawn.max() < 100_000


def test_rank_draws_a_cluster_by_its_share_of_it():
    """This rank has 4 of 40 images of one cluster, and 4 of 4 of another: it draws the other ten times as often."""
    state = state_of([0] * 4 + [1] * 4, 2)
    state.memory.sizes_K = torch.tensor([40, 4])
    drawn = torch.cat([deepcluster.draw(state, torch.Generator().manual_seed(seed)) for seed in range(100)])
    assert len(drawn) == 800
    assert int((drawn < 4).sum()) == pytest.approx(800 / 11, abs=25)


@pytest.mark.parametrize("balance", ["sampling", "reweighting"])
def test_rank_without_images_draws_none(balance):
    state = state_of([0, 1], 2, balance)
    state.memory = new_memory(torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64), 2)
    state.memory.sizes_K = torch.tensor([3, 2])
    assert deepcluster.draw(state, torch.Generator()).tolist() == []


def test_labels_of_a_batch_and_its_weights():
    state = state_of([0] * 8 + [1] * 2, 2, "reweighting")
    labels, weights = deepcluster.targets(state, torch.tensor([9, 0, 9]))
    assert labels.tolist() == [1, 0, 1]
    assert labels.dtype == torch.int64
    assert weights.tolist() == pytest.approx([8**-0.5, 2**-0.5])


def test_nothing_moves_within_an_epoch():
    state = state_of([0, 1, 0, 1], 2)
    before = state.memory.features_SD.clone()
    assert deepcluster.update(state, torch.tensor([0, 1]), torch.randn(2, 8), 5) == 0
    assert torch.equal(state.memory.features_SD, before)
    assert state.memory.labels_S.tolist() == [0, 1, 0, 1]


# ---------------------------------------------------------------- clustering


def test_an_empty_cluster_takes_half_of_the_largest():
    state = state_of([0] * 10 + [1] * 3, 4)
    assert (state.memory.sizes_K > 0).all()
    assert state.memory.sizes_K[1] == 3
    assert state.memory.sizes_K.sum() == 13
    for k in range(4):
        features = state.memory.features_SD[state.memory.labels_S == k]
        assert torch.allclose(state.memory.centroids_KD[k], features.mean(0), atol=1e-6)


def test_clusters_of_a_single_image_are_left_alone():
    state = state_of([0] * 10 + [1], 2)
    assert state.memory.labels_S.tolist() == [0] * 10 + [1]
    assert torch.allclose(state.memory.centroids_KD[1], state.memory.features_SD[10])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_features_are_kept_in_the_recipe_s_dtype(dtype):
    chosen = plan(2, dtype)
    kept = deepcluster.start(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([0, 1]), chosen).memory.features_SD
    assert kept.dtype == {"float16": torch.float16, "float32": torch.float32}[dtype]
    assert torch.allclose(kept.float(), torch.tensor([[0.6, 0.8], [0, 1]]), atol=1e-3)


def test_clusters_are_found_again_every_interval_epochs():
    """The state had every second row in one cluster; features have two bunches, so that is what comes of K-Means."""
    features, asked = bunches(), []
    state = deepcluster.start(torch.randn(32, 2), torch.arange(32) % 2, plan(2, interval=3, pca=2))
    before = state.memory

    def embed():
        asked.append(1)
        return features.clone()

    assert [deepcluster.begin_epoch(state, epoch, embed) for epoch in (0, 1, 2)] == [False] * 3
    assert asked == []
    assert state.memory is before
    assert deepcluster.begin_epoch(state, 3, embed) is True
    labels = state.memory.labels_S.tolist()
    assert len(set(labels[:20])) == len(set(labels[20:])) == len({labels[0], labels[20]}) - 1 == 1
    assert sorted(state.memory.sizes_K.tolist()) == [12, 20]
    unit = deepcluster.features_for_kmeans(features, plan(2, pca=2))
    assert torch.allclose(state.memory.features_SD, unit, atol=1e-5)
    assert torch.allclose(state.memory.centroids_KD[labels[0]], unit[:20].mean(0), atol=1e-5)
    assert [deepcluster.begin_epoch(state, epoch, embed) for epoch in (4, 5, 6)] == [False, False, True]
    assert len(asked) == 2


def test_clusters_are_found_again_every_epoch_but_the_first():
    state = deepcluster.start(bunches(), torch.arange(32) % 2, plan(2))
    assert [deepcluster.begin_epoch(state, epoch, bunches) for epoch in range(4)] == [False, True, True, True]


def test_labels_are_the_nearest_of_what_kmeans_finds(monkeypatch):
    """Rows of one component come to -1 and 1, and the second centroid is the nearer one of all that are above 0."""
    asked, chosen = [], plan(3, pca=1)
    chosen.kmeans.iterations, chosen.kmeans.engine = 7, "torch"

    def kmeans(features_SD, k, seed, iterations, engine):
        asked.append((len(features_SD), k, iterations, engine))
        return torch.tensor([[-3.0], [0.8], [-0.8]])

    monkeypatch.setattr(deepcluster, "kmeans", kmeans)
    monkeypatch.setattr(deepcluster, "handle_small_clusters", lambda *args: 0)
    state = deepcluster.start(torch.randn(5, 1), torch.arange(5) % 3, chosen)
    deepcluster.begin_epoch(state, 1, lambda: torch.tensor([[1.0], [1.1], [-2.0], [-2.1], [-2.2]]))
    assert asked == [(5, 3, 7, "torch")]
    expected = [1 if feature > 0 else 2 for feature in state.memory.features_SD[:, 0].tolist()]
    assert state.memory.labels_S.tolist() == expected
    assert sorted(state.memory.sizes_K.tolist()) == [0, 2, 3]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_cluster_together(on_threads, ranks):
    """The same sets, whatever ranks call them: PCA may round a coordinate otherwise, K-Means draws the same images."""

    def work():
        mine = list(ownership.my_images(32))
        state = deepcluster.start(bunches(0.1)[mine], torch.arange(32)[mine] % 2, plan(3))
        assert torch.equal(state.memory.sizes_K, dist.all_sum(state.memory.counts_K))
        first = state.memory.centroids_KD
        assert deepcluster.begin_epoch(state, 1, lambda: bunches(0.1)[mine])
        return first, state.memory.sizes_K, state.memory.labels_S

    first, sizes, labels = work()
    for rank, part in enumerate(on_threads(ranks, work)):
        assert torch.equal(part[0], first)
        assert torch.equal(part[1], sizes)
        assert torch.equal(part[2], labels[rank::ranks])


def test_what_is_stored_and_put_back_is_the_same_to_the_bit():
    state, fresh = state_of([0, 0, 0, 1, 1, 2], 3), state_of([1, 0, 2, 1, 0, 2], 3)
    state.memory.centroids_KD += 0.5  # of no mean: it is what was stored that comes back
    rows, same = stored(state)
    assert set(rows) == {"features", "labels"}
    assert set(same) == {"centroids"}
    fresh.memory.features_SD.zero_()
    restore(fresh, {name: rows[name].clone() for name in rows}, {name: same[name].clone() for name in same})
    for name in ("features_SD", "labels_S", "sums_KD", "counts_K", "sizes_K", "centroids_KD"):
        assert torch.equal(getattr(fresh.memory, name), getattr(state.memory, name)), name
