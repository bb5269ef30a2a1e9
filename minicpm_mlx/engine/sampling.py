"""Logits to the next token, on the device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..arguments import number, shown, whole
from ..errors import InvalidArgumentError

NOT_A_NUMBER = -1
"""Sampled instead of a token when the logits hold NaN."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn; the order of the filters is that of transformers."""

    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token (greedy), and no other field but the
    repetition penalty matters."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together reach this probability; 1 keeps all."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of every token of the text so far. Above
    0.01, at most 100: a hundredfold either way keeps any logit below 3e36 finite in float32."""
    seed: int | None = None
    """Same seed, same text; None draws one."""

    def __post_init__(self) -> None:
        for name, plain, good, expected in (
            ("temperature", number, lambda v: 0 <= v <= 100, "between 0 and 100"),
            ("top_p", number, lambda v: 0 < v <= 1, "above 0 and at most 1"),
            ("top_k", whole, lambda v: v >= 0, "0 or more"),
            ("min_p", number, lambda v: 0 <= v <= 1, "between 0 and 1"),
            ("repetition_penalty", number, lambda v: 0.01 < v <= 100, "above 0.01 and at most 100"),
            ("seed", whole, lambda v: 0 <= v < 2**64, "between 0 and 2^64 - 1"),
        ):
            given = getattr(self, name)
            if name == "seed" and given is None:
                continue
            value = plain(name, given)
            if not good(value):
                raise InvalidArgumentError(f"{name} must be {expected}, got {shown(given)}")
            object.__setattr__(self, name, value)  # a numpy scalar is no number to JSON


class Sampler:
    """Draws tokens for one stream; remembers which tokens it has seen, and its random state."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], vocab_size: int):
        self.sampling = sampling
        self.vocab_size = vocab_size
        seed = int.from_bytes(os.urandom(8), "little") if sampling.seed is None else sampling.seed
        self.key = mx.random.key(seed)
        self.seen: mx.array | None = None
        if sampling.repetition_penalty != 1.0:
            self.seen = mx.zeros((vocab_size,), mx.bool_)
            known = [token for token in prompt if token < vocab_size]
            self.seen[mx.array(known, mx.uint32)] = True

    @property
    def state(self) -> list[mx.array]:
        """The arrays to evaluate with each token, so that the next may come on another thread."""
        return [self.key] if self.seen is None else [self.key, self.seen]

    def __call__(self, logits: mx.array) -> mx.array:
        """The next token (1,) from logits (1, V); NOT_A_NUMBER where they hold NaN."""
        token, self.key = self._next(logits[0], self.seen, self.key)
        if self.seen is not None:
            self.seen[mx.maximum(token, 0)] = True
        return token.reshape(1)

    def check(self, logits: mx.array, guesses: Sequence[int]) -> list[int]:
        """The next tokens, from logits (1 + guesses, V) of a pass that read the guesses: those
        that were right, and one more. Each is what it would have been without them."""
        seen, key = self.seen, self.key
        tokens, keys = [], []
        for row, guess in enumerate((*guesses, None)):
            token, key = self._next(logits[row], seen, key)
            tokens.append(token)
            keys.append(key)
            if seen is not None and guess is not None:
                seen = mx.array(seen)
                seen[guess] = True
        drawn: list[int] = mx.stack(tokens).tolist()  # type: ignore[assignment]
        pairs = enumerate(zip(drawn, guesses, strict=False))
        right = next((i for i, (token, guess) in pairs if token != guess), len(guesses))
        self.key = keys[right]
        if self.seen is not None:
            self.seen[mx.maximum(mx.array(drawn[: right + 1]), 0)] = True
        return drawn[: right + 1]

    def _next(
        self, logits: mx.array, seen: mx.array | None, key: mx.array
    ) -> tuple[mx.array, mx.array]:
        """The next token from logits (V,), and the key to draw the one after it with."""
        broken = mx.isnan(logits).any()
        logits = logits[: self.vocab_size].astype(mx.float32)
        if seen is not None:
            penalty = self.sampling.repetition_penalty
            punished = mx.where(logits > 0, logits / penalty, logits * penalty)
            logits = mx.where(seen, punished, logits)
        if self.sampling.temperature == 0:
            token = mx.argmax(logits)
        else:
            key, own = mx.random.split(key)
            token = self._draw(logits, own)
        return mx.where(broken, NOT_A_NUMBER, token.astype(mx.int32)), key

    def _draw(self, logits: mx.array, key: mx.array) -> mx.array:
        how = self.sampling
        # Less the largest first, so that a tiny temperature makes the others -inf, not all inf.
        logits = (logits - logits.max()) / max(how.temperature, 1e-30)
        if how.top_k == 0 and how.top_p == 1 and how.min_p == 0:
            return mx.random.categorical(logits, key=key)
        order = mx.argsort(-logits)
        if how.top_k:
            order = order[: min(how.top_k, self.vocab_size)]
        ranked = logits[order]
        probabilities = mx.softmax(ranked)
        before = mx.cumsum(probabilities) - probabilities
        keep = (before < how.top_p) & (probabilities >= how.min_p * probabilities[0])
        return order[mx.random.categorical(mx.where(keep, ranked, -mx.inf), key=key)]
