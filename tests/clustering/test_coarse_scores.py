"""Labels by coarse scores are those of float32: in every bit, where float32 sums are taken row by row."""

import pytest
import torch

from odcft.clustering import coarse_scores, memory, odc
from odcft.clustering.coarse_scores import coarse_centroids, coarse_is_faster, keep_only, nearest_by_coarse
from odcft.clustering.memory import VARIANTS, coarse_copy, minus_half_squares, nearest_centroid
from odcft.plan import fill_autos
from odcft.recipe import MemoryRecipe, Recipe

PAPER, OFFICIAL = VARIANTS["paper"], VARIANTS["official"]
RULES = pytest.mark.parametrize("rules", [PAPER, OFFICIAL], ids=["paper", "official"])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def coarse_of(centroids, rules):
    return coarse_centroids(centroids, None if rules is OFFICIAL else minus_half_squares(centroids))


def scores(features, centroids, rules):
    """In the dtype of the arguments, row by row."""
    products = (features.unsqueeze(1) * centroids).sum(2)
    return products if rules is OFFICIAL else products + minus_half_squares(centroids)


def off_centre(K, D, draw):
    """Centroids as behind a ReLU: all on one side, and near to each other."""
    return 0.8 * D**-0.5 + 0.2 * torch.randn(K, D, generator=draw) * D**-0.5


@RULES
@pytest.mark.parametrize(("K", "D"), [(1, 64), (31, 7), (64, 64), (150, 64), (1000, 33)])
def test_label_is_the_first_of_the_best_in_float32(monkeypatch, rules, K, D):
    monkeypatch.setattr(coarse_scores, "PIECE", 64)
    monkeypatch.setattr(coarse_scores, "GROUPS", 8)
    draw = generator(K)
    for centroids in (off_centre(K, D, draw), torch.randn(K, D, generator=draw), off_centre(K, D, draw).relu()):
        near = centroids[torch.randint(K, (40,), generator=draw)] + 0.05 * torch.randn(40, D, generator=draw)
        features = torch.cat([near, torch.randn(40, D, generator=draw)])
        found = nearest_by_coarse(features, coarse_of(centroids, rules))
        sure = found < K
        assert sure.float().mean() > 0.9
        assert torch.equal(found[sure], scores(features, centroids, rules).argmax(1)[sure])
        exact = scores(features.double(), centroids.double(), rules)
        lost = exact.amax(1) - exact.gather(1, found.clamp(max=K - 1).unsqueeze(1))[:, 0]
        assert (lost[sure] < 1e-6 * (1 + exact.abs().amax())).all()  # what float32 itself may lose
    assert nearest_by_coarse(features[:0], coarse_of(centroids, rules)).shape == (0,)


@RULES
def test_centroids_that_bfloat16_cannot_tell_apart_are_told_apart(rules):
    """50 bunches of four centroids that differ by about as much as the steps of bfloat16."""
    draw = generator()
    bunches = torch.randn(50, 1, 64, generator=draw)
    centroids = (bunches + 0.004 * torch.randn(50, 4, 64, generator=draw)).flatten(0, 1)
    features = centroids[torch.randperm(200, generator=draw)] * 1.01
    found = nearest_by_coarse(features, coarse_of(centroids, rules))
    expected = scores(features.double(), centroids.double(), rules).argmax(1)
    assert torch.equal(found, expected)
    rounded = features.bfloat16().float()
    assert not torch.equal(scores(rounded, centroids.bfloat16().float(), rules).argmax(1), expected)


@RULES
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-12, 1.0, 1e12, 1e18, 1e30])
def test_huge_and_tiny_numbers_and_equal_centroids(rules, scale):
    """Where all underflows or overflows, there is no label; never a wrong one. Of equal centroids, it is the first."""
    draw = generator()
    centroids = torch.randn(90, 32, generator=draw).repeat(2, 1) * scale
    features = torch.randn(60, 32, generator=draw) * scale
    for f in (features, features.relu() / scale, features * torch.logspace(-20, 10, 60).unsqueeze(1)):
        found = nearest_by_coarse(f, coarse_of(centroids, rules))
        sure = found < 180
        assert (found[sure] < 90).all()
        assert torch.equal(found[sure], scores(f, centroids, rules).argmax(1)[sure])
        assert sure.all() or scale != 1 or f is not features


