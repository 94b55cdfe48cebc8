import pytest
import torch

from odcft.clustering import nearest as module
from odcft.clustering.nearest import ClusterSums, NearestByBounds, NearestByScores

CORNERS = torch.tensor([[0.0, 0], [10, 0], [0, 10], [10, 10]])


def bunches(count):
    draw = torch.Generator().manual_seed(0)
    return CORNERS.repeat_interleave(count, 0) + torch.rand(4 * count, 2, generator=draw) - 0.5


def test_sums_follow_the_labels_and_do_not_drift():
    draw = torch.Generator().manual_seed(0)
    features, labels = torch.randn(500, 6, generator=draw), torch.randint(7, (500,), generator=draw).int()
    sums = ClusterSums(torch.empty(7, 6))
    sums.add(features, labels)
    for _ in range(20):
        row, label = torch.randint(500, (1,), generator=draw), torch.randint(7, (1,), generator=draw).int()
        sums.add(features[row], label, labels[row])
        labels[row] = label
    again = ClusterSums(torch.empty(7, 6))
    again.add(features.half().float().add(features - features.half().float()), labels)
    assert torch.equal(sums.sums_KD, again.sums_KD)
    assert torch.equal(sums.counts_K, torch.bincount(labels, minlength=7))
    assert torch.allclose(sums.sums_KD[3] * module.UNIT, features[labels == 3].double().sum(0), atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 9])
def test_by_scores_and_by_bounds_agree_where_rows_are_equally_near(k):
    """The lower number wins, on whole numbers and where centroids are the same."""
    draw = torch.Generator().manual_seed(k)
    features = torch.randint(-2, 3, (300, 2), generator=draw).float()
    centroids = torch.randint(-2, 3, (k, 2), generator=draw).float()
    one, other = NearestByBounds(features, centroids), NearestByScores(features, centroids, 70)
    for _ in range(5):
        expected = (features.unsqueeze(1) - centroids).norm(dim=2).min(1)
        for found in (one, other):
            assert torch.equal(found.label_S, expected.indices.int())
            assert torch.allclose(found.distances(), expected.values)
            assert torch.equal(found.sums.counts_K, torch.bincount(expected.indices, minlength=k))
        assert torch.equal(one.sums.sums_KD, other.sums.sums_KD)
        before = one.label_S.clone()
        centroids = torch.randint(-2, 3, (k, 2), generator=draw).float()
        changed = [int(found.follow(centroids)) for found in (one, other)]
        assert changed == [int((one.label_S != before).sum())] * 2


# ---------------------------------------------------------------- what bounds promise


def distances(nearest, centroids):
    return (nearest.features_SD.double().unsqueeze(1) - centroids.double()).norm(dim=2)


def others(nearest, centroids):
    return distances(nearest, centroids).scatter(1, nearest.label_S.long().unsqueeze(1), torch.inf).amin(1)


def check(nearest, centroids):
    """Labels are the nearest; the bound is one, to well within the margin."""
    rounding = 1e-5 + nearest.margin / 10
    all_SK = distances(nearest, centroids)
    own_S = all_SK.gather(1, nearest.label_S.long().unsqueeze(1))[:, 0]
    assert (own_S <= all_SK.amin(1) + 1e-5).all()
    assert torch.allclose(nearest.distances(), own_S.float(), atol=1e-5)
    assert (nearest.others_S <= others(nearest, centroids) + rounding).all()


@pytest.fixture
def exact(monkeypatch):
    """Scores in float32, whatever the processor multiplies."""
    monkeypatch.setattr(module, "_coarse_dtype", lambda: torch.float32)


@pytest.fixture
def searched(monkeypatch, exact):
    """How many rows were compared with all centroids, by call."""
    rows, search = [], NearestByBounds._search
    monkeypatch.setattr(
        NearestByBounds, "_search", lambda self, row_S: (rows.append(len(row_S)), search(self, row_S))[1]
    )
    return rows


@pytest.mark.parametrize("coarse", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 2, 3, 12, 70])
@pytest.mark.parametrize("compared", [0, 1, 2, 64])
def test_bounds_hold_however_centroids_move(monkeypatch, coarse, k, compared):
    monkeypatch.setattr(module, "_coarse_dtype", lambda: coarse)
    monkeypatch.setattr(NearestByBounds, "_how_many_to_compare", lambda *args: min(compared, k - 1))
    draw = torch.Generator().manual_seed(k)
    centroids = torch.randn(k, 3, generator=draw)
    nearest = NearestByBounds(torch.randn(150, 3, generator=draw), centroids)
    check(nearest, centroids)
    for step in range(12):
        pace = torch.tensor([0.0, 0.01, 1.0])[torch.randint(3, (k, 1), generator=draw)] * (step != 5)
        centroids = centroids + pace * torch.randn(k, 3, generator=draw)
        nearest.follow(centroids)
        check(nearest, centroids)


