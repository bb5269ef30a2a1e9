"""How sure a score is: intervals for one run, and whether two runs of the same items differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...arguments import at_least_one, number, shown
from ...errors import InvalidArgumentError

Z_95 = 1.959963984540054
"""Standard deviations to either side that hold 95 % of a normal distribution."""
RESAMPLES = 10_000
CHUNK = 1 << 22
"""Numbers drawn at once while resampling, so that large sets fit in memory."""


@dataclass(frozen=True)
class Interval:
    """A mean and where the true one lies 95 times in a hundred."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Two runs of the same items."""

    difference: float
    """The second run's mean less the first's."""
    low: float
    high: float
    """The difference's 95 % interval."""
    p: float
    """How likely so large a difference would be, were there none, in either direction."""
    method: str
    """"mcnemar" where each score is 0 or 1, else "bootstrap"."""


def wilson(right: float, count: int, z: float = Z_95) -> Interval:
    """Wilson's score interval of a share: `right` of `count` items.

    It stays within 0 and 1 and is sound at few items. E. B. Wilson, JASA 22 (1927).
    InvalidArgumentError unless 0 <= right <= count and count >= 1.
    """
    if not 0 <= number("right", right) <= at_least_one("count", count):
        raise InvalidArgumentError(f"right must be 0 to {count}, got {shown(right)}")
    share = right / count
    scale = 1 + z * z / count
    middle = (share + z * z / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    # Rounding must not push an end past the share where all or none are right.
    return Interval(share, min(max(0.0, middle - half), share), max(min(1.0, middle + half), share))


def over_subsets(subsets: Mapping[str, Sequence[float]]) -> float:
    """The plain mean over subsets of each subset's mean score."""
    return sum(sum(scores) / len(scores) for scores in subsets.values()) / len(subsets)


def bootstrap(
    subsets: Mapping[str, Sequence[float]], *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """The interval of the plain mean over subsets of each subset's mean score.

    Items are drawn anew within each subset, as many as it has: its percentile interval. One subset
    gives the interval of a mean. A set in which every subset scores alike throughout has an
    interval of no width: `wilson` says more there. InvalidArgumentError where there is no item.
    """
    if not subsets:
        raise InvalidArgumentError("expected one subset or more, got none; nothing was scored")
    generator = np.random.default_rng(seed)
    arrays = [_scores(name, scores) for name, scores in subsets.items()]
    drawn = sum(_resampled(scores, generator, resamples) for scores in arrays) / len(arrays)
    mean = float(sum(scores.mean() for scores in arrays) / len(arrays))
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Interval(mean, float(low), float(high))


def mcnemar(first: Sequence[float], second: Sequence[float]) -> float:
    """McNemar's exact test of two runs that scored the same items 0 or 1: its two-sided p.

    Items on which the runs agree say nothing; of the others, each is as likely to go either way
    where the runs are equally good: twice the binomial tail, at most 1. Q. McNemar, Psychometrika
    12 (1947). InvalidArgumentError unless the runs are as long as each other, of 0 and 1 alone.
    """
    before, after = _pair(first, second)
    if not _binary(before, after):
        raise InvalidArgumentError("McNemar's test needs scores of 0 and 1; use the bootstrap")
    gained = int(np.sum(after > before))
    lost = int(np.sum(after < before))
    return _binomial_tail(min(gained, lost), gained + lost)


def matched(gained: int, lost: int, count: int, z: float = Z_95) -> tuple[float, float]:
    """The interval of the difference of two shares of the same `count` items, `gained` of which
    went from 0 to 1 and `lost` from 1 to 0.

    It is sound at few items, and where none differ. A. Agresti and Y. Min, Statistics in Medicine
    24 (2005).
    """
    # Half an item is added to each of the four cells.
    difference = (gained - lost) / (count + 2)
    spread = (gained + lost + 1) / (count + 2) - difference**2
    half = z * math.sqrt(spread / (count + 2))
    return max(-1.0, difference - half), min(1.0, difference + half)


def compare(
    first: Sequence[float],
    second: Sequence[float],
    subsets: Sequence[str] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Comparison:
    """Whether the second of two runs on the same items, in the same order, scores better or worse.

    Where `subsets` has each item's, the difference is the plain mean over them, and p is McNemar's
    of all items together. The interval is `matched`'s of one subset, else the pairs' bootstrap
    within each. Where a score is neither 0 nor 1, p is the share of bootstrap samples, of the
    pairs' differences moved to a mean of nothing, that come out as far from 0 as what was found
    (Efron and Tibshirani, An Introduction to the Bootstrap, 16.4). Errors as `mcnemar`.
    """
    before, after = _pair(first, second)
    differences = after - before
    names = np.array([""] * len(differences) if subsets is None else subsets)
    groups = [differences[names == name] for name in dict.fromkeys(names.tolist())]
    generator = np.random.default_rng(seed)
    mean = float(sum(group.mean() for group in groups) / len(groups))
    drawn = sum(_resampled(group, generator, resamples) for group in groups) / len(groups)
    low, high = np.percentile(drawn, (2.5, 97.5))
    if _binary(before, after):
        p, method = mcnemar(first, second), "mcnemar"
        if len(groups) == 1 or low == high:
            low, high = matched(
                int(np.sum(after > before)), int(np.sum(after < before)), len(names)
            )
    else:
        # One more on both sides: no number of draws shows that a chance is nothing at all.
        farther = np.sum(np.abs(drawn - mean) >= abs(mean) * (1 - 1e-12))
        p, method = (int(farther) + 1) / (resamples + 1), "bootstrap"
    return Comparison(mean, float(low), float(high), p, method)


def _resampled(scores: np.ndarray, generator: np.random.Generator, resamples: int) -> np.ndarray:
    """Means of `resamples` samples of `scores`, drawn with replacement: (resamples,)."""
    if _binary(scores):  # counts of a draw are binomial, which is the same and far quicker
        return generator.binomial(len(scores), scores.mean(), resamples) / len(scores)
    rows = max(1, CHUNK // len(scores))
    means = [
        scores[generator.integers(0, len(scores), (min(rows, resamples - at), len(scores)))].mean(1)
        for at in range(0, at_least_one("resamples", resamples), rows)
    ]
    return np.concatenate(means)


def _binomial_tail(least: int, count: int) -> float:
    """Twice the chance of `least` heads or fewer in `count` throws of a coin, at most 1."""
    # In whole numbers: exact for any count, where floats would vanish.
    ways = sum(math.comb(count, k) for k in range(least + 1))
    return min(1.0, 2 * ways / 2**count)


def _binary(*runs: np.ndarray) -> bool:
    return all(bool(np.isin(run, (0.0, 1.0)).all()) for run in runs)


def _scores(name: str, scores: Sequence[float]) -> np.ndarray:
    try:
        array = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise InvalidArgumentError(
            f"{name or 'the scores'}: expected one finite number or more, got {shown(scores)}"
        )
    return array


def _pair(first: Sequence[float], second: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    before, after = _scores("the first run", first), _scores("the second run", second)
    if before.shape != after.shape:
        raise InvalidArgumentError(
            f"expected two runs of the same items, got {len(before)} and {len(after)} scores"
        )
    return before, after
