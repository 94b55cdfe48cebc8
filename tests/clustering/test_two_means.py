"""Splitting clusters in two by K-Means."""

import random
from collections import Counter
from fractions import Fraction

import pytest
import torch

from odcft.clustering.memory import UNIT
from odcft.clustering.two_means import split_in_two
from odcft.distributed import ownership


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def split_one(features, images, at_least, seed=0, **kwargs):
    direction_1D = torch.randn(1, features.shape[1], generator=generator(seed))
    return split_in_two([features], [images], [at_least], direction_1D, **kwargs)[0]


def cut(numbers, at_least=1, seed=0, **kwargs):
    """Which of these numbers are on the second side; image i is number i."""
    features = torch.tensor(numbers, dtype=torch.float32).reshape(len(numbers), -1)
    second, sums, sizes = split_one(features, torch.arange(len(numbers)), at_least, seed, **kwargs)
    assert sizes == [int((~second).sum()), int(second.sum())]
    assert torch.allclose(sums[0] * UNIT, features[~second].sum(0), atol=1e-4)
    assert torch.allclose(sums[1] * UNIT, features[second].sum(0), atol=1e-4)
    return second.tolist()


def two_means(numbers, direction, at_least, iterations):
    """Two-means on a line by its definition, in fractions; None where rounding may decide.

    It starts from the two sides of the mean; what lies on the border is of the first side; then, where a side has not
    enough, the nearest of the other side join it, of equal ones the first in row (second side: the last).
    """
    border, exact = Fraction(sum(numbers), len(numbers)), True
    second = [direction * (x - border) > 0 for x in numbers]
    for _ in range(iterations):
        if all(second) or not any(second):
            break
        means = []
        for side in (False, True):
            part = [x for x, s in zip(numbers, second, strict=True) if s == side]
            means.append(Fraction(sum(part), len(part)))
        border, direction = sum(means) / 2, means[1] - means[0]
        if border in numbers and any(mean.denominator & (mean.denominator - 1) for mean in means):
            exact = False
        before, second = second, [direction * (x - border) > 0 for x in numbers]
        if second == before:
            break
    wanted = sum(second)
    if wanted < at_least:
        wanted = at_least
    elif len(numbers) - wanted < at_least:
        wanted = len(numbers) - at_least
    order = sorted(range(len(numbers)), key=lambda i: (direction * numbers[i], i))
    if wanted != sum(second):
        second = [i in order[len(order) - wanted :] for i in range(len(numbers))]
    return second if exact else None


