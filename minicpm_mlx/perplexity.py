"""How well a model predicts a text, and how far it is from another that it was made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .arguments import at_least_one
from .engine import LanguageModel
from .errors import InvalidArgumentError

ROWS = 256
"""Positions whose logits are held at once."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one model makes of a text."""

    tokens: int
    """Predicted."""
    context: int
    """Most tokens that a prediction could see."""
    stride: int
    """New tokens a window; equal to the context where windows do not overlap."""
    loss: float
    """Mean negative log-likelihood a token, in nats."""
    kl: float | None = None
    """Mean Kullback-Leibler divergence from the reference's predictions, in nats a token."""
    kl_99: float | None = None
    """The divergence that 99 % of tokens stay below."""
    top_1: float | None = None
    """Share of tokens where the likeliest is the reference's."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


def score(
    model: LanguageModel,
    ids: Sequence[int],
    *,
    context: int = 2048,
    stride: int | None = None,
    reference: LanguageModel | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> Score:
    """Predict each of `ids` but the first from up to `context` tokens before it.

    Windows of `context` tokens begin `stride` apart (by default end to end, as the published
    figures of AWQ and GPTQ are taken); in each, the tokens that are new are predicted. `progress`
    is told how many have been. InvalidArgumentError: fewer than two ids.
    """
    context = at_least_one("context", context)
    stride = context if stride is None else at_least_one("stride", stride)
    if stride > context:
        raise InvalidArgumentError(
            f"stride must be at most the context, {context}, or tokens are left out; got {stride}"
        )
    if len(ids) < 2:
        raise InvalidArgumentError(f"expected a text of two tokens or more, got {len(ids)}")
    losses: list[mx.array] = []
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
            losses.append(-mx.take_along_axis(logs, wanted[:, None], axis=-1)[:, 0])
            if reference and expected is not None:
                truth = _logs(reference, expected[rows])
                divergences.append((mx.exp(truth) * (truth - logs)).sum(axis=-1))
                agreed.append(truth.argmax(axis=-1) == logs.argmax(axis=-1))
            mx.eval(losses, divergences, agreed)
            done += rows.stop - rows.start
            progress(done)
    kl = np.sort(np.array(mx.concatenate(divergences))) if divergences else None
    return Score(
        tokens=done,
        context=context,
        stride=stride,
        loss=float(np.mean(np.array(mx.concatenate(losses)), dtype=np.float64)),
        kl=None if kl is None else float(np.mean(kl, dtype=np.float64)),
        kl_99=None if kl is None else float(kl[int(0.99 * (done - 1))]),
        top_1=float(np.mean(np.array(mx.concatenate(agreed)))) if agreed else None,
    )


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


def _logs(model: LanguageModel, hidden: mx.array) -> mx.array:
    """Log-probabilities (T, V) from hidden states (T, H), in float32."""
    logits = model.logits(hidden[None])[0].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