@RULES
def test_features_that_no_score_can_tell_are_compared_with_all(rules):
    """NaN, infinity, and a collapsed network, whose centroids are all alike: labels as without coarse scores."""
    draw = generator()
    centroids = torch.randint(-2, 3, (300, 8), generator=draw).float()
    features = torch.randint(-2, 3, (40, 8), generator=draw).float()  # whole numbers: many equally near
    features[3, 2], features[5, 0], features[9] = torch.nan, torch.inf, 0
    halves = minus_half_squares(centroids)
    coarse = coarse_of(centroids, rules)
    assert (nearest_by_coarse(features, coarse)[[3, 5]] == 300).all()
    expected = nearest_centroid(features, centroids, halves, rules)
    assert torch.equal(nearest_centroid(features, centroids, halves, rules, coarse), expected)
    same = torch.full((300, 8), 0.3)
    coarse = coarse_of(same, rules)
    assert (nearest_by_coarse(features, coarse) == 300).all()
    assert not nearest_centroid(features, same, minus_half_squares(same), rules, coarse)[10:].any()


@RULES
def test_only_some_centroids_can_be_the_nearest(rules):
    draw = generator()
    centroids, features = off_centre(300, 64, draw), off_centre(100, 64, draw)
    features[::9], halves = torch.nan, minus_half_squares(centroids)
    kept = torch.randperm(300, generator=draw)[:200].sort().values
    coarse = keep_only(coarse_of(centroids, rules), kept)
    assert (nearest_by_coarse(features, coarse)[::9] == 300).all()
    expected = kept[nearest_centroid(features, centroids[kept], halves[kept], rules)]
    assert torch.equal(nearest_centroid(features, centroids, halves, rules, coarse), expected)
    assert not torch.equal(expected, nearest_centroid(features, centroids, halves, rules))


def test_error_bound_holds_and_is_not_far_from_the_errors():
    """A bound that is too wide is slow; twenty times the greatest error of random numbers would be."""
    draw = generator()
    centroids, features = off_centre(500, 64, draw), off_centre(300, 64, draw)
    coarse = coarse_of(centroids, PAPER)
    centred = features - coarse.centre_D
    found = (centred.bfloat16() @ coarse.coarse_PCD[0, :500].T).float() + coarse.bias_PC[0, :500]
    shift = features.double() @ coarse.centre_D.double() - coarse.centre_D.double().square().sum() / 2
    exact = scores(features.double(), centroids.double(), PAPER) - shift.unsqueeze(1)
    off = (found - exact).abs().amax(1)
    bound = coarse_scores.error_of(centred, centred.bfloat16(), coarse)
    assert (off < bound).all()
    assert (bound < 20 * off).all()


def test_coarse_scores_are_for_processors_with_bfloat16_and_many_centroids(monkeypatch):
    for fast in (False, True):
        monkeypatch.setattr(coarse_scores, "has_bfloat16", lambda device, fast=fast: fast)
        assert coarse_is_faster(torch.empty(10_000, 256)) is fast
        assert not coarse_is_faster(torch.empty(1000, 256))
        assert not coarse_is_faster(torch.empty(10_000, 16))
        assert not coarse_is_faster(torch.empty(10_000, 256, device="meta"))  # stands for an accelerator
        assert (coarse_copy(torch.zeros(10_000, 256), torch.zeros(10_000), PAPER) is not None) is fast


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("variant", ["paper", "official"])
def test_memory_is_the_same_with_and_without(monkeypatch, variant, dtype):
    """Through refreshed centroids and small clusters; a coarse copy of older centroids would give other labels."""

    def run(fast):
        monkeypatch.setattr(memory, "coarse_is_faster", lambda centroids_KD: fast)
        draw = generator(1)
        features, labels = torch.randn(600, 16, generator=draw), torch.randint(30, (600,), generator=draw)
        settings = MemoryRecipe(clusters=30, variant=variant, dtype=dtype, centroid_interval=5, min_cluster=10)
        state = odc.start(features, labels, fill_autos(Recipe(memory=settings)))
        changed = 0.0
        for step in range(40):
            rows = torch.randperm(600, generator=draw)[:48]
            changed += float(odc.update(state, rows, torch.randn(48, 16, generator=draw).relu(), step))
            assert fast or state.memory.coarse is None
        assert changed > 1
        return state.memory

    with_coarse, without = run(True), run(False)
    for name in ("features_SD", "labels_S", "sums_KD", "sizes_K", "centroids_KD"):
        assert torch.equal(getattr(with_coarse, name), getattr(without, name))
