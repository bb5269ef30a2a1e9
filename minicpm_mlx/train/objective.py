"""What is made small: the cross-entropy of the tokens that count, or a loss over preferences.

An objective makes sums, over some samples, of the losses of their tokens, and says how much the
samples weigh, so that a batch may be cut up, over time or over processes, without changing the
mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from .data.batches import Batch, batch_of, sequences
from .data.samples import Item

Sums = dict[str, mx.array]
"""The loss, under "loss", and whatever else is told of, summed."""


class Objective(Protocol):
    """See the module's text."""

    @property
    def told(self) -> tuple[str, ...]:
        """Names of the sums."""

    @property
    def compares(self) -> bool:
        """Whether `sums` wants to know what the model made of the texts before it was trained."""

    def batch(self, items: Sequence[Item]) -> Batch:
        """Samples as arrays."""

    def weight(self, items: Sequence[Item]) -> float:
        """By which their sums are to be divided, together with those of others."""

    def sums(self, losses: mx.array, batch: Batch) -> Sums:
        """Of the losses (N,) of the tokens of `batch` that count; differentiable."""


class CrossEntropy:
    """The mean over all tokens that count, in nats: every token of an epoch weighs the same."""

    told = ("loss",)
    compares = False

    def batch(self, items: Sequence[Item]) -> Batch:
        return batch_of(sequences(items))

    def weight(self, items: Sequence[Item]) -> float:
        return sum(sample.targets for sample in sequences(items))

    def sums(self, losses: mx.array, batch: Batch) -> Sums:
        return {"loss": (losses * batch.weights).sum()}
