"""Losses over preferences, of the log probabilities of whole replies.

DPO: Rafailov et al., arXiv 2305.18290; smoothed labels: Mitchell 2023; IPO: Azar et al., arXiv
2310.12036; ORPO: Hong et al., arXiv 2403.07691; KTO: Ethayarajh et al., arXiv 2402.01306. The
reference model is the one that is trained, with its adapter off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from ..arguments import number
from ..errors import InvalidArgumentError
from .data.batches import TrainingBatch, batch_of, sequences
from .data.samples import Item, Labelled, Sample

LOSSES = ("dpo", "ipo", "orpo", "kto")


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss:
    """An objective (see objective.py) over pairs, or of `kto` over labelled replies."""

    loss: str = "dpo"
    """One of LOSSES."""
    beta: float | None = None
    """How much a reply's probability is to change; by default 0.1. Of `orpo` the weight of the
    preference beside the cross-entropy of the chosen replies."""
    label_smoothing: float = 0.0
    """Of `dpo`: the share of pairs that may be the wrong way round."""
    length_normalized: bool = False
    """Of `dpo` and `ipo`: log probabilities are means over tokens, not sums."""

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise InvalidArgumentError(
                f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}"
            )
        if not 0 < number("beta", self.strength) < math.inf:
            raise InvalidArgumentError(f"beta must be more than 0, got {self.strength:g}")
        if not 0 <= number("label-smoothing", self.label_smoothing) < 0.5:
            raise InvalidArgumentError(
                f"label-smoothing must be in [0, 0.5), got {self.label_smoothing:g}"
            )
        if self.label_smoothing and self.loss != "dpo":
            raise InvalidArgumentError(f"label-smoothing is for dpo, not for {self.loss}")
        if self.length_normalized and self.loss not in ("dpo", "ipo"):
            raise InvalidArgumentError(f"length-normalized is for dpo and ipo, not {self.loss}")

    @property
    def told(self) -> tuple[str, ...]:
        """Names of what `sums` gives."""
        return ("loss", "accuracy", "kl" if self.loss == "kto" else "margin")

    @property
    def strength(self) -> float:
        """`beta`, or its default."""
        return 0.1 if self.beta is None else self.beta

    def weight(self, items: Sequence[Item]) -> float:
        return float(len(items))

    def batch(self, items: Sequence[Item]) -> TrainingBatch:
        if self.loss != "kto":
            return batch_of(sequences(items))
        labelled = [item for item in items if isinstance(item, Labelled)]
        assert len(labelled) == len(items)
        samples = [item.sample for item in labelled]
        batch = batch_of(samples + _mismatched(samples))
        return replace(batch, labels=mx.array([item.good for item in labelled]))

    @property
    def compares(self) -> bool:
        """With the model as it was."""
        return self.loss != "orpo"

    def sums(self, losses: mx.array, batch: TrainingBatch) -> Sums:
        ours = -batch.by_text(losses)
        counts = mx.maximum(batch.by_text(mx.ones_like(losses)), 1)
        if self.loss == "orpo":
            return orpo(*_halves(ours), *_halves(counts), self.strength)
        assert batch.reference is not None
        gain = ours - batch.reference
        if self.loss == "kto":
            assert batch.labels is not None
            return kto(*_halves(gain), batch.labels, self.strength)
        if self.length_normalized:
            gain = gain / counts
        chosen, rejected = _halves(gain)
        if self.loss == "ipo":
            return ipo(chosen, rejected, self.strength)
        return dpo(chosen, rejected, self.strength, self.label_smoothing)


def dpo(chosen: mx.array, rejected: mx.array, beta: float, smoothing: float = 0.0) -> Sums:
    """Of how much more likely each reply (N,) is than to the reference, in nats."""
    margin = beta * (chosen - rejected)
    loss = -(1 - smoothing) * nn.log_sigmoid(margin) - smoothing * nn.log_sigmoid(-margin)
    return {"loss": loss.sum()} | _told(chosen, rejected, beta)


def ipo(chosen: mx.array, rejected: mx.array, beta: float) -> Sums:
    """The same; the margin is pulled to 1 / (2 beta)."""
    loss = mx.square(chosen - rejected - 1 / (2 * beta))
    return {"loss": loss.sum()} | _told(chosen, rejected, beta)


def orpo(
    chosen: mx.array, rejected: mx.array, tokens: mx.array, others: mx.array, beta: float
) -> Sums:
    """Of log probabilities (N,) and numbers of tokens (N,): cross-entropy of the chosen replies and
    beta times that of the odds between both."""
    chosen, rejected = chosen / tokens, rejected / others
    odds = (chosen - rejected) - (_log_of_rest(chosen) - _log_of_rest(rejected))
    loss = -chosen - beta * nn.log_sigmoid(odds)
    told = {"accuracy": (odds > 0).astype(mx.float32).sum(), "margin": odds.sum()}
    return {"loss": loss.sum()} | told


def _log_of_rest(log: mx.array) -> mx.array:
    """log(1 - exp(log)), for logarithms of probabilities short of 1."""
    return mx.log(-mx.expm1(mx.minimum(log, -1e-6)))


def kto(gain: mx.array, mismatched: mx.array, good: mx.array, beta: float) -> Sums:
    """Of how much more likely replies (N,) and replies to other prompts are than to the reference.

    The latter's mean says how far the model is from the reference anyway. Good and bad replies
    weigh the same.
    """
    far = mx.stop_gradient(mx.maximum(mismatched.mean(), 0))
    value = mx.where(good, mx.sigmoid(beta * (gain - far)), mx.sigmoid(beta * (far - gain)))
    told = {
        "kl": far * len(gain),
        "accuracy": (mx.where(good, gain > far, gain < far)).astype(mx.float32).sum(),
    }
    return {"loss": (1 - value).sum()} | told


def _told(chosen: mx.array, rejected: mx.array, beta: float) -> Sums:
    margin = beta * (chosen - rejected)
    return {"accuracy": (margin > 0).astype(mx.float32).sum(), "margin": margin.sum()}


def _halves(array: mx.array) -> tuple[mx.array, mx.array]:
    half = len(array) // 2
    return array[:half], array[half:]


def _mismatched(samples: Sequence[Sample]) -> list[Sample]:
    """Each prompt with the reply to the one before."""
    found = []
    for place, sample in enumerate(samples):
        begin = sample.mask.index(True)
        other = samples[place - 1]
        start = other.mask.index(True)
        found.append(
            Sample(
                ids=sample.ids[:begin] + other.ids[start:],
                mask=sample.mask[:begin] + other.mask[start:],
            )
        )
    return found


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

    def batch(self, items: Sequence[Item]) -> TrainingBatch:
        """Samples as arrays."""

    def weight(self, items: Sequence[Item]) -> float:
        """By which their sums are to be divided, together with those of others."""

    def sums(self, losses: mx.array, batch: TrainingBatch) -> Sums:
        """Of the losses (N,) of the tokens of `batch` that count; differentiable."""


class CrossEntropy:
    """The mean over all tokens that count, in nats: every token of an epoch weighs the same."""

    told = ("loss",)
    compares = False

    def batch(self, items: Sequence[Item]) -> TrainingBatch:
        return batch_of(sequences(items))

    def weight(self, items: Sequence[Item]) -> float:
        return sum(sample.targets for sample in sequences(items))

    def sums(self, losses: mx.array, batch: TrainingBatch) -> Sums:
        return {"loss": (losses * batch.weights).sum()}
