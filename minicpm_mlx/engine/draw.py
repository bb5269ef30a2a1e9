"""Draws a token as temperature, top_k, top_p and min_p say, without sorting the logits.

A sort of 122,753 logits takes a GPU dozens of kernels, and a CPU longer than some layers. Instead a
token is drawn from all that top_k and min_p allow, and taken if the tokens before it, in the order
of their logits, have less than top_p of the probability; else another is drawn. Those taken are
distributed as if drawn from the tokens that top_p keeps.

A GPU makes several tries at once. Where all fail, the token is UNDECIDED, which is known only once
it is computed: then the processor draws, which can try until one is taken.
"""

from __future__ import annotations

import math
from functools import partial

import mlx.core as mx
import numpy as np

UNDECIDED = -2
"""Drawn instead of a token where all tries failed."""

FAILURES = 1 / 500
"""Share of draws that may be UNDECIDED, as long as MAX_TRIES suffice."""

MAX_TRIES = 16

ONE = 2.0**44
"""Weight of the likeliest token: the 24 bits of a probability are whole, and sums below 2**62."""

NOT_TAKEN = 1 << 62

BLOCK = 32
"""Logits of which only the largest is compared. MLX sorts up to 4096 numbers in one kernel."""


class Draw:
    """Draws from logits. The filters apply in the order top_k, top_p, min_p.

    Of equal logits the one with the lower id comes first.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        temperature: float,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
    ):
        self.top_k = top_k if top_k < vocab_size else 0
        self.temperature = max(temperature, 1e-30)  # so small, it leaves the largest logit alone
        # A little less than asked for: rounding is not to decide about a token exactly there.
        self.min_p = min_p * (1 - 1e-6)
        self.top_p = top_p - 1e-6 if top_p < 1 else 1.0
        tries = math.log(FAILURES) / math.log(1 - self.top_p) if top_p < 1 else 1
        self.tries = min(math.ceil(tries), MAX_TRIES)
        self.ids, self.numbers = mx.arange(vocab_size), mx.arange(self.tries)
        self.settings = [mx.array(x) for x in (1 / self.temperature, self.min_p, 1 - self.top_p)]
        mx.eval(self.ids, self.numbers, self.settings)

    def split(self, key: mx.array) -> tuple[mx.array, mx.array]:
        """Return the next key and the random numbers, uint32 (>= tries,), of a draw."""
        keys = mx.random.split(key, 1 + -(-self.tries // 2))
        return keys[:1].flatten(), keys[1:].flatten()

    def on_host(self, logits: np.ndarray, random: np.ndarray) -> int:
        """Draw a token from float32 logits (V,), of which the largest is finite."""
        uniform = np.random.default_rng(random).random
        weights = np.exp((logits - logits.max()) / np.float32(self.temperature)).astype(np.float64)
        if self.top_k:
            kth = np.partition(logits, -self.top_k)[-self.top_k]
            weights[logits < kth] = 0
            weights[np.flatnonzero(logits == kth)[self.top_k - np.sum(logits > kth) :]] = 0
        limit = self.top_p * weights.sum()
        allowed = np.where(weights >= self.min_p, weights, 0) if self.min_p else weights
        while True:
            token = _pick(allowed, uniform())
            if self.top_p == 1:
                return token
            before = logits > logits[token]
            before[:token] |= logits[:token] == logits[token]
            if (weights * before).sum() < limit:
                return token
            allowed = allowed * before  # what comes after it is not kept either

    def on_device(self, logits: mx.array, random: mx.array) -> mx.array:
        """Draw a token (1,) from float32 logits (V,), lazily; it may be UNDECIDED."""
        inverse_temperature, min_p, dropped = self.settings
        weights, allowed = _weigh(logits, logits.max(), inverse_temperature, min_p)
        if self.top_k:
            above, equal = _compare(logits, _largest(logits, self.top_k))
            room = self.top_k - above.sum(keepdims=True)
            weights, allowed = _cut(weights, allowed, above, equal, mx.cumsum(equal), room)
        sums = mx.cumsum(allowed)
        drawn = _share(random[: self.tries], sums[-1:])
        tokens = (sums[:-1] <= drawn[:, None]).sum(axis=-1)  # (tries,)
        if self.top_p == 1:
            return tokens
        total = weights.sum(keepdims=True) if self.min_p else sums[-1:]
        before = _weights_before(
            weights, logits, logits[tokens][:, None], self.ids, tokens[:, None]
        )
        taken = _number(before.sum(axis=-1), total, dropped, tokens, self.numbers)
        return _token(taken.min(keepdims=True))


def _pick(weights: np.ndarray, share: float) -> int:
    """Index at which the sum of the weights (V,) exceeds this share of it, in two steps."""
    starts = np.arange(0, weights.size, 256)
    sums = np.cumsum(np.add.reduceat(weights, starts))
    target = share * float(sums[-1])
    block = _first_above(sums, target)
    begin = int(starts[block])
    target -= float(sums[block - 1]) if block else 0.0
    return begin + _first_above(np.cumsum(weights[begin : begin + 256]), target)


def _first_above(sums: np.ndarray, target: float) -> int:
    """Index of the first sum above the target, which rounding may have raised to the last."""
    return int(np.searchsorted(sums, min(target, np.nextafter(sums[-1], 0)), side="right"))


def _largest(logits: mx.array, k: int) -> mx.array:
    """The kth largest (1,) of the logits (V,)."""
    blocks = logits.size // BLOCK
    candidates = logits
    if k < blocks:  # the k blocks with the largest maxima hold the k largest logits
        grid = logits[: blocks * BLOCK].reshape(BLOCK, blocks)
        chosen = mx.argpartition(grid.max(axis=0), blocks - k)[blocks - k :]
        candidates = mx.concatenate([grid[:, chosen].flatten(), logits[blocks * BLOCK :]])
    return mx.sort(candidates)[candidates.size - k :][:1]


@partial(mx.compile, shapeless=True)
def _compare(logits: mx.array, value: mx.array) -> tuple[mx.array, mx.array]:
    return (logits > value).astype(mx.int32), (logits == value).astype(mx.int32)


@partial(mx.compile, shapeless=True)
def _weigh(
    logits: mx.array, largest: mx.array, inverse_temperature: mx.array, min_p: mx.array
) -> tuple[mx.array, mx.array]:
    """Probabilities in proportion, as whole numbers: their sums are the same in any order.

    Returns those of all logits, and the same with 0 where min_p allows none.
    """
    ratio = mx.exp((logits - largest) * inverse_temperature)
    weights = (ratio * ONE).astype(mx.int64)
    return weights, weights * (ratio >= min_p)


@partial(mx.compile, shapeless=True)
def _cut(
    weights: mx.array,
    allowed: mx.array,
    above: mx.array,
    equal: mx.array,
    number: mx.array,
    room: mx.array,
) -> tuple[mx.array, mx.array]:
    """Both weights, 0 but for tokens above the kth and the first of those equal to it."""
    keep = (above + equal * (number <= room)) > 0
    return weights * keep, allowed * keep


@partial(mx.compile, shapeless=True)
def _share(random: mx.array, total: mx.array) -> mx.array:
    """random / 2**32 of the total, rounded down, without exceeding 64 bits."""
    random, total = random.astype(mx.uint64), total.astype(mx.uint64)
    high = total >> 32
    low = total - (high << 32)
    return (random * high + ((random * low) >> 32)).astype(mx.int64)


@partial(mx.compile, shapeless=True)
def _weights_before(
    weights: mx.array, logits: mx.array, logit: mx.array, ids: mx.array, token: mx.array
) -> mx.array:
    """(tries, V), 0 where a token is not before the one of the try."""
    return weights * ((logits > logit) | ((logits == logit) & (ids < token.astype(mx.int32))))


@partial(mx.compile, shapeless=True)
def _number(
    before: mx.array, total: mx.array, dropped: mx.array, tokens: mx.array, tries: mx.array
) -> mx.array:
    """The number of each try with its token in one; NOT_TAKEN where too much comes before it."""
    limit = total - (total.astype(mx.float32) * dropped).astype(mx.int64)
    number = (tries.astype(mx.int64) << 32) + tokens.astype(mx.int64)
    return mx.where(before < limit, number, mx.array(NOT_TAKEN, mx.int64))


@partial(mx.compile, shapeless=True)
def _token(number: mx.array) -> mx.array:
    """The token of the number, or UNDECIDED."""
    undecided = mx.array(UNDECIDED, mx.int32)
    return mx.where(number == mx.array(NOT_TAKEN, mx.int64), undecided, number.astype(mx.int32))
