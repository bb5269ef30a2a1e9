"""Sampling: from logits to the next token, on the device."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from .. import device
from ..arguments import check_limits, is_whole, limited, number, shown
from ..errors import InvalidArgumentError
from .draw import UNDECIDED, Draw
from .token_mask import Grammar, masked

NOT_A_NUMBER = -1
"""Sampled instead of a token when the logits hold NaN, or cannot be drawn from."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings for drawing the next token; filters apply in the order of transformers."""

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
                f"must be a mapping of token ids, got {shown(self.logit_bias)}", field="logit_bias"
            )
        for token, bias in self.logit_bias.items():
            if not is_whole(token) or token < 0 or not -100 <= number("logit_bias", bias) <= 100:
                raise InvalidArgumentError(
                    "must give token ids numbers between -100 and 100, got "
                    f"{shown(token)}: {shown(bias)}",
                    field="logit_bias",
                )


class SamplerState(NamedTuple):
    """Everything that the next token depends on besides the logits."""

    key: mx.array
    """State of the random numbers."""
    num_tokens: int = 0
    """Tokens drawn so far."""
    seen: mx.array | None = None
    """(V,) whether a token is in the text; None without a repetition penalty."""
    counts: mx.array | None = None
    """(V,) how often a token is in the reply; None without the penalties that need it."""


class PastDraw(NamedTuple):
    """The logits of a draw, and the state before it."""

    logits: mx.array
    """(1, V)"""
    state: SamplerState


