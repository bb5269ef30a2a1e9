"""Which samples each step reads, and samples as arrays.

The order is a function of the seed and the number of the epoch, so that a run that is resumed, or
spread over processes, reads what it would have read. Samples of like length go together: little is
padding.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import mlx.core as mx
import numpy as np

from .samples import (
    Item,
    Labelled,
    Pair,
    Sample,
)

WINDOW = 32
"""Batches' worth of shuffled samples that are sorted by length before they are cut up."""

PAD = 32
"""Lengths are filled up to a multiple of this, so that few shapes occur."""


class Order:
    """Batches of `size` samples of these lengths, for as many epochs as are asked for.

    Each epoch reads every sample once; its last batch may be smaller.
    """

    def __init__(self, lengths: Sequence[int], size: int, seed: int):
        self.lengths, self.size, self.seed = lengths, size, seed
        self.per_epoch = -(-len(lengths) // size)
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def at(self, step: int) -> list[int]:
        """Numbers of the samples of step `step`, counted from 0."""
        epoch, place = divmod(step, self.per_epoch)
        return self._epoch(epoch)[place]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        draw = random.Random(f"{self.seed} {epoch}")
        numbers = list(range(len(self.lengths)))
        draw.shuffle(numbers)
        batches = []
        window = self.size * WINDOW
        for start in range(0, len(numbers), window):
            alike = sorted(numbers[start : start + window], key=self.lengths.__getitem__)
            batches += [alike[at : at + self.size] for at in range(0, len(alike), self.size)]
        draw.shuffle(batches)
        return batches


def length(item: Item) -> int:
    """Tokens of the longest text in it."""
    return max(len(sample.ids) for sample in sequences([item]))


def sequences(items: Sequence[Item]) -> list[Sample]:
    """The texts of which they consist; of pairs the chosen ones first."""
    first, second = [], []
    for item in items:
        match item:
            case Pair(chosen, rejected):
                first.append(chosen)
                second.append(rejected)
            case Labelled(sample):
                first.append(sample)
            case Sample():
                first.append(item)
    return first + second


def digest(items: Sequence[Item]) -> str:
    """A hash of all their tokens and masks, in order."""
    found = hashlib.sha256()
    for sample in sequences(items):
        found.update(np.array(sample.ids, np.int32).tobytes() + bytes(sample.mask) + b"/")
    found.update(bytes(item.good for item in items if isinstance(item, Labelled)))
    return found.hexdigest()


@dataclass(frozen=True)
class TrainingBatch:
    """Texts as arrays. N is how many tokens count, filled up to a multiple of PAD."""

    ids: mx.array
    """(B, T), filled up on the right, where nothing that counts can see it."""
    places: mx.array
    """(N,): in the hidden states (B * T), those that predict a token that counts."""
    targets: mx.array
    """(N,): those tokens."""
    weights: mx.array
    """(N,): 1, or 0 where N was filled up."""
    owners: mx.array
    """(N,): whose token it is, of the B texts."""
    labels: mx.array | None = None
    """Of labelled replies whether they are good."""
    reference: mx.array | None = None
    """(B,): log probabilities of the texts' tokens that count, summed, to the model as it was."""

    @property
    def arrays(self) -> dict[str, mx.array]:
        """What it consists of, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: array for name, array in found.items() if array is not None}

    def by_text(self, values: mx.array) -> mx.array:
        """Of values (N,), one for each token that counts, the sums over each text: (B,)."""
        return mx.zeros(len(self.ids)).at[self.owners].add(values * self.weights)


def batch_of(samples: Sequence[Sample]) -> TrainingBatch:
    """Samples, of which there is at least one, as arrays."""
    T = _filled_up(max(len(sample.ids) for sample in samples))
    ids = np.zeros((len(samples), T), np.int32)
    counts = np.zeros((len(samples), T), bool)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.ids)] = sample.ids
        counts[row, : len(sample.mask)] = sample.mask
    owners, columns = np.nonzero(counts[:, 1:])
    real = len(owners)
    more = (0, _filled_up(max(real, 1)) - real)
    return TrainingBatch(
        ids=mx.array(ids),
        places=mx.array(np.pad((owners * T + columns).astype(np.int32), more)),
        targets=mx.array(np.pad(ids[owners, columns + 1], more)),
        weights=mx.array(np.pad(np.ones(real, np.float32), more)),
        owners=mx.array(np.pad(owners.astype(np.int32), more)),
    )


def _filled_up(count: int) -> int:
    return -(-count // PAD) * PAD