@pytest.mark.parametrize("iterations", [0, 1, 2, 20])
def test_cut_on_a_line_is_that_of_two_means(iterations):
    """Border, ties, number of iterations and what is shifted, on 400 small sets of whole numbers."""
    draw, directions, cases = random.Random(0), Counter(), []
    for trial in range(400):
        if trial % 2:
            numbers = [draw.choice([0, 1, 2, 3, 4, 8, 16, 31, 32, 64]) for _ in range(draw.randint(2, 14))]
        else:
            numbers = [round(draw.expovariate(0.01)) for _ in range(draw.randint(15, 40))]  # takes several iterations
        at_least = draw.randint(1, max(1, len(numbers) // draw.choice([2, 5])))
        expected = [two_means(numbers, direction, at_least, iterations) for direction in (-1, 1)]
        if None not in expected and len(set(numbers)) > 1:
            cases.append((numbers, at_least, expected))
    all_numbers, at_least, all_expected = zip(*cases, strict=True)
    features = [torch.tensor(numbers, dtype=torch.float32).unsqueeze(1) for numbers in all_numbers]
    images = [torch.arange(len(numbers)) for numbers in all_numbers]
    starts = torch.randn(len(cases), 1, generator=generator())
    halves = split_in_two(features, images, at_least, starts, iterations=iterations)
    for numbers, expected, found in zip(all_numbers, all_expected, halves, strict=True):
        second = found.second_M.tolist()
        assert second in expected, numbers
        directions[expected.index(second)] += 1
    assert min(directions.values()) > 100


def test_hand_worked_cuts():
    """-4 0 | 1 3 has the means -2 and 2 and the border 0: what lies on it stays on the first side."""
    assert {tuple(cut([-4, 0, 1, 3], seed=seed)) for seed in range(9)} == {
        (False, False, True, True),  # second side to the right
        (True, False, False, False),  # to the left: {-4} and {0, 1, 3} have their border at -4/3
    }
    # 0 0 0 0 9 10: means 0 and 9.5, border 4.75; three on either side: the last in row of the equal ones joins
    assert [i for i, s in enumerate(cut([0, 0, 0, 0, 9, 10], 3)) if s] in ([3, 4, 5], [1, 2, 3], [0, 1, 2])


def reference_start(points, seed):
    """The sides of the main direction: two power iterations from a random direction."""
    centred = (points - points.mean(0)).double()
    direction = torch.randn(points.shape[1], generator=generator(seed)).double()
    for _ in range(2):
        direction = centred.T @ (centred @ direction)
        direction /= direction.norm()
    return centred @ direction


@pytest.mark.parametrize("seed", range(3))
def test_cut_starts_from_the_main_direction_after_two_power_iterations(seed):
    points = torch.randn(600, 3, generator=generator(seed)) * torch.tensor([1.0, 1.2, 0.8]) + 3
    score = reference_start(points, seed)
    found = torch.tensor(cut(points.tolist(), seed=seed, iterations=0))
    clear = score.abs() > 1e-4
    assert clear.sum() > 590
    assert torch.equal(found[clear], (score > 0)[clear])


@pytest.mark.parametrize("at_least", [1, 140])
@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_cut_in_space_is_that_of_two_means(iterations, at_least):
    """Lloyd's iterations in float64 from the same start; then the cut is shifted along the line through both means."""
    points = torch.cat([torch.randn(200, 3, generator=generator(1)), torch.randn(80, 3, generator=generator(2)) + 2])
    far = points.double()
    second = torch.tensor(cut(points.tolist(), iterations=0))
    for _ in range(iterations):
        first_mean, second_mean = far[~second].mean(0), far[second].mean(0)
        score = (far - first_mean).norm(dim=1) ** 2 - (far - second_mean).norm(dim=1) ** 2
        second = score > 0
    if second.sum() < at_least:
        second = score >= score.sort().values[-at_least]
    elif (~second).sum() < at_least:
        second = score > score.sort().values[at_least - 1]
    assert cut(points.tolist(), at_least, iterations=iterations) == second.tolist()


def test_of_equal_images_the_last_are_on_the_second_side():
    images = torch.randperm(3000, generator=generator())
    second, _, sizes = split_one(torch.full((3000, 2), 0.3), images, 1400)
    assert sizes in ([1400, 1600], [1600, 1400])
    assert images[second].min() == sizes[0]


def test_split_finds_two_bunches():
    draw = torch.Generator().manual_seed(3)
    points = torch.cat([torch.randn(40, 16, generator=draw) + 2, torch.randn(25, 16, generator=draw) - 2])
    second, sums, sizes = split_one(points, torch.arange(65), 1)
    assert sorted(sizes) == [25, 40]
    assert len(set(second[:40].tolist())) == len(set(second[40:].tolist())) == 1
    assert torch.allclose(sums[1].float() * UNIT, points[second].sum(0), atol=1e-5)


def test_split_leaves_enough_on_both_sides():
    points = torch.cat([torch.zeros(50, 2), torch.tensor([[9.0, 9.0]])])  # an outlier
    _, _, sizes = split_one(points, torch.arange(51), 10)
    assert sorted(sizes) == [10, 41]


@pytest.mark.parametrize("iterations", [0, 1, 20])
@pytest.mark.parametrize("dim", [1, 5, 64])
def test_clusters_split_together_have_the_bits_of_those_split_alone(dim, iterations):
    """Small and large ones, equal images, an outlier that needs another to join it; some settle sooner than others."""
    draw = generator(dim)
    features = [torch.randn(size, dim, generator=draw) for size in (2, 3, 40, 170, 41, 8, 90)]
    features += [torch.full((12, dim), 0.3), torch.cat([torch.zeros(20, dim), torch.ones(1, dim)])]
    images = [torch.randperm(len(one), generator=draw) for one in features]
    at_least = [1, 1, 15, 80, 5, 4, 1, 5, 7]
    directions = torch.randn(len(features), dim, generator=draw)
    together = split_in_two(features, images, at_least, directions, iterations=iterations)
    for c, found in enumerate(together):
        one = slice(c, c + 1)
        (alone,) = split_in_two(features[one], images[one], at_least[one], directions[one], iterations=iterations)
        assert torch.equal(found.second_M, alone.second_M)
        assert torch.equal(found.sums_2D, alone.sums_2D)
        assert found.sizes == alone.sizes
        assert min(found.sizes) >= at_least[c]
        assert found.sizes == [int((~found.second_M).sum()), int(found.second_M.sum())]


def test_ranks_stop_cutting_together(on_threads):
    """Rank 0's images settle at once, rank 1's do not: it is the last that decides for both."""
    numbers = torch.tensor([0.0, 0, 1, 3, 0, 7, 0, 9, 100, 30, 100, 40, 100, 45, 100, 50]).unsqueeze(1)

    def work():
        mine = list(ownership.my_images(len(numbers)))
        return split_one(numbers[mine], torch.tensor(mine), 1, on_all_ranks=True)

    second, sums, sizes = work()
    for rank, part in enumerate(on_threads(2, work)):
        assert torch.equal(part[0], second[rank::2])
        assert torch.equal(part[1], sums)
        assert part[2] == sizes
