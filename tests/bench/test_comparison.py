"""The rule that decides which of two ways is faster, on planted times."""

import math
import random
from collections.abc import Callable

import pytest

from minicpm_mlx.bench.comparison import LOOKS, duel, judge


def planted(gain: float, seed: int, *, noise: float = 0.03) -> tuple[Callable[[], float], ...]:
    """Two ways, the second faster by `gain`, on a machine that warms up, wavers, and is interrupted
    in one of twenty steps."""
    chance, step = random.Random(seed), 0

    def seconds(factor: float) -> float:
        nonlocal step
        step += 1
        drift = 1 + 0.1 * math.sin(step / 40) + 0.001 * step
        spike = 1 + chance.random() if chance.random() < 0.05 else 1.0
        return 0.06 * factor * drift * spike * math.exp(chance.gauss(0, noise))

    return lambda: seconds(1.0), lambda: seconds(1 - gain)


@pytest.mark.parametrize(("gain", "noise"), [(0.05, 0.03), (0.1, 0.05), (0.02, 0.01)])
def test_the_faster_of_two_is_found_every_time(gain: float, noise: float) -> None:
    verdicts = [duel(*planted(gain, seed, noise=noise)) for seed in range(20)]
    assert all(verdict and verdict.faster for verdict in verdicts)
    assert all(verdict and 1 - 2 * gain < verdict.ratio < 1 for verdict in verdicts)


@pytest.mark.parametrize("loss", [0.0, 0.02])
@pytest.mark.parametrize("noise", [0.005, 0.03, 0.08])
def test_the_default_is_kept_when_the_other_is_no_faster(loss: float, noise: float) -> None:
    verdicts = [duel(*planted(-loss, seed, noise=noise)) for seed in range(20)]
    assert not any(verdict and verdict.faster for verdict in verdicts)


def test_a_gain_too_small_to_matter_is_none() -> None:
    verdict = judge([1.0] * 64, [0.997] * 64)
    assert verdict.ratio == pytest.approx(0.997)
    assert not verdict.faster


def test_few_rounds_decide_nothing() -> None:
    assert not judge([1.0] * 4, [0.5] * 4).faster
    rounds = iter(range(LOOKS[0] - 1))
    goes_on = lambda: next(rounds, None) is not None  # noqa: E731
    assert duel(*planted(0.5, 1), goes_on=goes_on) is None


def test_each_way_is_first_in_every_second_round() -> None:
    order: list[str] = []

    def time(name: str) -> Callable[[], float]:
        return lambda: order.append(name) or 1.0

    verdict = duel(time("a"), time("b"))
    assert verdict
    assert verdict.rounds == LOOKS[0]
    assert order[:8] == ["a", "b", "b", "a", "a", "b", "b", "a"]
