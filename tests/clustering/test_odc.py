"""ODC's part of an iteration, on planes where one can follow it by hand (paper, sec. 3)."""

from types import SimpleNamespace

import pytest
import torch

from odcft.clustering import memory, odc
from odcft.clustering.clusters import restore, stored
from odcft.clustering.memory import VARIANTS
from odcft.distributed import dist, ownership
from odcft.plan import fill_autos
from odcft.recipe import MemoryRecipe, Recipe

# Four images around east, two around north.
FEATURES = [[2.0, 0.0], [3.0, 0.0], [0.8, 0.6], [0.8, -0.6], [0.0, 5.0], [0.6, 0.8]]
LABELS = [0, 0, 0, 0, 1, 1]


def plan(clusters=2, min_cluster=-1, dtype="float32", seed=0, **options):
    memory = MemoryRecipe(clusters=clusters, min_cluster=min_cluster, dtype=dtype, **options)
    return fill_autos(Recipe(seed=seed, memory=memory))


def start(features=FEATURES, labels=LABELS, **options):
    return odc.start(torch.tensor(features), torch.tensor(labels), plan(**options))


def same_memory(first, second):
    return all(torch.equal(value, vars(second)[name]) for name, value in vars(first).items() if name != "coarse")


def near(tensor, expected):
    return torch.allclose(tensor, torch.tensor(expected), atol=1e-6)


# ---------------------------------------------------------------- before training


def test_images_keep_their_first_labels_for_the_steps_it_says_and_small_clusters_wait():
    labels = [0, 0, 0, 0, 0, 0, 1, 1]
    state = start([*FEATURES[:4], *FEATURES[:2], *FEATURES[4:]], labels, min_cluster=2)
    state.start_steps = 1
    west = torch.tensor([[-1.0, 0.0]] * 2)
    assert odc.update(state, torch.tensor([6, 7]), west, 0) == 0
    assert state.memory.labels_S.tolist() == labels
    odc.update(state, torch.tensor([6, 7]), west, 1)
    assert state.memory.sizes_K.min() > 2


def test_a_memory_that_starts_with_features_of_a_layer_stays_until_the_network_has_learned_them():
    state = start(min_cluster=2, start_features="layer")
    state.start_steps = 1
    kept, row_B = [tensor.clone() for tensor in (state.memory.features_SD, state.memory.sums_KD)], torch.tensor([4, 0])
    entry_BD, share = odc.entries_to_find(state, row_B, 0)
    assert near(entry_BD, [[0.0, 1.0], [1.0, 0.0]])
    assert share == 1
    assert odc.update(state, row_B, torch.tensor([[-1.0, 0.0]] * 2), 0) == 0
    assert torch.equal(state.memory.features_SD, kept[0])
    assert torch.equal(state.memory.sums_KD, kept[1])
    assert odc.entries_to_find(state, row_B, 1) is None
    odc.update(state, row_B, torch.tensor([[-1.0, 0.0]] * 2), 1)
    assert not torch.equal(state.memory.features_SD, kept[0])
    labels_only = start()
    labels_only.start_steps = 1
    assert odc.entries_to_find(labels_only, row_B, 0) is None
    both = start(instance_share=0.25)
    assert odc.entries_to_find(both, row_B, 0).share == 0.25


def test_features_of_a_layer_are_whitened_and_get_the_length_of_the_neck():
    torch.manual_seed(0)
    layer_SL = torch.randn(500, 6) * torch.tensor([9.0, 4, 2, 1, 0.5, 0.1]) + 3
    labels_only = odc.features_of_start_layer(layer_SL, plan())
    assert labels_only.shape == (500, 6)
    found = plan(start_features="layer")
    found.neck.dim = 8
    features_SD = odc.features_of_start_layer(layer_SL, found)
    assert features_SD.shape == (500, 8)
    assert torch.equal(features_SD[:, 6:], torch.zeros(500, 2))
    assert near(features_SD.norm(dim=1), [1.0] * 500)
    assert torch.allclose(features_SD[:, :6].var(0), torch.tensor(1 / 6), atol=0.02)  # whitened
    few_SD = odc.features_of_start_layer(layer_SL[:24], found)
    assert few_SD.shape == (24, 8)
    assert torch.equal(few_SD[:, 3:], torch.zeros(24, 5))  # 8 images a component
    found.neck.dim = 2
    assert odc.features_of_start_layer(layer_SL, found).shape == (500, 2)


