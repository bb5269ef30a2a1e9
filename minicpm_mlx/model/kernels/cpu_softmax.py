"""Attention, SiLU and softmax for long passes on x86, with NumPy's exponentials.

MLX takes 20 ns for an exponential on x86 and NumPy half a nanosecond; exponentials were most of the
time of a prefill. NumPy needs values, so the arguments are evaluated at once, and nothing here has
a gradient: train/cpu_kernels.py has forms that do.
"""

from __future__ import annotations

from itertools import product

import mlx.core as mx
import numpy as np
import numpy.typing as npt

FEW = 20_000
"""Exponentials below which MLX computes them itself: waiting for values costs more."""

BLOCK = 1 << 16
"""Numbers processed at a time, so that they stay in the processor's cache."""

Floats = npt.NDArray[np.float32]


def attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | str | None
) -> mx.array:
    """As mx.fast.scaled_dot_product_attention: q (B, H, T, D), k (B, K, S, D) and v (B, K, S, V) to
    (B, H, T, V).

    `mask` is "causal", a boolean array (..., T, S) of what a query sees, or None for all.
    """
    B, H, T, _ = q.shape
    K, S = k.shape[1:3]
    additive = isinstance(mask, mx.array) and mask.dtype != mx.bool_
    if additive or q.dtype != mx.float32 or B * H * T * S < FEW:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    weights = probabilities(q, k, scale=scale, mask=mask)
    return (weights.reshape(B, K, -1, S) @ v).reshape(B, H, T, -1)


def probabilities(
    q: mx.array, k: mx.array, *, scale: float, mask: mx.array | str | None
) -> mx.array:
    """Return attention weights (B, H, T, S), for arguments as of `attention`."""
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    queries = (q * scale).reshape(B, K, -1, D)  # the H / K heads that share keys, together
    scores = (queries @ k.swapaxes(-1, -2)).reshape(B, H, T, S)
    if isinstance(mask, mx.array):  # not -inf: a row that sees nothing, padding, would become NaN
        scores = mx.where(mask, scores, mx.finfo(mx.float32).min)
    _softmax_in_place(np.array(scores, copy=False).reshape(-1, T, S), causal=isinstance(mask, str))
    return scores


@np.errstate(invalid="ignore")
def _softmax_in_place(scores: Floats, *, causal: bool) -> None:
    """Softmax of scores (heads, T, S)."""
    heads, T, S = scores.shape
    rows = min(max(BLOCK // S, 1), T)
    future = np.triu(np.full((rows, rows), -np.inf, np.float32), 1)
    for head, start in product(range(heads), range(0, T, rows)):
        block = scores[head, start : start + rows]
        if causal:
            n = len(block)
            seen = S - T + start + n
            block[:, seen:] = 0
            block = block[:, :seen]
            block[:, seen - n :] += future[:n, :n]
        block -= block.max(axis=-1, keepdims=True)
        np.exp(block, out=block)
        block /= block.sum(axis=-1, keepdims=True)


@np.errstate(invalid="ignore")  # callers check for NaN themselves
def softmax(logits: mx.array) -> tuple[mx.array, mx.array]:
    """Softmax of logits (N, V), whose memory it takes over, and their logsumexp (N,)."""
    rows = np.array(logits, copy=False)
    logs = np.empty(len(rows), np.float32)
    step = max(BLOCK // rows.shape[1], 1)
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        largest = block.max(axis=-1, keepdims=True)
        block -= largest
        np.exp(block, out=block)
        total = block.sum(axis=-1, keepdims=True)
        block /= total
        logs[start : start + step] = (np.log(total) + largest)[:, 0]
    return logits, mx.array(logs)


@np.errstate(invalid="ignore")
def logsumexp(logits: mx.array) -> mx.array:
    """The logarithm of the sum of exponentials (N,) of logits (N, V)."""
    rows = np.asarray(logits)
    logs = np.empty(len(rows), np.float32)
    step = max(BLOCK // rows.shape[1], 1)
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        largest = block.max(axis=-1, keepdims=True)
        shifted = block - largest
        total = np.exp(shifted, out=shifted).sum(axis=-1, keepdims=True)
        logs[start : start + step] = (np.log(total) + largest)[:, 0]
    return mx.array(logs)


@np.errstate(over="ignore", invalid="ignore")  # exp(100) is inf, and dividing by it gives 0
def silu_mul(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up, for arrays of one shape (..., F)."""
    if gate.dtype != mx.float32 or gate.size < FEW:
        return gate * mx.sigmoid(gate) * up
    mx.eval(gate, up)
    F = gate.shape[-1]
    gates, ups = np.asarray(gate).reshape(-1, F), np.asarray(up).reshape(-1, F)
    out = np.empty(gates.shape, np.float32)
    step = BLOCK // F + 1
    for start in range(0, len(out), step):
        rows = slice(start, start + step)
        divisor = np.exp(-gates[rows])
        divisor += 1
        np.divide(gates[rows], divisor, out=out[rows])
        out[rows] *= ups[rows]
    return mx.array(out).reshape(gate.shape)
