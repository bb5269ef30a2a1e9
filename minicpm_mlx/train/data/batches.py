"""Selects the samples of each step, and turns samples into arrays.

The order is a function of the seed and the epoch, so that a run that is resumed or distributed
reads the same samples. Batches hold samples of similar length, to save padding.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import mlx.core as mx
import numpy as np

from .samples import Item, Labelled, Pair, Sample

WINDOW = 32
"""Batches of shuffled samples that are sorted by length together."""

PAD = 32
"""Lengths are padded to a multiple of this, so that few shapes are compiled."""


class BatchSampler:
    """Deals batches of `size` samples with these lengths, for any number of epochs.

    Each epoch reads every sample once; its last batch may be smaller.
    """

    def __init__(self, lengths: Sequence[int], size: int, seed: int):
        self.lengths, self.size, self.seed = lengths, size, seed
        self.per_epoch = -(-len(lengths) // size)
        self._epoch = lru_cache(maxsize=2)(self._shuffle)

    def at(self, step: int) -> list[int]:
        """The indices of the samples of step `step`, counted from 0."""
        epoch, batch = divmod(step, self.per_epoch)
        return self._epoch(epoch)[batch]

    def _shuffle(self, epoch: int) -> list[list[int]]:
        rng = random.Random(f"{self.seed} {epoch}")
        indices = list(range(len(self.lengths)))
        rng.shuffle(indices)
        batches = []
        window = self.size * WINDOW
        for start in range(0, len(indices), window):
            by_length = sorted(indices[start : start + window], key=self.lengths.__getitem__)
            starts = range(0, len(by_length), self.size)
            batches += [by_length[at : at + self.size] for at in starts]
        rng.shuffle(batches)
        return batches


def length(item: Item) -> int:
    """Tokens of its longest text."""
    return max(len(sample.ids) for sample in sequences([item]))


def sequences(items: Sequence[Item]) -> list[Sample]:
    """The texts of items; of pairs all chosen ones first."""
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
    """A hash of all tokens, masks and labels, in order."""
    sha = hashlib.sha256()
    for sample in sequences(items):
        sha.update(np.array(sample.ids, np.int32).tobytes() + bytes(sample.mask) + b"/")
    sha.update(bytes(item.good for item in items if isinstance(item, Labelled)))
    return sha.hexdigest()


@dataclass(frozen=True)
class TrainingBatch:
    """B texts as arrays. N is the number of tokens that count, padded to a multiple of PAD."""

    ids: mx.array
    """(B, T), padded on the right, where causal attention hides it from every token that counts."""
    positions: mx.array
    """(N,): indices into the hidden states (B * T) that predict the targets."""
    targets: mx.array
    """(N,): the tokens that count."""
    weights: mx.array
    """(N,): 1, or 0 for padding."""
    owners: mx.array
    """(N,): the index of each token's text."""
    labels: mx.array | None = None
    """(B / 2,): whether each labelled reply is good."""
    reference: mx.array | None = None
    """(B,): log probability of each text's targets under the model without adapters."""

    @property
    def arrays(self) -> dict[str, mx.array]:
        """The fields that are set, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: array for name, array in values.items() if array is not None}

    def by_text(self, values: mx.array) -> mx.array:
        """Sums values (N,) over each text: (B,)."""
        return mx.zeros(len(self.ids)).at[self.owners].add(values * self.weights)


def batch_of(samples: Sequence[Sample]) -> TrainingBatch:
    """Turns one or more samples into arrays."""
    T = padded(max(len(sample.ids) for sample in samples))
    ids = np.zeros((len(samples), T), np.int32)
    counts = np.zeros((len(samples), T), bool)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.ids)] = sample.ids
        counts[row, : len(sample.mask)] = sample.mask
    owners, columns = np.nonzero(counts[:, 1:])
    N = len(owners)
    padding = (0, padded(max(N, 1)) - N)
    return TrainingBatch(
        ids=mx.array(ids),
        positions=mx.array(np.pad((owners * T + columns).astype(np.int32), padding)),
        targets=mx.array(np.pad(ids[owners, columns + 1], padding)),
        weights=mx.array(np.pad(np.ones(N, np.float32), padding)),
        owners=mx.array(np.pad(owners.astype(np.int32), padding)),
    )


def padded(count: int) -> int:
    """`count` rounded up to a multiple of PAD."""
    return -(-count // PAD) * PAD