@pytest.mark.parametrize("coarse", [torch.float32, torch.bfloat16])
def test_rows_near_the_border_change_sides_with_it(monkeypatch, coarse):
    """They lie closer to each other than the margin of the bounds, and the border passes them one by one."""
    monkeypatch.setattr(module, "_coarse_dtype", lambda: coarse)
    features = torch.linspace(-1, 1, 4001).unsqueeze(1)
    centroids = torch.tensor([[-0.5], [0.5]])
    nearest = NearestByBounds(features, centroids)
    for _ in range(40):
        centroids = centroids + torch.tensor([[2e-4], [1e-4]])
        nearest.follow(centroids)
        far = features[:, 0] - centroids.mean()
        clear = far.abs() > 1e-6
        assert torch.equal(nearest.label_S[clear], (far > 0).long()[clear])


def test_fresh_bounds_are_the_distances(exact):
    draw = torch.Generator().manual_seed(0)
    features, centroids = torch.randn(200, 4, generator=draw) / 10, torch.randn(40, 4, generator=draw) / 10
    nearest = NearestByBounds(features, centroids)
    own = distances(nearest, centroids).amin(1).float()
    assert torch.allclose(nearest.distances(), own, atol=1e-4)
    assert torch.allclose(nearest.others_S, others(nearest, centroids).float(), atol=1e-3)
    assert nearest.margin == pytest.approx(1e-3 * float(((features - centroids.mean(0)) ** 2).sum(1).mean() ** 0.5))


def test_bounds_of_coarse_scores_are_exact_where_two_centroids_are_candidates(monkeypatch):
    """Two centroids are close, and a third is far: which of the two is the second is known to float32."""
    monkeypatch.setattr(module, "_coarse_dtype", lambda: torch.bfloat16)
    centroids = torch.tensor([[1.001, 0.3], [1.0, 0.3], [-3, -1]])
    nearest = NearestByBounds(torch.tensor([[1.1, 0.7], [0.2, -0.4]]), centroids)
    assert nearest.label_S.tolist() == [0, 1]
    assert torch.allclose(nearest.others_S.double(), others(nearest, centroids), atol=1e-5)


def test_a_row_far_from_close_centroids_has_a_lower_bound_in_coarse_numbers_too(monkeypatch):
    """Rounding moves the row, not the centroids: what it is moved by must not make it farther."""
    monkeypatch.setattr(module, "_coarse_dtype", lambda: torch.bfloat16)
    centroids = torch.tensor([[-(2.0**-10), 0], [2.0**-10, 0]])
    features = torch.tensor([[10 + 1 / 33, 0.0], [-7 - 1 / 33, 5 + 1 / 65], [3.01, -4.01]])
    check(NearestByBounds(features, centroids), centroids)


def test_rows_are_searched_again_only_where_bounds_meet(searched, monkeypatch):
    features = bunches(100)
    nearest = NearestByBounds(features, CORNERS)
    nearest.follow(CORNERS)
    nearest.follow(CORNERS + 0.1)
    assert searched == [400, 0, 0]
    for step in range(60):  # there and back again: bounds are worn out, and made exact without a search
        nearest.follow(CORNERS + 0.3 * (step % 2))
    check(nearest, CORNERS + 0.3)
    assert sum(searched[1:]) < 1200  # of 24,000


def test_centroids_that_move_much_are_compared_alone(searched, monkeypatch):
    """Three of thirty rush about far away from all rows; the others stand still, and so do the rows' bounds."""
    monkeypatch.setattr(module, "COMPARED", (0, 3))
    monkeypatch.setattr(module, "FIXED", 0)
    compared, compare = [], NearestByBounds._compare_with
    monkeypatch.setattr(
        NearestByBounds,
        "_compare_with",
        lambda self, some_K, rows: (compared.append(some_K), compare(self, some_K, rows)),
    )
    centroids = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    centroids[:3] += 100
    nearest = NearestByBounds(centroids[3:] + 0.05, centroids)
    for _ in range(4):
        centroids = centroids.clone()
        centroids[:3] += 20
        nearest.follow(centroids)
        check(nearest, centroids)
    assert [sorted(some_K.tolist()) for some_K in compared] == [[0, 1, 2]] * 4
    assert searched == [27, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("moved", "slack", "compared"),
    [
        ([0.5] * 100, 0.4, 0),  # whatever is compared, all rows are searched
        ([0.3] * 100, 0.4, 0),  # no row is searched anyway
        ([0.5] * 10 + [0.3] * 90, 0.4, 16),
        ([0.5] * 20 + [0.3] * 80, 0.4, 24),
        ([0.5] * 60 + [0.3] * 40, 0.4, 0),  # to compare with so many would take as long as to search
    ],
)
def test_so_many_fast_centroids_are_compared_as_is_the_least_work(moved, slack, compared):
    nearest = NearestByBounds(torch.randn(50, 2), torch.randn(100, 2))
    nearest.others_S[:] = 1
    assert nearest._how_many_to_compare(torch.tensor(moved), torch.full((50,), 1 - slack)) == compared


