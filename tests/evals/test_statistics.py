"""Intervals and tests of significance, against published tables and slow reference versions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpm_mlx.errors import InvalidArgumentError
from minicpm_mlx.evals.report.statistics import bootstrap, compare, matched, mcnemar, wilson

SCORES = st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=40)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval_is_the_published_one(
    right: int, count: int, low: float, high: float
) -> None:
    found = wilson(right, count)
    assert found.mean == right / count
    assert found.low == pytest.approx(low, abs=5e-5)
    assert found.high == pytest.approx(high, abs=5e-5)


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_ends_solve_its_equation_and_hold_the_mean(counts: tuple[int, int]) -> None:
    right, count = counts
    found = wilson(right, count)
    assert 0 <= found.low <= found.mean <= found.high <= 1
    for end in (found.low, found.high):
        # |share - end| is z standard deviations of a share whose true value is `end`.
        expected = 1.959963984540054**2 * end * (1 - end) / count
        assert (found.mean - end) ** 2 == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("right", "count"), [(0, 0), (2, 1), (-1, 5), (math.nan, 5), (1, 2.5)])
def test_a_share_that_is_none_is_refused(right: float, count: int) -> None:
    with pytest.raises(InvalidArgumentError):
        wilson(right, count)


def test_the_bootstraps_interval_is_the_normal_one_for_many_items() -> None:
    scores = np.random.default_rng(1).gamma(2.0, 1.0, 4000)
    found = bootstrap({"": scores.tolist()})
    half = 1.96 * scores.std() / math.sqrt(len(scores))
    assert found.mean == pytest.approx(scores.mean())
    assert found.low == pytest.approx(scores.mean() - half, abs=0.05 * half)
    assert found.high == pytest.approx(scores.mean() + half, abs=0.05 * half)


def test_subsets_count_alike_however_many_items_they_have() -> None:
    found = bootstrap({"large": [1.0] * 1000, "small": [0.0, 1.0]})
    assert found.mean == 0.75
    assert (found.low, found.high) == (0.5, 1.0)  # half of what the small one's mean can be


def test_the_bootstrap_of_subsets_has_the_stratified_error() -> None:
    generator = np.random.default_rng(2)
    subsets = {str(n): generator.integers(0, 2, 50 * (n + 1)).astype(float) for n in range(4)}
    found = bootstrap({name: scores.tolist() for name, scores in subsets.items()})
    error = math.sqrt(sum(s.var() / len(s) for s in subsets.values())) / 4
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_zeros_and_ones_are_drawn_as_other_numbers_are() -> None:
    scores = [1.0] * 30 + [0.0] * 20
    quick = bootstrap({"": scores}, resamples=40_000)
    slow = bootstrap({"": [score / 2 for score in scores]}, resamples=40_000)  # 0 and 0.5
    assert quick.low == pytest.approx(2 * slow.low, abs=0.021)
    assert quick.high == pytest.approx(2 * slow.high, abs=0.021)


def test_the_same_seed_gives_the_same_interval() -> None:
    subsets = {"a": [1.0, 2.5, 7.0], "b": [0.0, 1.0]}
    assert bootstrap(subsets, seed=3) == bootstrap(subsets, seed=3)
    first, second = [1.0, 2.0, 5.0] * 9, [2.0, 2.0, 4.0] * 9
    assert compare(first, second, seed=3) == compare(first, second, seed=3)


@pytest.mark.parametrize("subsets", [{}, {"a": []}, {"a": [1.0], "b": []}, {"a": [math.nan]}])
def test_a_set_without_scores_is_refused(subsets: dict[str, list[float]]) -> None:
    with pytest.raises(InvalidArgumentError):
        bootstrap(subsets)


def pairs(gained: int, lost: int, same: int = 5) -> tuple[list[float], list[float]]:
    first = [0.0] * gained + [1.0] * lost + [1.0] * same
    second = [1.0] * gained + [0.0] * lost + [1.0] * same
    return first, second


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        # Two-sided binomial tails at 1/2, by hand: 2 * sum of C(n, k) / 2^n.
        (5, 0, 2 / 32),
        (0, 6, 2 / 64),
        (8, 1, 2 * 10 / 512),
        (10, 2, 2 * 79 / 4096),
        (9, 3, 2 * 299 / 4096),
        (4, 4, 1.0),
        (1, 0, 1.0),
        (0, 0, 1.0),
    ],
)
def test_mcnemars_exact_p_is_the_binomial_one(gained: int, lost: int, p: float) -> None:
    assert mcnemar(*pairs(gained, lost)) == pytest.approx(p, rel=1e-12)


@given(SCORES, st.randoms())
def test_mcnemar_agrees_with_trying_every_way_the_differences_could_fall(
    first: list[float], random: object
) -> None:
    first = first[:10]
    second = [float(getattr(random, "random")() < 0.5) for _ in first]  # noqa: B009
    moved = [b - a for a, b in zip(first, second, strict=True) if a != b]
    ways = list(itertools.product((-1, 1), repeat=len(moved)))
    as_far = sum(abs(sum(way)) >= abs(sum(moved)) for way in ways)
    assert mcnemar(first, second) == pytest.approx(as_far / len(ways))


def test_mcnemar_stays_exact_at_many_thousands() -> None:
    p = mcnemar(*pairs(5000, 4800, same=0))
    normal = math.erfc((200 - 1) / math.sqrt(9800) / math.sqrt(2))
    assert p == pytest.approx(normal, rel=0.01)
    assert mcnemar(*pairs(3000, 0)) == 0.0  # less than any float


@given(SCORES.flatmap(lambda a: st.tuples(st.just(a), st.permutations(a))))
def test_a_comparison_turned_round_has_the_same_p(runs: tuple[list[float], list[float]]) -> None:
    first, second = runs
    there, back = compare(first, second, resamples=50), compare(second, first, resamples=50)
    assert there.method == back.method == "mcnemar"
    assert there.p == back.p
    assert there.difference == -back.difference


def test_ratings_are_compared_by_bootstrap() -> None:
    generator = np.random.default_rng(4)
    first = generator.integers(1, 11, 80).astype(float)
    second = np.clip(first + generator.normal(0.4, 1.5, 80), 1, 10)
    found = compare(first.tolist(), second.tolist())
    differences = second - first
    z = differences.mean() / (differences.std() / math.sqrt(80))
    assert found.method == "bootstrap"
    assert found.difference == pytest.approx(differences.mean())
    assert found.p == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), abs=0.01)
    assert found.low < found.difference < found.high


def test_the_interval_of_a_difference_is_that_of_a_published_example() -> None:
    # Approval of a prime minister, 1600 people asked twice: A. Agresti, Categorical Data Analysis.
    assert matched(86, 150, 1600) == pytest.approx((-0.059, -0.021), abs=5e-4)


@pytest.mark.parametrize("chances", [(0.1, 0.2), (0.02, 0.02), (0.0, 0.3), (0.4, 0.5)])
@pytest.mark.parametrize("count", [20, 50, 200])
def test_the_interval_of_a_difference_holds_it_as_often_as_it_says(
    chances: tuple[float, float], count: int
) -> None:
    up, down = chances
    drawn = np.random.default_rng(6).multinomial(count, [up, down, 1 - up - down], 2000)
    ends = np.array([matched(int(gained), int(lost), count) for gained, lost, _ in drawn])
    assert np.mean((ends[:, 0] <= up - down) & (up - down <= ends[:, 1])) > 0.93


def test_subsets_count_alike_in_a_comparison() -> None:
    names = ["a"] * 30 + ["b"] * 10
    before, after = [0.0] * 40, [1.0] * 15 + [0.0] * 25
    found = compare(before, after, names)
    assert found.difference == pytest.approx((0.5 + 0.0) / 2)
    assert found.p == compare(before, after).p
    width = 2 * 1.96 * math.sqrt(0.25 / 30) / 2
    assert found.high - found.low == pytest.approx(width, rel=0.1)


def test_runs_that_agree_throughout_do_not_differ() -> None:
    found = compare([0.5, 2.0, 3.0], [0.5, 2.0, 3.0])
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)


@pytest.mark.parametrize(
    ("first", "second"), [([1.0], [1.0, 0.0]), ([], []), ([math.inf], [1.0]), ([0.0], ["a"])]
)
def test_runs_that_cannot_be_paired_are_refused(first: list[float], second: list[float]) -> None:
    with pytest.raises(InvalidArgumentError):
        compare(first, second)


def test_mcnemar_refuses_ratings() -> None:
    with pytest.raises(InvalidArgumentError, match="0 and 1"):
        mcnemar([0.0, 2.0], [1.0, 1.0])
