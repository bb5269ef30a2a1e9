"""Confidence intervals of a score, and tests of whether two runs of the same items differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...arguments import at_least_one, number, shown
from ...errors import InvalidArgumentError

Z_95 = 1.959963984540054
"""95 % of a normal distribution lie within this many standard deviations of its mean."""
RESAMPLES = 10_000
CHUNK = 1 << 22
"""Numbers drawn at a time while resampling, so that large sets fit in memory."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """The difference between two runs of the same items."""

    difference: float
    """The second run's mean minus the first's."""
    low: float
    high: float
    """Ends of the difference's 95 % interval."""
    p: float
    """Two-sided: the chance of so large a difference if the runs were equally good."""
    method: str
    """"mcnemar" where each score is 0 or 1, else "bootstrap"."""


def wilson(right: float, count: int, z: float = Z_95) -> Interval:
    """Wilson's score interval of a share: `right` of `count` items.

    It stays within 0 and 1 and holds for few items. E. B. Wilson, JASA 22 (1927).
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

    Resamples the items within each subset and takes percentiles. One subset gives the interval of
    a mean. Where all items of each subset have one score the interval has no width; use `wilson`
    there. InvalidArgumentError where there is no item.
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
    """The two-sided p of McNemar's exact test of two runs that scored the same items 0 or 1.

    Uses only the items on which the runs differ. If the runs are equally good, each of those goes
    either way with the same chance: p is twice the binomial tail, at most 1. Q. McNemar,
    Psychometrika 12 (1947). InvalidArgumentError unless the runs have equal length and scores of 0
    and 1.
    """
    before, after = _pair(first, second)
    if not _binary(before, after):
        raise InvalidArgumentError("McNemar's test needs scores of 0 and 1; use the bootstrap")
    gained = int(np.sum(after > before))
    lost = int(np.sum(after < before))
    return _binomial_tail(min(gained, lost), gained + lost)


def matched(gained: int, lost: int, count: int, z: float = Z_95) -> tuple[float, float]:
    """The interval of the difference of two shares of the same `count` items.

    `gained` items went from 0 to 1, `lost` from 1 to 0. Holds for few items, and where none differ.
    A. Agresti and Y. Min, Statistics in Medicine 24 (2005).
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
    """Compares two runs on the same items, in the same order.

    `subsets` names each item's subset; the difference is the plain mean over subsets, and p is
    McNemar's of all items together. The interval is `matched`'s for one subset, else the bootstrap
    of the pairs within each. With scores other than 0 and 1, p comes from bootstrap samples of the
    pairs' differences shifted to a mean of 0: the share of samples at least as far from 0 as the
    difference (Efron and Tibshirani, An Introduction to the Bootstrap, 16.4). Errors as `mcnemar`.
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
            gained, lost = int(np.sum(after > before)), int(np.sum(after < before))
            low, high = matched(gained, lost, len(names))
    else:
        # Plus one on both sides: no number of draws shows that a chance is zero.
        farther = np.sum(np.abs(drawn - mean) >= abs(mean) * (1 - 1e-12))
        p, method = (int(farther) + 1) / (resamples + 1), "bootstrap"
    return Comparison(mean, float(low), float(high), p, method)


def _resampled(scores: np.ndarray, generator: np.random.Generator, resamples: int) -> np.ndarray:
    """Means of `resamples` samples of `scores`, drawn with replacement: (resamples,)."""
    if _binary(scores):  # the count of ones is binomial: the same, and far quicker
        return generator.binomial(len(scores), scores.mean(), resamples) / len(scores)
    rows = max(1, CHUNK // len(scores))
    means = [
        scores[generator.integers(0, len(scores), (min(rows, resamples - at), len(scores)))].mean(1)
        for at in range(0, at_least_one("resamples", resamples), rows)
    ]
    return np.concatenate(means)


def _binomial_tail(least: int, count: int) -> float:
    """Twice the chance of `least` heads or fewer in `count` tosses of a coin, at most 1."""
    # In integers: exact for any count, where floats would underflow.
    ways = binomial = 1
    for k in range(least):
        binomial = binomial * (count - k) // (k + 1)
        ways += binomial
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
