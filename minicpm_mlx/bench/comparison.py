"""Decides which of two ways is faster, from times taken in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LOOKS = (16, 32, 64, 128)
"""Rounds after which the times are judged; few, since each look is a chance to be wrong."""
DEVIATIONS = 2.8
"""Of the interval; a look at equal ways takes the candidate a few times in a thousand at most."""
LEAST_GAIN = 0.005
"""A candidate must be faster by more than this."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The candidate's time as a multiple of the default's: an estimate and its interval."""

    ratio: float
    low: float
    high: float
    rounds: int

    @property
    def faster(self) -> bool:
        """Whether the candidate is clearly faster; a tie, or doubt, is none."""
        return self.high < 1 - LEAST_GAIN

    @property
    def settled(self) -> bool:
        """Whether more rounds would hardly change that."""
        return self.faster or self.ratio > 1 - LEAST_GAIN


def judge(default: Sequence[float], candidate: Sequence[float]) -> Verdict:
    """Compare seconds of the same rounds, by the signed-rank interval of their paired log ratios.

    Pairs cancel drift, and ranks make rounds that something interrupted weigh no more than others.
    """
    gaps = [math.log(after / before) for before, after in zip(default, candidate, strict=True)]
    n = len(gaps)
    means = sorted((gaps[i] + gaps[j]) / 2 for i in range(n) for j in range(i, n))
    spread = DEVIATIONS * math.sqrt(n * (n + 1) * (2 * n + 1) / 24)
    cut = math.floor(len(means) / 2 - spread)
    low, high = (means[cut], means[-1 - cut]) if cut >= 0 else (-math.inf, math.inf)
    middle = (means[len(means) // 2] + means[(len(means) - 1) // 2]) / 2
    return Verdict(ratio=math.exp(middle), low=math.exp(low), high=math.exp(high), rounds=n)


def duel(
    default: Callable[[], float],
    candidate: Callable[[], float],
    *,
    goes_on: Callable[[], bool] = lambda: True,
) -> Verdict | None:
    """Time two ways in turn, each first in every second round, until the verdict is settled.

    Each call returns the seconds of the same work. None where `goes_on` ends it before the first
    look: nothing is known then.
    """
    times: tuple[list[float], list[float]] = ([], [])
    verdict = None
    for number in range(1, LOOKS[-1] + 1):
        if not goes_on():
            break
        order = (0, 1) if number % 2 else (1, 0)
        for which in order:
            times[which].append((default, candidate)[which]())
        if number in LOOKS:
            verdict = judge(*times)
            if verdict.settled:
                break
    return verdict
