import sys
import threading
import types
from collections import Counter

import pytest
import torch

from odcft.clustering import kmeans as module
from odcft.clustering.kmeans import _Nearest, assign, kmeans
from odcft.distributed import ownership

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


@pytest.mark.parametrize("coarse", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_what_is_left_out_changes_nothing(coarse, spread, offset, monkeypatch):
    """Bounds, coarse scores and the few fastest centroids come to what comparing everything comes to."""
    monkeypatch.setattr("odcft.clustering.kmeans._coarse_dtype", lambda device: coarse)
    monkeypatch.setattr("odcft.clustering.kmeans.FASTEST", 8)
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
    followed, follow = [], _Nearest.follow
    monkeypatch.setattr(_Nearest, "follow", lambda *args: (followed.append(1), follow(*args)))
    kmeans(bunches(), 4, 0, 1000)
    assert len(followed) < 20


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_come_to_the_centroids_of_one(on_threads, monkeypatch, ranks):
    """On whole numbers many rows are equally far, and equally near; one rank may have no row at all."""
    monkeypatch.setattr(module, "ROWS", 3)
    for seed in range(40):
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
    monkeypatch.setattr(module, "PIECE", 64)
    monkeypatch.setattr(module, "SCORES", 64 * 32)
    features = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    alone = kmeans(features, 20, 0)
    seen, search = set(), _Nearest._search_rows
    monkeypatch.setattr(
        _Nearest,
        "_search_rows",
        lambda self, row_B: (seen.add((threading.get_ident(), torch.get_num_threads())), search(self, row_B))[1],
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(kmeans(features, 20, 0), alone)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert {number for _, number in seen} == {2 if threads == 16 else 1}  # at most eight share the cores
    assert (threads > 1) == (threading.get_ident() not in {thread for thread, _ in seen})


# ---------------------------------------------------------------- what bounds promise


def distances(nearest, centroids):
    return (nearest.features_SD.double().unsqueeze(1) - centroids.double()).norm(dim=2)


def others(nearest, centroids):
    return distances(nearest, centroids).scatter(1, nearest.label_S.unsqueeze(1), torch.inf).amin(1)


def check(nearest, centroids):
    """Labels are the nearest; the upper bound is one, and so is the lower, to well within the margin."""
    rounding = 1e-5 + nearest.margin / 10
    all_SK = distances(nearest, centroids)
    own_S = all_SK.gather(1, nearest.label_S.unsqueeze(1))[:, 0]
    assert (own_S <= all_SK.amin(1) + 1e-5).all()
    assert (nearest.distance_S >= own_S - rounding).all()
    assert (nearest.others_S <= others(nearest, centroids) + rounding).all()


@pytest.fixture
def exact(monkeypatch):
    """Scores in float32, whatever the processor multiplies."""
    monkeypatch.setattr(module, "_coarse_dtype", lambda device: torch.float32)


@pytest.fixture
def searched(monkeypatch, exact):
    """How many rows were compared with all centroids, by call."""
    rows, search = [], _Nearest._search
    monkeypatch.setattr(_Nearest, "_search", lambda self, row_S: (rows.append(len(row_S)), search(self, row_S))[1])
    return rows


@pytest.mark.parametrize("coarse", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 2, 3, 12, 70])
@pytest.mark.parametrize("fastest", [1, 2, 64])
def test_bounds_hold_however_centroids_move(monkeypatch, coarse, k, fastest):
    monkeypatch.setattr(module, "_coarse_dtype", lambda device: coarse)
    monkeypatch.setattr(module, "FASTEST", fastest)
    draw = torch.Generator().manual_seed(k)
    centroids = torch.randn(k, 3, generator=draw)
    nearest = _Nearest(torch.randn(150, 3, generator=draw), centroids)
    check(nearest, centroids)
    for step in range(12):
        pace = torch.tensor([0.0, 0.01, 1.0])[torch.randint(3, (k, 1), generator=draw)] * (step != 5)
        centroids = centroids + pace * torch.randn(k, 3, generator=draw)
        nearest.follow(centroids)
        check(nearest, centroids)


@pytest.mark.parametrize("coarse", [torch.float32, torch.bfloat16])
def test_rows_near_the_border_change_sides_with_it(monkeypatch, coarse):
    """They lie closer to each other than the margin of the bounds, and the border passes them one by one."""
    monkeypatch.setattr(module, "_coarse_dtype", lambda device: coarse)
    features = torch.linspace(-1, 1, 4001).unsqueeze(1)
    centroids = torch.tensor([[-0.5], [0.5]])
    nearest = _Nearest(features, centroids)
    for _ in range(40):
        centroids = centroids + torch.tensor([[2e-4], [1e-4]])
        nearest.follow(centroids)
        far = features[:, 0] - centroids.mean()
        clear = far.abs() > 1e-6
        assert torch.equal(nearest.label_S[clear], (far > 0).long()[clear])


def test_fresh_bounds_are_the_distances(exact):
    draw = torch.Generator().manual_seed(0)
    features, centroids = torch.randn(200, 4, generator=draw) / 10, torch.randn(40, 4, generator=draw) / 10
    nearest = _Nearest(features, centroids)
    own = distances(nearest, centroids).amin(1).float()
    assert torch.allclose(nearest.distance_S, own, atol=1e-4)
    assert torch.allclose(nearest.others_S, others(nearest, centroids).float(), atol=1e-3)
    assert nearest.margin == pytest.approx(1e-3 * float((features**2).sum(1).mean() ** 0.5))
    moved = centroids + torch.randn(40, 4, generator=draw) / 100
    nearest._set_centroids(moved)
    nearest.measure(torch.arange(0, 200, 3))
    own = distances(nearest, moved).gather(1, nearest.label_S.unsqueeze(1))[:, 0].float()
    assert torch.allclose(nearest.distance_S[::3], own[::3], atol=1e-4)


def test_a_row_far_from_close_centroids_has_a_lower_bound_in_coarse_numbers_too(monkeypatch):
    """Rounding moves the row, not the centroids: what it is moved by must not make it farther."""
    monkeypatch.setattr(module, "_coarse_dtype", lambda device: torch.bfloat16)
    centroids = torch.tensor([[-(2.0**-10), 0], [2.0**-10, 0]])
    features = torch.tensor([[10 + 1 / 33, 0.0], [-7 - 1 / 33, 5 + 1 / 65], [3.01, -4.01]])
    check(_Nearest(features, centroids), centroids)


def test_rows_are_searched_again_only_where_bounds_meet(searched, monkeypatch):
    features = bunches(100)
    nearest = _Nearest(features, CORNERS)
    nearest.follow(CORNERS)
    nearest.follow(CORNERS + 0.1)
    assert searched == [400, 0, 0]
    for step in range(60):  # there and back again: bounds are worn out, and made exact without a search
        nearest.follow(CORNERS + 0.3 * (step % 2))
    check(nearest, CORNERS + 0.3)
    assert sum(searched[1:]) < 1200  # of 24,000


def test_centroids_that_move_much_are_compared_alone(searched, monkeypatch):
    """Three of thirty rush about far away from all rows; the others stand still, and so do the rows' bounds."""
    monkeypatch.setattr(module, "FASTEST", 3)
    compared, compare = [], _Nearest._compare_with
    monkeypatch.setattr(
        _Nearest, "_compare_with", lambda self, some_K, rows: (compared.append(some_K), compare(self, some_K, rows))
    )
    centroids = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    centroids[:3] += 100
    nearest = _Nearest(centroids[3:] + 0.05, centroids)
    for _ in range(4):
        centroids = centroids.clone()
        centroids[:3] += 20
        nearest.follow(centroids)
        check(nearest, centroids)
    assert [sorted(some_K.tolist()) for some_K in compared] == [[0, 1, 2]] * 4
    assert searched == [27, 0, 0, 0, 0]


def test_a_row_s_own_fast_centroid_is_none_of_the_others(searched):
    """Of two, the faster is the row's own: its distance says nothing about the other one."""
    centroids = torch.tensor([[0.0, 0], [100, 0]])
    nearest = _Nearest(torch.tensor([[1.0, 0]]), centroids)
    nearest.follow(centroids + torch.tensor([[0.0, 10], [0, 0]]))
    assert nearest.others_S.tolist() == pytest.approx([99], abs=0.1)
    assert searched == [1, 0]


@pytest.mark.parametrize(("scores", "pieces"), [(1, [1] * 7), (64, [2, 2, 2, 1]), (1 << 21, [7])])
def test_search_takes_so_many_rows_at_a_time_that_scores_stay_few(monkeypatch, scores, pieces):
    monkeypatch.setattr(module, "SCORES", scores)
    rows, distance = [], _Nearest._distance
    monkeypatch.setattr(
        _Nearest, "_distance", lambda self, row_B, score_B: (rows.append(len(row_B)), distance(self, row_B, score_B))[1]
    )
    _Nearest(torch.randn(7, 2), CORNERS)  # one group of 32 centroids
    assert rows == pieces


def test_candidates_are_those_within_twice_the_error_of_the_best(monkeypatch, exact):
    """Either score may be wrong by the error: by 0.1 here, where scores are 0, -0.15, -0.19, -0.25 and less."""
    centroids = torch.tensor([0.0, 0.15, 0.19, 0.25, 0.8]).mul(2).sqrt().unsqueeze(1)
    nearest = _Nearest(torch.zeros(1, 1), centroids)
    nearest.error_S[:] = 0.1
    candidates, score = [], _Nearest._score
    monkeypatch.setattr(
        _Nearest,
        "_score",
        lambda self, row_B, k_B: (candidates.append(sorted(k_B.tolist())), score(self, row_B, k_B))[1],
    )
    nearest._search(torch.tensor([0]))
    assert candidates == [[0, 1, 2]]


def test_rounding_and_lengths_are_bounds_of_what_rounding_does(monkeypatch):
    monkeypatch.setattr(module, "_coarse_dtype", lambda device: torch.bfloat16)
    nearest = _Nearest(torch.zeros(1, 3), torch.zeros(2, 3))
    rows = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    coarse, length, rounding = nearest._round(rows)
    assert torch.allclose(rounding, (rows - coarse.float()).norm(dim=1))
    assert rounding.max() < 0.02
    true = torch.maximum(rows.norm(dim=1), coarse.float().norm(dim=1))
    assert (length >= true - 1e-6).all()
    assert (length <= true + 2 * rounding + 1e-6).all()


def test_error_is_a_bound_of_coarse_scores_and_not_much_more(monkeypatch):
    """Numbers of seven binary places are coarse already: what is wrong then is the last place of their product.

    (1 + 5/128) (1 + 13/128) = 1 + 18/128 + 65/16384, which 8 digits round by nearly half of their last place.
    """
    monkeypatch.setattr(module, "_coarse_dtype", lambda device: torch.bfloat16)
    row, centroid = 1 + 5 / 128, 1 + 13 / 128
    nearest = _Nearest(torch.tensor([[row]]), torch.tensor([[centroid], [-centroid]]))
    true, coarse = row * centroid, float(nearest.coarse_SD[0] @ nearest.coarse_CD[0])
    assert 0.003 < abs(coarse - true) / true <= float(nearest.error_S) / true < 0.0045
    draw = torch.Generator().manual_seed(0)
    features, centroids = torch.randn(300, 16, generator=draw) + 1, torch.randn(40, 16, generator=draw)
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(module, "_coarse_dtype", lambda device, dtype=dtype: dtype)
        nearest = _Nearest(features, centroids)
        true = (features.double() - nearest.centre_D) @ (centroids.double() - nearest.centre_D).T
        coarse = (nearest.coarse_SD @ nearest.coarse_CD[:40].T).double()
        assert ((coarse - true).abs() <= nearest.error_S.unsqueeze(1)).all()
        assert nearest.error_S.max() < (0.03 if dtype == torch.bfloat16 else 1e-5) * nearest.length_S.max() * 6


@pytest.mark.parametrize("fast", [True, False])
def test_scores_are_of_bfloat16_where_the_device_multiplies_it(monkeypatch, fast):
    monkeypatch.setattr(module, "has_bfloat16", lambda device: fast)
    assert module._coarse_dtype(torch.device("cpu")) == (torch.bfloat16 if fast else torch.float32)


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
