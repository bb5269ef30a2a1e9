"""Log probabilities of tokens, and of the likeliest ones in their places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from .. import device
from ..model.kernels import cpu_softmax


class Scored(NamedTuple):
    """A token with its log probability, of the model's own distribution."""

    token: int
    logprob: float | None = None
    """Natural logarithm; None for the first token of a text, or where it was not asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens in its place and theirs, best first."""


def _log_sum(logits: mx.array) -> mx.array:
    """Logarithm of the sum of exponentials, (T, 1), of logits (T, V)."""
    if len(logits) == 1 or not device.slow_exponentials():
        return mx.logsumexp(logits, axis=-1, keepdims=True)
    # Values at once, but many times as fast; and MLX's sum is off by 1e-4.
    return cpu_softmax.softmax(mx.array(logits))[1][:, None]


class Scores:
    """Those of `tokens` (T,) under logits (T, V), computed on the device."""

    def __init__(self, logits: mx.array, tokens: mx.array, top: int):
        logits = logits.astype(mx.float32)
        total = _log_sum(logits)
        self.own = mx.take_along_axis(logits, tokens[:, None], axis=-1) - total
        self.best: mx.array | None = None
        if top:
            self.best = mx.argsort(-logits, axis=-1)[:, :top]
            self.values = mx.take_along_axis(logits, self.best, axis=-1) - total
        mx.async_eval([self.own] if self.best is None else [self.own, self.best, self.values])

    def rows(self, tokens: Sequence[int]) -> list[Scored]:
        """One for each of the tokens, which must be those that were given."""
        own: Any = self.own[:, 0].tolist()
        if self.best is None:
            return [Scored(token, value) for token, value in zip(tokens, own, strict=True)]
        best: Any = self.best.tolist()
        values: Any = self.values.tolist()
        return [
            Scored(token, value, tuple(zip(ids, logprobs, strict=True)))
            for token, value, ids, logprobs in zip(tokens, own, best, values, strict=True)
        ]

    def of(self, token: int) -> Scored:
        """The only one."""
        return self.rows([token])[0]