def test_a_row_s_own_fast_centroid_is_none_of_the_others(searched, monkeypatch):
    """Of two, the faster is the row's own: its distance says nothing about the other one."""
    monkeypatch.setattr(NearestByBounds, "_how_many_to_compare", lambda *args: 1)
    centroids = torch.tensor([[0.0, 0], [100, 0]])
    nearest = NearestByBounds(torch.tensor([[1.0, 0]]), centroids)
    nearest.follow(centroids + torch.tensor([[0.0, 10], [0, 0]]))
    assert nearest.others_S.tolist() == pytest.approx([99], abs=0.1)
    assert searched == [1, 0]


@pytest.mark.parametrize(("scores", "pieces"), [(1, [1] * 7), (64, [2, 2, 2, 1]), (1 << 21, [7])])
def test_search_takes_so_many_rows_at_a_time_that_scores_stay_few(monkeypatch, scores, pieces):
    monkeypatch.setattr(module, "SCORES", scores)
    rows, search = [], NearestByBounds._search_rows
    monkeypatch.setattr(
        NearestByBounds, "_search_rows", lambda self, row_B: (rows.append(len(row_B)), search(self, row_B))
    )
    NearestByBounds(torch.randn(7, 2), CORNERS)  # padded to 32
    assert rows == pieces


def test_candidates_are_those_within_twice_the_error_of_the_best(monkeypatch, exact):
    """Either score may be wrong by the error: by 0.1 here, where scores are 0, -0.15, -0.19, -0.25 and less."""
    centroids = torch.tensor([0.0, 0.15, 0.19, 0.25, 0.8]).mul(2).sqrt().unsqueeze(1)
    nearest = NearestByBounds(torch.zeros(1, 1), centroids)
    nearest._error = lambda row_B: torch.full((len(row_B),), 0.1)
    candidates, squares = [], NearestByBounds._squares
    monkeypatch.setattr(
        NearestByBounds,
        "_squares",
        lambda self, b_C, row_B, k_C: (candidates.append(sorted(k_C.tolist())), squares(self, b_C, row_B, k_C))[1],
    )
    nearest._search(torch.tensor([0]))
    assert candidates == [[0, 1, 2]]


def test_rounding_and_lengths_are_bounds_of_what_rounding_does(monkeypatch):
    monkeypatch.setattr(module, "_coarse_dtype", lambda: torch.bfloat16)
    nearest = NearestByBounds(torch.zeros(1, 3), torch.zeros(2, 3))
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
    monkeypatch.setattr(module, "_coarse_dtype", lambda: torch.bfloat16)
    row, centroid = 1 + 5 / 128, 1 + 13 / 128
    nearest = NearestByBounds(torch.tensor([[row]]), torch.tensor([[centroid], [-centroid]]))
    true, coarse = row * centroid, float(nearest._coarse_products(torch.tensor([0]), nearest.coarse_CD)[0, 0])
    assert 0.003 < abs(coarse - true) / true <= float(nearest._error(torch.tensor([0]))) / true < 0.0045
    draw = torch.Generator().manual_seed(0)
    features, centroids = torch.randn(300, 16, generator=draw) + 1, torch.randn(40, 16, generator=draw)
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(module, "_coarse_dtype", lambda dtype=dtype: dtype)
        nearest = NearestByBounds(features, centroids)
        true = (features.double() - nearest.centre_D) @ (centroids.double() - nearest.centre_D).T
        coarse = nearest._coarse_products(torch.arange(300), nearest.coarse_CD[:40]).double()
        error = nearest._error(torch.arange(300))
        assert ((coarse - true).abs() <= error.unsqueeze(1)).all()
        assert error.max() < (0.03 if dtype == torch.bfloat16 else 1e-5) * nearest.length_S.max() * 6


@pytest.mark.parametrize("fast", [True, False])
def test_scores_are_of_bfloat16_where_the_device_multiplies_it(monkeypatch, fast):
    monkeypatch.setattr(module, "has_bfloat16", lambda device: fast)
    assert module._coarse_dtype() == (torch.bfloat16 if fast else torch.float32)
