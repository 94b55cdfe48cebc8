import sys
import threading
import types
from collections import Counter

import pytest
import torch

from odcft.clustering import kmeans as module
from odcft.clustering import nearest
from odcft.clustering.kmeans import assign, kmeans
from odcft.clustering.nearest import NearestByBounds, NearestByScores
from odcft.distributed import accelerator, ownership
from tests.step_counters import Counters

CORNERS = torch.tensor([[0.0, 0], [10, 0], [0, 10], [10, 10]])


def bunches(count=25, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return CORNERS.repeat_interleave(count, 0) + torch.rand(4 * count, 2, generator=draw) - 0.5


def inertia(features, centroids):
    return float(assign(features, centroids)[1].sum())


def test_assign_finds_the_nearest_and_how_far_it_is():
    labels, distances = assign(torch.tensor([[1.0, 0], [9, 10], [0, 9.5], [10, 0]]), CORNERS)
    assert labels.tolist() == [0, 3, 2, 1]
    assert distances.tolist() == [1, 1, 0.25, 0]


@pytest.mark.parametrize("engine", ["torch", "faiss"])
def test_centroids_are_the_means_of_the_bunches(engine):
    features = bunches()
    best = min((kmeans(features, 4, seed, engine=engine) for seed in range(8)), key=lambda c: inertia(features, c))
    expected = torch.stack([part.mean(0) for part in features.split(25)])
    assert torch.allclose(best[best.sum(1).argsort()].sum(0), expected.sum(0), atol=1e-4)
    assert inertia(features, best) == pytest.approx(inertia(features, expected), rel=1e-4)


def test_same_seed_same_centroids():
    features = torch.randn(300, 8)
    assert torch.equal(kmeans(features, 10, 1), kmeans(features, 10, 1))
    assert not torch.equal(kmeans(features, 10, 1), kmeans(features, 10, 2))


def test_iterations_never_make_it_worse():
    features = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    curve = [inertia(features, kmeans(features, 12, 0, iterations)) for iterations in (1, 2, 4, 8, 16)]
    assert curve == sorted(curve, reverse=True)


@pytest.mark.parametrize("seed", range(10))
def test_no_cluster_is_empty(seed):
    """Most images are the same, so that several starts fall on one place and all but one of them lose every image."""
    draw = torch.Generator().manual_seed(seed)
    features = torch.cat([torch.zeros(80, 4), torch.randn(20, 4, generator=draw)])
    labels = assign(features, kmeans(features, 12, seed))[0]
    assert torch.bincount(labels, minlength=12).min() > 0


def lloyd(features, k, seed, iterations):
    """Nothing but the definition; empty clusters take the rows that lie farthest from their centroids.

    Where some are empty at the end, up to ten iterations more try to fill them. None where two rows are equally far.
    """
    features = features.double()
    centroids = features[torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:k]]
    for iteration in range(iterations + 10):
        distances, labels = torch.cdist(features, centroids, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        empty = torch.bincount(labels, minlength=k) == 0
        if iteration >= iterations and not empty.any():
            break
        centroids = torch.stack([features[labels == c].mean(0) for c in range(k)])
        far = distances.topk(min(len(features), int(empty.sum())))
        centroids[empty] = features[far.indices]
        differ = distances.sort(descending=True).values[: int(empty.sum()) + 1].diff()
        if (differ > -1e-4).any():
            return None
    return centroids.float()


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    """The CPU is given what an accelerator does, with some rows at a time."""

    def use(rows):
        monkeypatch.setattr(
            module, "NearestByBounds", lambda features, centroids, *_: NearestByScores(features, centroids, rows)
        )

    return use


@pytest.mark.parametrize("coarse", [torch.float32, torch.bfloat16, "accelerator"])
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_what_is_left_out_changes_nothing(coarse, spread, offset, monkeypatch, as_on_an_accelerator):
    """Bounds, coarse scores and the few fastest centroids come to what comparing everything comes to."""
    if coarse == "accelerator":
        as_on_an_accelerator(300)
    monkeypatch.setattr(nearest, "_coarse_dtype", lambda: coarse)
    monkeypatch.setattr(nearest, "FIXED", 0)  # else no centroids are compared where there are only 70
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(70, 24, generator=draw)
    features = centres.repeat(40, 1) + spread * torch.randn(2800, 24, generator=draw) + offset
    for iterations in (1, 3, 12):
        assert torch.allclose(kmeans(features, 70, 1, iterations), lloyd(features, 70, 1, iterations), atol=1e-4)


@pytest.mark.parametrize("k", [1, 2, 100])
def test_any_number_of_clusters(k):
    features = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    labels = assign(features, kmeans(features, k, 0))[0]
    assert torch.bincount(labels, minlength=k).min() > 0


def test_features_are_not_changed():
    features = bunches()
    before = features.clone()
    kmeans(features, 4, 0)
    assert torch.equal(features, before)


def small_sets(count):
    """Few rows and many clusters; in every second set many rows are the same. Clusters become empty all the time."""
    for seed in range(count):
        draw = torch.Generator().manual_seed(seed)
        S = int(torch.randint(8, 40, (), generator=draw))
        features = torch.randn(S, 2, generator=draw) * torch.tensor([1.0, 3.0])
        if seed % 2:
            features[: S // 3] = features[0].clone()
        yield seed, features, int(torch.randint(2, S // 2 + 1, (), generator=draw))


def test_empty_clusters_take_the_farthest_rows():
    compared = 0
    for seed, features, k in small_sets(100):
        for iterations in (1, 3, 9):
            expected = lloyd(features, k, seed, iterations)
            if expected is not None:
                compared += 1
                assert torch.allclose(kmeans(features, k, seed, iterations), expected, atol=1e-4), (seed, iterations)
    assert compared > 250


def test_clusters_that_cannot_be_filled_are_given_up_after_ten_more_iterations(monkeypatch):
    tried, fill = [], module._fill_empty
    monkeypatch.setattr(module, "_fill_empty", lambda *args: (tried.append(1), fill(*args)))
    features = torch.tensor([[0.0, 0]] * 5 + [[1.0, 1]] * 5)  # two different rows for three clusters
    centroids = kmeans(features, 3, 0, 4)
    assert len(tried) == 14
    assert centroids.unique(dim=0).tolist() == [[0, 0], [1, 1]]


def test_iterations_end_where_nothing_moves_any_more(monkeypatch):
    followed, follow = [], NearestByBounds.follow
    monkeypatch.setattr(NearestByBounds, "follow", lambda *args: (followed.append(1), follow(*args))[1])
    kmeans(bunches(), 4, 0, 1000)
    assert len(followed) < 20


@pytest.mark.parametrize("by_scores", [True, False])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_come_to_the_centroids_of_one(on_threads, monkeypatch, as_on_an_accelerator, ranks, by_scores):
    """On whole numbers many rows are equally far, and equally near; one rank may have no row at all."""
    monkeypatch.setattr(nearest, "PIECE", 8)
    if by_scores:
        as_on_an_accelerator(5)
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        features = torch.randint(-2, 3, (24, 2), generator=draw).float()
        if seed % 2:
            features[:14] = features[0].clone()
        k = 5 + seed % 6
        alone = kmeans(features, k, seed, 3)
        for part in on_threads(
            ranks, lambda f=features, k=k, s=seed: kmeans(f[list(ownership.my_images(24))], k, s, 3)
        ):
            assert torch.equal(part, alone), seed
    features = torch.tensor([[0.0, 0], [4, 3]])[:ranks]
    for part in on_threads(ranks, lambda: kmeans(features[list(ownership.my_images(2))], 2, 0)):
        assert sorted(part.tolist()) == [[0, 0], [4, 3]]


def test_ranks_that_settle_earlier_go_on_with_the_others(on_threads):
    """Rank 0's rows are one bunch from the start; rank 1's take several iterations to settle."""
    features = torch.stack([torch.full((200,), -50.0), torch.arange(200) ** 2 / 100.0], 1).reshape(-1, 1)
    alone = kmeans(features, 6, 1)
    for part in on_threads(2, lambda: kmeans(features[list(ownership.my_images(400))], 6, 1)):
        assert torch.equal(part, alone)


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_threads_come_to_the_centroids_of_one(monkeypatch, threads):
    """Each takes pieces of the rows, and within a piece no operation waits for other cores."""
    monkeypatch.setattr(nearest, "PIECE", 64)
    monkeypatch.setattr(nearest, "SCORES", 64 * 32)
    features = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    alone = kmeans(features, 20, 0, 8)
    seen, search = set(), NearestByBounds._search_rows
    monkeypatch.setattr(
        NearestByBounds,
        "_search_rows",
        lambda self, row_B: (seen.add((threading.get_ident(), torch.get_num_threads())), search(self, row_B))[1],
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(kmeans(features, 20, 0, 8), alone)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert {number for _, number in seen} == {2 if threads == 16 else 1}  # at most eight share the cores
    assert (threads > 1) == (threading.get_ident() not in {thread for thread, _ in seen})


@pytest.mark.parametrize("rows", [10_000, 7])
def test_on_an_accelerator_the_host_reads_two_numbers_an_iteration_for_any_number_of_pieces(as_on_an_accelerator, rows):
    as_on_an_accelerator(rows)
    features, reads = torch.randn(600, 8, generator=torch.Generator().manual_seed(0)), []
    for iterations in (0, 1, 3):
        with Counters().counting() as counters:
            kmeans(features, 10, 0, iterations)
        reads.append(counters.take()[2])
    assert [count - reads[0] for count in reads] == [0, 2, 6]


def test_an_accelerator_scores_as_many_rows_at_a_time_as_its_memory_allows(monkeypatch):
    cuda = torch.device("cuda", 0)
    for free, rows in ((None, 8192), (1 << 30, 1521), (80 << 30, 65536), (0, 1)):
        monkeypatch.setattr(accelerator, "free_memory", lambda free=free: free)
        assert module._rows_at_a_time(cuda, 10_000, 256) == rows
    assert module._rows_at_a_time(torch.device("cpu"), 10_000, 256) == 8192


# ---------------------------------------------------------------- faiss


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("gpu", [True, False])
def test_faiss_is_given_all_rows_and_takes_no_sample_of_them(on_threads, monkeypatch, ranks, gpu):
    calls = Counter()

    class Kmeans:
        def __init__(self, width, k, **options):
            assert (width, k) == (2, 4)
            assert options.pop("max_points_per_centroid") > 1e9
            assert options == {"niter": 7, "seed": 5, "min_points_per_centroid": 1, "gpu": False}  # rows are on the CPU

        def train(self, rows):
            calls[rows.shape] += 1
            self.centroids = rows[:4] + 1

    faiss = types.SimpleNamespace(Kmeans=Kmeans, **({"StandardGpuResources": None} if gpu else {}))
    monkeypatch.setitem(sys.modules, "faiss", faiss)
    features = bunches()
    parts = on_threads(ranks, lambda: kmeans(features[list(ownership.my_images(100))], 4, 5, 7, engine="faiss"))
    for part in parts:
        assert torch.equal(part, features[: 4 * ranks : ranks] + 1)
    assert calls == {(100, 2): 1}
