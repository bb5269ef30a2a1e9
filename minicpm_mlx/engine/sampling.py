"""Logits to the next token, on the device."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..arguments import check_limits, is_whole, limited, number, shown
from ..errors import InvalidArgumentError
from .grammar import Grammar, masked

NOT_A_NUMBER = -1
"""Sampled instead of a token when the logits hold NaN."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn; the order of the filters is that of transformers."""

    temperature: float = limited(0.0, least=0, most=100)
    """Divides the logits; 0 takes the likeliest token (greedy), and of the other fields only the
    penalties and the bias matter."""
    top_p: float = limited(1.0, above=0, most=1)
    """Keep the likeliest tokens that together reach this probability; 1 keeps all."""
    top_k: int = limited(0, least=0, whole=True)
    """Keep this many of the likeliest tokens; 0 keeps all."""
    min_p: float = limited(0.0, least=0, most=1)
    """Drop tokens less likely than this share of the likeliest."""
    repetition_penalty: float = limited(1.0, above=0.01, most=100)
    """Divides positive and multiplies negative logits of every token of the text so far. Above
    0.01, at most 100: a hundredfold either way keeps any logit below 3e36 finite in float32."""
    frequency_penalty: float = limited(0.0, least=-2, most=2)
    """Taken from a token's logit for each time it is in the reply; from -2 to 2."""
    presence_penalty: float = limited(0.0, least=-2, most=2)
    """Taken once from the logit of every token that is in the reply; from -2 to 2."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens; from -100 to 100."""
    seed: int | None = limited(None, least=0, most=2**64 - 1, whole=True)
    """Same seed, same text; None draws one."""

    def __post_init__(self) -> None:
        check_limits(self)
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidArgumentError(
                f"logit_bias must be a mapping of token ids, got {shown(self.logit_bias)}",
                field="logit_bias",
            )
        for token, bias in self.logit_bias.items():
            if not is_whole(token) or token < 0 or not -100 <= number("logit_bias", bias) <= 100:
                raise InvalidArgumentError(
                    "logit_bias must give token ids numbers between -100 and 100, got "
                    f"{shown(token)}: {shown(bias)}",
                    field="logit_bias",
                )


class SamplerState(NamedTuple):
    """What the next token depends on besides the logits."""

    key: mx.array
    """State of the random numbers."""
    made: int = 0
    """Tokens drawn so far."""
    seen: mx.array | None = None
    """(V,) whether a token is in the text; None where that does not matter."""
    counts: mx.array | None = None
    """(V,) how often a token is in the reply; None where that does not matter."""


