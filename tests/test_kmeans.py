import pytest
import torch

from odcft.clustering import assign, kmeans

CORNERS = torch.tensor([[0.0, 0], [10, 0], [0, 10], [10, 10]])


def bunches(count=25, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return CORNERS.repeat_interleave(count, 0) + torch.rand(4 * count, 2, generator=draw) - 0.5


def inertia(features, centroids):
    return float(assign(features, centroids)[1].sum())


def test_assign_finds_the_nearest_and_how_far_it_is():
    labels, distances = assign(torch.tensor([[1.0, 0], [9, 10]]), CORNERS)
    assert labels.tolist() == [0, 3]
    assert distances.tolist() == pytest.approx([1, 1])


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
    """Nothing but the definition; empty clusters take the rows that lie farthest from their centroids."""
    features = features.double()
    centroids = features[torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:k]]
    for _ in range(iterations):
        distances, labels = torch.cdist(features, centroids).min(1)
        empty = torch.bincount(labels, minlength=k) == 0
        centroids = torch.stack([features[labels == c].mean(0) for c in range(k)])
        centroids[empty] = features[distances.topk(int(empty.sum())).indices]
    return centroids.float()


@pytest.mark.parametrize("coarse", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_what_is_left_out_changes_nothing(coarse, spread, offset, monkeypatch):
    """Bounds, coarse scores and the few fastest centroids come to what comparing everything comes to."""
    monkeypatch.setattr("odcft.clustering._coarse_dtype", lambda device: coarse)
    monkeypatch.setattr("odcft.clustering.FASTEST", 8)
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
