"""How well a model predicts a text, and how far it is from another that it was made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from ...arguments import at_least_one
from ...errors import InvalidArgumentError, NumericsError
from ...model.config import Config

ROWS = 256
"""Positions whose logits are held at once."""


class Predictor(Protocol):
    """What is asked of a model here."""

    @property
    def config(self) -> Config: ...

    def hidden(self, ids: mx.array) -> mx.array: ...

    def logits(self, hidden: mx.array) -> mx.array: ...


@dataclass(frozen=True, kw_only=True)
class PerplexityScore:
    """What one model makes of a text."""

    tokens: int
    """Predicted."""
    context: int
    """Most tokens that a prediction could see."""
    stride: int
    """New tokens a window; equal to the context where windows do not overlap."""
    loss: float
    """Mean negative log-likelihood a token, in nats."""
    reference_loss: float | None = None
    """The same of the reference."""
    kl: float | None = None
    """Mean Kullback-Leibler divergence from the reference's predictions, in nats a token."""
    kl_99: float | None = None
    """The divergence that 99 % of tokens stay below."""
    top_1: float | None = None
    """Share of tokens where the likeliest is the reference's."""

    @property
    def perplexity(self) -> float:
        return _exp(self.loss)

    @property
    def reference_perplexity(self) -> float | None:
        return None if self.reference_loss is None else _exp(self.reference_loss)


def score(
    model: Predictor,
    ids: Sequence[int],
    *,
    context: int = 2048,
    stride: int | None = None,
    reference: Predictor | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> PerplexityScore:
    """Predict each of `ids` but the first from up to `context` tokens before it.

    Windows of `context` tokens begin `stride` apart (by default end to end, as the published
    figures of AWQ and GPTQ are taken); in each, the tokens that are new are predicted. `progress`
    is told how many have been. InvalidArgumentError: fewer than two ids, ids or a reference of
    another vocabulary, or as in `check_windows`; NumericsError where the model gives no numbers.
    """
    context, stride = check_windows(context, stride)
    if len(ids) < 2:
        raise InvalidArgumentError(f"expected a text of two tokens or more, got {len(ids)}")
    vocabulary = model.config.vocab_size
    if not all(0 <= token < vocabulary for token in ids):
        raise InvalidArgumentError(
            f"the text holds ids outside 0..{vocabulary - 1}; was it encoded by another model's "
            "tokenizer?"
        )
    if reference and reference.config.vocab_size != vocabulary:
        raise InvalidArgumentError(
            f"the reference predicts {reference.config.vocab_size} tokens and the model "
            f"{vocabulary}; expected the same vocabulary"
        )
    losses: list[mx.array] = []
    reference_losses: list[mx.array] = []
    divergences: list[mx.array] = []
    agreed: list[mx.array] = []
    done = 0
    for begin, end, first in windows(len(ids), context, stride):
        text = mx.array([ids[begin:end]])
        hidden = model.hidden(text)[0]  # (T, hidden)
        expected = reference.hidden(text)[0] if reference else None
        for at in range(first - 1, end - 1, ROWS):
            rows = slice(at - begin, min(at + ROWS, end - 1) - begin)
            wanted = text[0, rows.start + 1 : rows.stop + 1]
            logs = _logs(model, hidden[rows])  # (rows, V)
            losses.append(_losses(logs, wanted))
            if reference and expected is not None:
                truth = _logs(reference, expected[rows])
                reference_losses.append(_losses(truth, wanted))
                divergences.append((mx.exp(truth) * (truth - logs)).sum(axis=-1))
                agreed.append(truth.argmax(axis=-1) == logs.argmax(axis=-1))
            mx.eval(losses, reference_losses, divergences, agreed)
            done += rows.stop - rows.start
            progress(done)
    loss = _mean(losses)
    kl = np.sort(np.array(mx.concatenate(divergences))) if divergences else None
    if not np.isfinite([loss, 0.0 if kl is None else kl[-1]]).all():
        raise NumericsError(
            "the model produced NaN; expected numbers. Are the weights damaged, or is float16 too "
            "narrow for them (try --dtype bfloat16 or float32)?"
        )
    return PerplexityScore(
        tokens=done,
        context=context,
        stride=stride,
        loss=loss,
        reference_loss=_mean(reference_losses) if reference_losses else None,
        kl=None if kl is None else float(np.mean(kl, dtype=np.float64)),
        kl_99=None if kl is None else float(kl[int(0.99 * (done - 1))]),
        top_1=float(np.mean(np.array(mx.concatenate(agreed)))) if agreed else None,
    )


def check_windows(context: int, stride: int | None) -> tuple[int, int]:
    """`context` and `stride` of `score`, the default filled in.

    InvalidArgumentError for a context of fewer than two tokens, the predicted one included, and for
    a stride that is not between 1 and the context.
    """
    context = at_least_one("context", context)
    if context < 2:
        raise InvalidArgumentError(
            "context must be 2 or more, got 1: a token is predicted from those before it"
        )
    stride = context if stride is None else at_least_one("stride", stride)
    if stride > context:
        raise InvalidArgumentError(
            f"stride must be at most the context, {context}, or tokens are left out; got {stride}"
        )
    return context, stride


def windows(count: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Where each window begins and ends in a text of `count` tokens, and its first new token.

    The very first token is new to none: nothing comes before it.
    """
    known = 1
    for begin in range(0, count, stride):
        end = min(begin + context, count)
        # A window that begins with a new token has nothing to predict it from.
        first = max(known, begin + 1)
        if first < end:
            yield begin, end, first
        known = end
        if end == count:
            return


def _logs(model: Predictor, hidden: mx.array) -> mx.array:
    """Log-probabilities (T, V) from hidden states (T, H), in float32."""
    logits = model.logits(hidden[None])[0].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _losses(logs: mx.array, wanted: mx.array) -> mx.array:
    """Of each row of log-probabilities (T, V) the negative one of the token wanted there."""
    return -mx.take_along_axis(logs, wanted[:, None], axis=-1)[:, 0]


def _mean(parts: list[mx.array]) -> float:
    return float(np.mean(np.array(mx.concatenate(parts)), dtype=np.float64))


def _exp(loss: float) -> float:
    with suppress(OverflowError):
        return math.exp(loss)
    return math.inf