class Sampler:
    """Draws the tokens of one stream.

    No token of `eos` is drawn before `min_tokens` others were. With a `grammar`, tokens that it
    does not allow are never drawn; it must not be given to a second stream.

    A token may be UNDECIDED, which is known once it is computed, when the caller has drawn one more
    that it must drop: `rewind` returns the logits to draw from again, with `decide`.
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
        self.draw = Draw(
            vocab_size,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        )
        self.past: deque[PastDraw] = deque(maxlen=2)
        """The last two draws: one more is made before it is known that one was undecided."""
        seed = int.from_bytes(os.urandom(8), "little") if sampling.seed is None else sampling.seed
        seen = counts = None
        if sampling.repetition_penalty != 1.0:
            seen = mx.zeros((vocab_size,), mx.bool_)
            seen[mx.array([token for token in prompt if token < vocab_size], mx.uint32)] = True
        if sampling.frequency_penalty or sampling.presence_penalty:
            counts = mx.zeros((vocab_size,), mx.float32)
        self.state = SamplerState(mx.random.key(seed), seen=seen, counts=counts)
        self.bias = self._dense(sampling.logit_bias)
        self.eos_bias = self._dense(dict.fromkeys(self.eos, -mx.inf)) if min_tokens else None
        self.last: mx.array | None = None
        """The last token (1,), which the grammar has not accepted yet."""

    def _dense(self, values: Mapping[int, float]) -> mx.array | None:
        """(V,) with these values and 0 elsewhere; None where all are 0."""
        values = {token: value for token, value in values.items() if token < self.vocab_size}
        if not values:
            return None
        array = mx.zeros((self.vocab_size,))
        array[mx.array(list(values))] = mx.array(list(values.values()))
        return array

    @property
    def arrays(self) -> list[mx.array]:
        """The arrays to evaluate with each token; lazy ones bind the next to this thread."""
        return [array for array in self.state if isinstance(array, mx.array)]

    def __call__(self, logits: mx.array, decide: bool = False) -> mx.array:
        """Draw the next token (1,) from logits (1, V); NOT_A_NUMBER where they hold NaN."""
        bits = None
        self.past.append(PastDraw(logits, self.state))
        if self.grammar is not None:
            mx.async_eval(logits)  # the device computes while the grammar waits for the last token
            self._accept_last()
            bits = self.grammar.allowed()
        token, self.state = self._next(logits[0], self.state, bits, decide)
        self.last = token.reshape(1)
        return self.last

    def rewind(self, draws: int) -> mx.array:
        """Undo the last `draws`, 1 or 2; return the logits (1, V) of the first of them."""
        for _ in range(draws):
            logits, self.state = self.past.pop()
        self.last = None
        return logits

    def _accept_last(self) -> None:
        """Advance the grammar by the last token."""
        if self.grammar is not None and self.last is not None:
            token: Any = self.last.item()
            if self._is_text(token):
                self.grammar.accept(token)
        self.last = None

    def _is_text(self, token: int) -> bool:
        return token >= 0 and token not in self.eos

    def verify(self, logits: mx.array, draft: Sequence[int]) -> list[int]:
        """Draw from logits (1 + draft, V) of a pass that read `draft`.

        Returns the draft tokens that are accepted, and one more token; each is the one that would
        have been drawn without a draft.
        """
        self._accept_last()
        # states[i] is the state before row i, if all draft tokens before it are accepted.
        states, rows, masks = [self.state], list[mx.array](), list[np.ndarray | None]()
        advanced = 0  # draft tokens that the grammar has accepted
        for row, draft_token in enumerate((*draft, None)):
            bits = self.grammar.allowed() if self.grammar is not None else None
            token, after = self._next(logits[row], states[-1], bits)
            rows.append(token)
            masks.append(bits)
            if draft_token is None:
                states.append(after)
                break
            states.append(self._count(after, states[-1], mx.array(draft_token)))
            if self.grammar is not None and bits is not None:
                is_allowed = bits[draft_token // 32] >> (draft_token % 32) & 1
                if not is_allowed or not self._is_text(draft_token):
                    break  # this row cannot draw it, or ends the text with it
                self.grammar.accept(draft_token)
                advanced += 1
        drawn: list[int] = mx.stack(rows).tolist()  # type: ignore[assignment]
        for row, token_id in enumerate(drawn):
            if token_id == UNDECIDED:
                rows[row], _ = self._next(logits[row], states[row], masks[row], decide=True)
                drawn[row] = int(rows[row].item())  # type: ignore[arg-type]
        pairs = enumerate(zip(drawn, draft, strict=False))
        accepted = next((i for i, (token, drafted) in pairs if token != drafted), len(drawn) - 1)
        if self.grammar is not None:
            self.grammar.rollback(advanced - accepted)
        # The key after the last row drawn, but the counts of the token drawn, not of the draft's.
        self.state = self._count(states[accepted + 1], states[accepted], rows[accepted])
        self.last = rows[accepted].reshape(1)
        return drawn[: accepted + 1]

    def _next(
        self,
        logits: mx.array,
        state: SamplerState,
        bits: np.ndarray | None,
        decide: bool = False,
    ) -> tuple[mx.array, SamplerState]:
        """Draw from logits (V,); return the token and the state after it."""
        has_nan = mx.isnan(logits).any()
        logits = self._adjust(logits[: self.vocab_size].astype(mx.float32), state)
        if bits is not None:
            logits = masked(logits, bits)
        key = state.key
        if self.sampling.temperature == 0:
            token = mx.argmax(logits)
        else:
            key, random = self.draw.split(key)
            if decide or device.on_cpu():
                mx.eval(has_nan, logits, random)
                drawn, values = NOT_A_NUMBER, np.array(logits)
                if np.isfinite(values.max()):  # an infinite one has no probability
                    drawn = self.draw.on_host(values, np.array(random))
                token = mx.array(drawn)
            else:
                token = self.draw.on_device(logits, random).reshape(())
        token = mx.where(has_nan, NOT_A_NUMBER, token.astype(mx.int32))
        return token, self._count(state._replace(key=key), state, token)

    def _adjust(self, logits: mx.array, state: SamplerState) -> mx.array:
        """Apply penalties and biases to logits (V,)."""
        sampling = self.sampling
        if state.seen is not None:
            logits = _penalize(logits, state.seen, sampling.repetition_penalty)
        if state.counts is not None:
            logits = logits - sampling.frequency_penalty * state.counts
            logits = logits - sampling.presence_penalty * (state.counts > 0)
        if self.bias is not None:
            logits = logits + self.bias
        if self.eos_bias is not None and state.num_tokens < self.min_tokens:
            logits = logits + self.eos_bias
        return logits

    def _count(self, state: SamplerState, before: SamplerState, token: mx.array) -> SamplerState:
        """Return `state` with the counts of `before` and `token`."""
        ids = self.draw.ids
        return state._replace(
            num_tokens=before.num_tokens + 1,
            seen=None if before.seen is None else _add(before.seen, ids, token),
            counts=None if before.counts is None else _add(before.counts, ids, token),
        )


@partial(mx.compile, shapeless=True)
def _penalize(logits: mx.array, seen: mx.array, penalty: float) -> mx.array:
    """Divide positive and multiply negative logits (V,) of the tokens seen (V,)."""
    factor = 1 + seen * (penalty - 1)
    # Of the two the lower, or with a penalty below 1 the higher: a CPU takes longer to `where`.
    stronger = mx.minimum if penalty > 1 else mx.maximum
    return stronger(logits / factor, logits * factor)


@partial(mx.compile, shapeless=True)
def _add(tokens: mx.array, ids: mx.array, token: mx.array) -> mx.array:
    """Add a token () to those seen, or to the counts of tokens (V,)."""
    is_token = ids == token
    return tokens | is_token if tokens.dtype == mx.bool_ else tokens + is_token