def test_kmeans_sees_features_of_unit_length_however_short_they_were():
    features = torch.tensor([[3.0, 4.0], [-3e-6, 4e-6], [0.0, 0.0]])
    compact = odc.features_for_kmeans(features, plan())
    assert near(compact, [[0.6, 0.8], [-0.6, 0.8], [0, 0]])
    assert compact.data_ptr() == features.data_ptr()  # there may be no room for two


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_memories_start_with_normalised_features_and_the_means_of_them(dtype):
    state = start(dtype=dtype, clusters=3)
    assert state.memory.features_SD.dtype == {"float16": torch.float16, "float32": torch.float32}[dtype]
    rough = 1e-6 if dtype == "float32" else 1e-3
    expected = torch.tensor([[1, 0], [1, 0], [0.8, 0.6], [0.8, -0.6], [0, 1], [0.6, 0.8]])
    assert torch.allclose(state.memory.features_SD.float(), expected, atol=rough)
    assert torch.allclose(state.memory.centroids_KD, torch.tensor([[0.9, 0], [0.3, 0.9], [0, 0]]), atol=rough)
    assert state.memory.labels_S.tolist() == LABELS
    assert state.memory.sizes_K.tolist() == [4, 2, 0]


def test_rules_are_those_of_the_variant_in_the_plan():
    assert start().rules is VARIANTS["paper"]
    assert start(variant="official").rules is VARIANTS["official"]


def test_labels_evolve_in_every_step_so_no_epoch_begins_with_new_ones():
    def embed():
        raise AssertionError("nothing is extracted")

    state = start()
    assert [odc.begin_epoch(state, epoch, embed) for epoch in range(3)] == [False] * 3


def test_an_epoch_is_each_image_once_in_an_order_the_generator_draws():
    first, second, again = (odc.draw(start(), torch.Generator().manual_seed(seed)).tolist() for seed in (1, 2, 1))
    assert sorted(first) == sorted(second) == list(range(6))
    assert first == again != second


# ---------------------------------------------------------------- a step


def test_labels_and_weights_of_a_batch():
    state = start()
    labels, weights = odc.targets(state, torch.tensor([4, 0, 4]))
    assert labels.tolist() == [1, 0, 1]
    assert labels.dtype == torch.int64
    assert near(weights, [0.5, 0.5**0.5])  # 1 / sqrt(4), 1 / sqrt(2)
    assert near(odc.targets(start(variant="official"), torch.tensor([0]))[1].sum(), 1.0)
    assert odc.targets(start(reweight=False), torch.tensor([0]))[1].tolist() == [1, 1]


def test_a_batch_moves_samples_at_once_and_centroids_every_kth_step():
    """Image 3 comes round to the north with m = 1; the centroids follow at the third step."""
    state = start(momentum=1.0, centroid_interval=3)
    north, before = torch.tensor([[0.0, 2.0], [4.0, 0.0]]), state.memory.centroids_KD.clone()
    moved = odc.update(state, torch.tensor([3, 0]), north, 0)
    assert moved == 0.5
    assert state.memory.labels_S.tolist() == [0, 0, 0, 1, 1, 1]
    assert state.memory.sizes_K.tolist() == [3, 3]
    assert near(state.memory.features_SD[3], [0.0, 1.0])
    assert torch.equal(state.memory.centroids_KD, before)
    assert odc.update(state, torch.tensor([3, 0]), north, 1) == 0
    assert torch.equal(state.memory.centroids_KD, before)
    odc.update(state, torch.tensor([3, 0]), north, 2)
    after = state.memory.centroids_KD.clone()
    assert near(after, [[2.8 / 3, 0.2], [0.2, 2.8 / 3]])
    odc.update(state, torch.tensor([3]), torch.tensor([[0.0, -1.0]]), 3)
    assert torch.equal(state.memory.centroids_KD, after)
    odc.update(state, torch.tensor([3]), torch.tensor([[0.0, -1.0]]), 4)
    assert torch.equal(state.memory.centroids_KD, after)
    odc.update(state, torch.tensor([3]), torch.tensor([[0.0, -1.0]]), 5)
    assert not torch.equal(state.memory.centroids_KD, after)


def test_centroids_follow_every_step_where_the_interval_is_one():
    state = start(momentum=1.0, centroid_interval=1)
    for step in range(3):
        before = state.memory.centroids_KD.clone()
        odc.update(state, torch.tensor([3]), torch.tensor([[step + 1.0, 1.0]]), step)
        assert not torch.equal(state.memory.centroids_KD, before)


