"""Plans how often, and on how many samples, a run validates.

By default validation takes at most a tenth of the run's time. That is reckoned from tokens and not
from a clock, so that the same command always validates at the same steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from .data.batches import length, sequences
from .data.dataset import Data
from .data.samples import Item

SHARE = 0.1
"""Most of a run's time that validation takes by default, and saving likewise."""

TIMES = 11
"""Most validations by default: before the first step, and ten."""

ENOUGH = 64
"""Samples on which a loss is telling; only then are more validations better than more samples."""

COST = {"sft": 1 / 2, "preference": 2 / 3, "kto": 2 / 3}
"""Time to validate on a token, in units of the time to train on it, by kind of data: one forward
pass of two passes, and for preferences one more of the reference model in both. An upper bound:
full training, and layers computed twice, take longer."""


def plan_validation(
    data: Data, *, steps: int, samples_a_step: int, patience: int | None = None
) -> tuple[int, int]:
    """Returns the steps between validations, and the number of samples, for at most SHARE.

    There is one validation before the first step and one after the last, and with `patience` enough
    for it to run out, each on one sample or more: so a run of one or two steps may take longer.
    """
    if not data.valid:
        return steps, 1
    affordable = SHARE / (1 - SHARE) / _cost(data, steps, samples_a_step, 1)
    fewest = min(TIMES, steps + 1, 2 + (patience or 0))
    least = min(len(data.valid), ENOUGH)
    times = max(fewest, min(TIMES, steps + 1, int(affordable / least)))
    every = -(-steps // (times - 1))
    samples = int(affordable / times_of(steps, every))
    return every, max(1, min(len(data.valid), samples))


def validation_share(
    data: Data, *, steps: int, samples_a_step: int, every: int, samples: int | None
) -> float:
    """The share of a run's time that validation takes, about; `samples` None: all."""
    if not data.valid:
        return 0.0
    count = times_of(steps, every) * (samples or len(data.valid))
    cost = _cost(data, steps, samples_a_step, count)
    return cost / (1 + cost)


def times_of(steps: int, every: int) -> int:
    """The number of validations of a run."""
    return 1 + -(-steps // every)


def representative(items: Sequence[Item], count: int | None) -> list[Item]:
    """Selects `count` items, evenly spaced among all in the order of length; None: all."""
    if count is None or count >= len(items):
        return list(items)
    by_length = sorted(items, key=length)
    return [by_length[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def _cost(data: Data, steps: int, samples_a_step: int, count: int) -> float:
    """Time to validate on `count` samples, in units of the time of all steps."""
    per_epoch = -(-len(data.train) // samples_a_step)
    trained = _tokens(data.train) * steps / per_epoch
    return COST[data.kind] * count * _tokens(data.valid) / len(data.valid) / trained


def _tokens(items: Sequence[Item]) -> int:
    return sum(len(sample.ids) for sample in sequences(items))
