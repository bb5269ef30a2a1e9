"""Training objectives: cross-entropy, and losses over preferences.

DPO: Rafailov et al., arXiv 2305.18290; label smoothing: Mitchell 2023; IPO: Azar et al., arXiv
2310.12036; ORPO: Hong et al., arXiv 2403.07691; KTO: Ethayarajh et al., arXiv 2402.01306. The
reference model is the trained model with its adapter off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from ..arguments import check_limits, limited, one_of
from ..errors import InvalidArgumentError
from .data.batches import TrainingBatch, batch_of, sequences
from .data.samples import Item, Labelled, Sample

LOSSES = ("dpo", "ipo", "orpo", "kto")

Sums = dict[str, mx.array]
"""The loss, under "loss", and other metrics, summed over samples or tokens."""


class Objective(Protocol):
    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of `sums`."""

    @property
    def needs_reference(self) -> bool:
        """Whether `sums` needs the batch's log probabilities under the reference model."""

    def batch(self, items: Sequence[Item]) -> TrainingBatch:
        """Turns samples into arrays."""

    def weight(self, items: Sequence[Item]) -> float:
        """The divisor that turns sums over `items` into means."""

    def sums(self, losses: mx.array, batch: TrainingBatch) -> Sums:
        """Reduces the losses (N,) of the batch's targets; differentiable."""


class CrossEntropy:
    """The mean over all tokens that count, in nats: all tokens of an epoch have equal weight."""

    metrics = ("loss",)
    needs_reference = False

    def batch(self, items: Sequence[Item]) -> TrainingBatch:
        return batch_of(sequences(items))

    def weight(self, items: Sequence[Item]) -> float:
        return sum(sample.targets for sample in sequences(items))

    def sums(self, losses: mx.array, batch: TrainingBatch) -> Sums:
        return {"loss": (losses * batch.weights).sum()}


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss:
    """An objective over pairs, or for `kto` over labelled replies."""

    loss: str = "dpo"
    """One of LOSSES."""
    beta: float | None = limited(None, above=0, below=math.inf)
    """How much the probability of a reply may change; 0.1 by default. For `orpo`, the weight of the
    preference term beside the cross-entropy of the chosen replies."""
    label_smoothing: float = limited(0.0, least=0, below=0.5)
    """`dpo` only: the share of pairs whose order may be wrong."""
    length_normalized: bool = False
    """`dpo` and `ipo` only: log probabilities are means over tokens instead of sums."""

    def __post_init__(self) -> None:
        one_of("loss", self.loss, LOSSES)
        check_limits(self)
        if self.label_smoothing and self.loss != "dpo":
            raise InvalidArgumentError(f"is for dpo, not for {self.loss}", field="label_smoothing")
        if self.length_normalized and self.loss not in ("dpo", "ipo"):
            raise InvalidArgumentError(
                f"is for dpo and ipo, not {self.loss}", field="length_normalized"
            )

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("loss", "accuracy", "kl" if self.loss == "kto" else "margin")

    @property
    def needs_reference(self) -> bool:
        return self.loss != "orpo"

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

    def sums(self, losses: mx.array, batch: TrainingBatch) -> Sums:
        # Both halves of the batch: chosen and rejected replies, or for kto matched and mismatched.
        log_probs = -batch.by_text(losses)  # (B,)
        counts = mx.maximum(batch.by_text(mx.ones_like(losses)), 1)
        if self.loss == "orpo":
            return orpo(*_halves(log_probs), *_halves(counts), self.strength)
        assert batch.reference is not None
        log_ratios = log_probs - batch.reference
        if self.loss == "kto":
            assert batch.labels is not None
            return kto(*_halves(log_ratios), batch.labels, self.strength)
        if self.length_normalized:
            log_ratios = log_ratios / counts
        chosen, rejected = _halves(log_ratios)
        if self.loss == "ipo":
            return ipo(chosen, rejected, self.strength)
        return dpo(chosen, rejected, self.strength, self.label_smoothing)


# Arguments are (N,), in nats. A log ratio is the log probability of a reply under the model minus
# that under the reference model.


def dpo(chosen: mx.array, rejected: mx.array, beta: float, smoothing: float = 0.0) -> Sums:
    """DPO from log ratios."""
    margin = beta * (chosen - rejected)
    loss = -(1 - smoothing) * nn.log_sigmoid(margin) - smoothing * nn.log_sigmoid(-margin)
    return _pair_sums(loss, margin)


def ipo(chosen: mx.array, rejected: mx.array, beta: float) -> Sums:
    """IPO from log ratios; it pulls their difference to 1 / (2 beta)."""
    difference = chosen - rejected
    return _pair_sums(mx.square(difference - 1 / (2 * beta)), beta * difference)


def orpo(
    chosen: mx.array, rejected: mx.array, tokens: mx.array, others: mx.array, beta: float
) -> Sums:
    """ORPO from log probabilities and token counts: the cross-entropy of the chosen replies plus
    beta times that of the odds ratio."""
    chosen, rejected = chosen / tokens, rejected / others
    log_odds_ratio = (chosen - rejected) - (_log_complement(chosen) - _log_complement(rejected))
    return _pair_sums(-chosen - beta * nn.log_sigmoid(log_odds_ratio), log_odds_ratio)


def kto(log_ratios: mx.array, mismatched: mx.array, good: mx.array, beta: float) -> Sums:
    """KTO from the log ratios of replies, and of replies to other prompts.

    The mean of the latter estimates the KL divergence from the reference model, and can be
    negative, as estimates of few samples are: `kl` is the estimate, the loss takes 0 instead. Good
    and bad replies have equal weight.
    """
    estimate = mx.stop_gradient(mismatched.mean())
    kl = mx.maximum(estimate, 0)
    gain = mx.where(good, log_ratios - kl, kl - log_ratios)
    return {
        "loss": (1 - mx.sigmoid(beta * gain)).sum(),
        "kl": estimate * len(log_ratios),
        "accuracy": (gain > 0).astype(mx.float32).sum(),
    }


def _pair_sums(loss: mx.array, margin: mx.array) -> Sums:
    accuracy = (margin > 0).astype(mx.float32)
    return {"loss": loss.sum(), "accuracy": accuracy.sum(), "margin": margin.sum()}


def _log_complement(log_prob: mx.array) -> mx.array:
    """log(1 - exp(log_prob)), with log_prob at most -1e-6, so that the result is finite."""
    return mx.log(-mx.expm1(mx.minimum(log_prob, -1e-6)))


def _halves(array: mx.array) -> tuple[mx.array, mx.array]:
    half = len(array) // 2
    return array[:half], array[half:]


def _mismatched(samples: Sequence[Sample]) -> list[Sample]:
    """Combines each prompt with the reply of the sample before it."""
    mismatched = []
    for index, sample in enumerate(samples):
        other = samples[index - 1]
        prompt, reply = sample.mask.index(True), other.mask.index(True)
        ids, mask = (
            sample.ids[:prompt] + other.ids[reply:],
            sample.mask[:prompt] + other.mask[reply:],
        )
        mismatched.append(Sample(ids, mask))
    return mismatched