class Sampler:
    """Draws tokens for one stream, and remembers what of its text bears on the next one.

    No token of `eos` is drawn before `min_tokens` others were. With a `grammar`, tokens that it
    does not allow are never drawn; it must not be given to a second stream.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        vocab_size: int,
        *,
        grammar: Grammar | None = None,
        eos: Collection[int] = (),
        min_tokens: int = 0,
    ):
        self.sampling, self.vocab_size, self.grammar = sampling, vocab_size, grammar
        self.eos, self.min_tokens = frozenset(eos), min_tokens
        self.ids = mx.arange(vocab_size)
        seed = int.from_bytes(os.urandom(8), "little") if sampling.seed is None else sampling.seed
        seen = counts = None
        if sampling.repetition_penalty != 1.0:
            seen = mx.zeros((vocab_size,), mx.bool_)
            known = [token for token in prompt if token < vocab_size]
            seen[mx.array(known, mx.uint32)] = True
        if sampling.frequency_penalty or sampling.presence_penalty:
            counts = mx.zeros((vocab_size,), mx.float32)
        self.past = SamplerState(mx.random.key(seed), seen=seen, counts=counts)
        self.bias = self._of(sampling.logit_bias)
        self.no_end = self._of(dict.fromkeys(self.eos, -mx.inf)) if min_tokens else None
        self.unread: mx.array | None = None
        """The last token (1,), which the grammar does not know yet."""

    def _of(self, values: Mapping[int, float]) -> mx.array | None:
        """(V,) these values, and 0 elsewhere."""
        known = {token: value for token, value in values.items() if token < self.vocab_size}
        if not known:
            return None
        array = mx.zeros((self.vocab_size,))
        array[mx.array(list(known))] = mx.array(list(known.values()))
        return array

    @property
    def state(self) -> list[mx.array]:
        """The arrays to evaluate with each token, so that the next may come on another thread."""
        return [part for part in self.past if isinstance(part, mx.array)]

    def __call__(self, logits: mx.array) -> mx.array:
        """The next token (1,) from logits (1, V); NOT_A_NUMBER where they hold NaN."""
        bits = None
        if self.grammar is not None:
            mx.async_eval(logits)  # the device works on while the grammar waits for the last token
            self._tell()
            bits = self.grammar.allowed()
        token, self.past = self._next(logits[0], self.past, bits)
        self.unread = token.reshape(1)
        return self.unread

    def _tell(self) -> None:
        """Let the grammar know the last token."""
        last: Any = None if self.unread is None else self.unread.item()
        if self.grammar is not None and last is not None and self._grows(last):
            self.grammar.accept(last)
        self.unread = None

    def _grows(self, token: int) -> bool:
        return token != NOT_A_NUMBER and token not in self.eos

    def check(self, logits: mx.array, guesses: Sequence[int]) -> list[int]:
        """The next tokens, from logits (1 + guesses, V) of a pass that read the guesses: those
        that were right, and one more. Each is what it would have been without them."""
        self._tell()
        pasts, tokens = [self.past], []
        told = 0  # guesses that the grammar was told
        for row, guess in enumerate((*guesses, None)):
            bits = self.grammar.allowed() if self.grammar is not None else None
            token, past = self._next(logits[row], pasts[-1], bits)
            tokens.append(token)
            pasts.append(past if guess is None else self._with(past, pasts[-1], mx.array(guess)))
            if guess is None:
                break
            if self.grammar is not None and bits is not None:
                if not bits[guess // 32] >> (guess % 32) & 1 or not self._grows(guess):
                    break  # it will not be drawn either
                self.grammar.accept(guess)
                told += 1
        drawn: list[int] = mx.stack(tokens).tolist()  # type: ignore[assignment]
        pairs = enumerate(zip(drawn, guesses, strict=False))
        right = next((i for i, (token, guess) in pairs if token != guess), len(drawn) - 1)
        if self.grammar is not None:
            self.grammar.rollback(told - right)
        self.past = self._with(pasts[right + 1], pasts[right], tokens[right])
        self.unread = tokens[right].reshape(1)
        return drawn[: right + 1]

    def _next(
        self, logits: mx.array, past: SamplerState, bits: np.ndarray | None
    ) -> tuple[mx.array, SamplerState]:
        """The next token from logits (V,), and what the one after it depends on."""
        how, broken = self.sampling, mx.isnan(logits).any()
        logits = logits[: self.vocab_size].astype(mx.float32)
        if past.seen is not None:
            penalty = how.repetition_penalty
            punished = mx.where(logits > 0, logits / penalty, logits * penalty)
            logits = mx.where(past.seen, punished, logits)
        if past.counts is not None:
            logits = logits - how.frequency_penalty * past.counts
            logits = logits - how.presence_penalty * (past.counts > 0)
        if self.bias is not None:
            logits = logits + self.bias
        if self.no_end is not None and past.made < self.min_tokens:
            logits = logits + self.no_end
        if bits is not None:
            logits = masked(logits, bits)
        key = past.key
        if how.temperature == 0:
            token = mx.argmax(logits)
        else:
            key, own = mx.random.split(key)
            token = self._draw(logits, own)
        token = mx.where(broken, NOT_A_NUMBER, token.astype(mx.int32))
        return token, self._with(past._replace(key=key), past, token)

    def _with(self, past: SamplerState, before: SamplerState, token: mx.array) -> SamplerState:
        """`past`, with `token` added to what was `before`."""
        here = self.ids == token
        return past._replace(
            made=before.made + 1,
            seen=None if before.seen is None else before.seen | here,
            counts=None if before.counts is None else before.counts + here,
        )

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
