"""Log probabilities of tokens, and of the likeliest tokens at their positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from ..model import kernels


class TokenLogprob(NamedTuple):
    """A token with its log probability under the model's own distribution."""

    token: int
    logprob: float | None = None
    """Natural logarithm; None for the first token of a text, or where it was not asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens at its position with their log probabilities, best first."""


class LogprobRows:
    """Log probabilities of `tokens` (T,) under logits (T, V), computed asynchronously."""

    def __init__(self, logits: mx.array, tokens: mx.array, top: int):
        logits = logits.astype(mx.float32)
        # A single row stays on the device: reading its value would stall the next step.
        total = mx.logsumexp(logits, axis=-1) if len(logits) == 1 else kernels.logsumexp(logits)
        total = total[:, None]  # (T, 1)
        self.own = mx.take_along_axis(logits, tokens[:, None], axis=-1) - total
        self.best: mx.array | None = None
        if top:
            self.best = mx.argsort(-logits, axis=-1)[:, :top]
            self.values = mx.take_along_axis(logits, self.best, axis=-1) - total
        mx.async_eval([self.own] if self.best is None else [self.own, self.best, self.values])

    def to_list(self, tokens: Sequence[int]) -> list[TokenLogprob]:
        """Return one for each of `tokens`, the ones given at the start."""
        own: Any = self.own[:, 0].tolist()
        if self.best is None:
            return [TokenLogprob(token, value) for token, value in zip(tokens, own, strict=True)]
        best: Any = self.best.tolist()
        values: Any = self.values.tolist()
        return [
            TokenLogprob(token, value, tuple(zip(ids, logprobs, strict=True)))
            for token, value, ids, logprobs in zip(tokens, own, best, values, strict=True)
        ]