def test_momentum_is_that_of_equation_2():
    state = start(momentum=0.25)
    odc.update(state, torch.tensor([0]), torch.tensor([[0.0, 9.0]]), 0)
    assert near(state.memory.features_SD[0], [0.75, 0.25])


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_a_cluster_that_becomes_small_is_refilled_in_the_same_step(variant):
    """North keeps one image of two, and is small for either variant: it goes east, and half of the east comes back."""
    min_cluster = 1 if variant == "paper" else 2
    states = [start(momentum=1.0, min_cluster=min_cluster, variant=variant) for _ in range(2)]
    for state in states:
        odc.update(state, torch.tensor([5]), torch.tensor([[1.0, 0.0]]), 4)
        assert torch.equal(state.memory.labels_S.bincount(), state.memory.sizes_K)
        labels = state.memory.labels_S.tolist()
        assert labels[0] == labels[1] == labels[3] == labels[5] != labels[2] == labels[4]  # (0.8, 0.6) and (0, 1)
    assert same_memory(states[0].memory, states[1].memory)
    left_alone = start(momentum=1.0, min_cluster=-1, variant=variant)
    odc.update(left_alone, torch.tensor([5]), torch.tensor([[1.0, 0.0]]), 4)
    assert left_alone.memory.labels_S.tolist() == [0, 0, 0, 0, 1, 0]


# ---------------------------------------------------------------- stored and put back


def test_what_is_stored_and_put_back_is_the_same_to_the_bit():
    """Features are no unit vectors any more, and centroids not their means, when a run is stopped between refreshes."""
    state, fresh = start(clusters=3), start(labels=[1, 0, 1, 0, 1, 0], clusters=3)
    odc.update(state, torch.tensor([1, 3]), torch.tensor([[1.0, 1.0], [-1.0, 2.0]]), 0)
    rows, same = stored(state)
    assert set(rows) == {"features", "labels"}
    assert set(same) == {"centroids"}
    restore(fresh, {name: rows[name].clone() for name in rows}, {name: same[name].clone() for name in same})
    assert same_memory(state.memory, fresh.memory)
    for step in range(1, 20):
        features = torch.randn(2, 2, generator=torch.Generator().manual_seed(step))
        for each in (state, fresh):
            odc.update(each, torch.tensor([step % 6, 5]), features, step)
    assert same_memory(state.memory, fresh.memory)


def test_an_accelerator_s_answer_on_its_way_is_stored_and_put_back_there_only(monkeypatch):
    state, back = start(), []
    monkeypatch.setattr(state.watch.reader, "pending", lambda: torch.tensor(True))
    monkeypatch.setattr(state.watch.reader, "restore_pending", back.append)
    rows, same = stored(state)
    assert same["small_pending"]
    restore(state, rows, same)
    assert back == []  # on a CPU the answer is that of the step itself
    monkeypatch.setattr("odcft.distributed.accelerator.ASYNCHRONOUS", ("meta",))  # stands for an accelerator
    state.memory.features_SD = state.memory.features_SD.to("meta")
    made = SimpleNamespace(counts_K=torch.zeros(2))
    monkeypatch.setattr(memory, "new_memory", lambda *args, **how: made)
    restore(state, rows, {"centroids": same["centroids"]})
    assert back == []
    state.memory = SimpleNamespace(features_SD=torch.empty(6, 2, device="meta"))
    restore(state, rows, same)
    assert back == [same["small_pending"]]


# ---------------------------------------------------------------- any number of ranks


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_end_with_the_memory_of_one(on_threads, ranks):
    images, K = 61, 6
    draw = torch.Generator().manual_seed(0)
    features, labels = torch.randn(images, 4, generator=draw), torch.randint(4, (images,), generator=draw)
    batches = [(torch.randint(images, (9,), generator=draw), torch.randn(9, 4, generator=draw)) for _ in range(12)]

    def work():
        mine = list(ownership.my_images(images))
        state = odc.start(features[mine], labels[mine], plan(K, 3, centroid_interval=2))
        for step, (image_B, features_BD) in enumerate(batches):
            own_B = image_B % dist.world_size() == dist.rank()
            odc.update(state, image_B[own_B] // dist.world_size(), features_BD[own_B], step)
        rows, same = stored(state)
        fresh = odc.start(features[mine], labels[mine], plan(K))
        restore(fresh, rows, same)
        assert same_memory(state.memory, fresh.memory)
        return state.memory

    alone = work()
    for rank, part in enumerate(on_threads(ranks, work)):
        assert torch.equal(part.features_SD, alone.features_SD[rank::ranks])
        assert torch.equal(part.labels_S, alone.labels_S[rank::ranks])
        assert torch.equal(part.sizes_K, alone.sizes_K)
        assert torch.equal(part.centroids_KD, alone.centroids_KD)
