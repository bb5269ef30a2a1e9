"""Attention and SiLU that can be differentiated, with NumPy's exponentials: for x86 processors.

MLX takes 20 ns for an exponential there (see exponentials.py). What the gradient needs again is
computed again, so that only the inputs are kept, as MLX's own attention does.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from .. import device, exponentials
from ..model import MLP, Model


def use_fast_kernels(model: Model) -> None:
    """Have `model` compute attention and SiLU here, where MLX would be slower."""
    if not device.slow_exponentials():
        return
    for block in model.layers:
        block.self_attn.attention = attention
        if isinstance(block.mlp, MLP) and block.mlp.activation.threshold is None:
            mlp: Any = block.mlp
            mlp.activation = silu_times


def attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | str | None
) -> mx.array:
    """As mx.fast.scaled_dot_product_attention; arguments as in exponentials.attention."""
    B, H, T, D = q.shape
    K, S = k.shape[1:3]

    @mx.custom_function
    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return exponentials.attention(q, k, v, scale=scale, mask=mask)

    @attend.vjp
    def gradients(inputs: list[mx.array], above: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        q, k, v = inputs
        weights = exponentials.probabilities(q, k, scale=scale, mask=mask).reshape(B, K, -1, S)
        above = above.reshape(B, K, -1, D)
        dv = weights.swapaxes(-1, -2) @ above
        change = above @ v.swapaxes(-1, -2)  # (B, K, H / K * T, S)
        change = weights * (change - (change * weights).sum(axis=-1, keepdims=True)) * scale
        dk = change.swapaxes(-1, -2) @ q.reshape(B, K, -1, D)
        return (change @ k).reshape(B, H, T, D), dk, dv

    if q.dtype != mx.float32 or B * H * T * S < exponentials.FEW:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    out: Any = attend(q, k, v)
    return out


@mx.custom_function
def _silu_times(gate: mx.array, up: mx.array) -> mx.array:
    return exponentials.silu_times(gate, up)


@_silu_times.vjp
def _silu_gradients(
    inputs: list[mx.array], above: mx.array, _: mx.array
) -> tuple[mx.array, mx.array]:
    gate, up = inputs
    mx.eval(gate, up, above)
    F = gate.shape[-1]
    gates, ups, aboves = (np.asarray(array).reshape(-1, F) for array in (gate, up, above))
    to_gate, to_up = np.empty(gates.shape, np.float32), np.empty(gates.shape, np.float32)
    rows = exponentials.BLOCK // F + 1
    with np.errstate(over="ignore"):  # exp(100) is inf, and what is divided by it 0
        for start in range(0, len(gates), rows):
            at = slice(start, start + rows)
            sigmoid = 1 / (1 + np.exp(-gates[at]))
            silu = gates[at] * sigmoid
            np.multiply(aboves[at], silu, out=to_up[at])
            np.multiply(aboves[at] * ups[at], sigmoid + silu * (1 - sigmoid), out=to_gate[at])
    return mx.array(to_gate).reshape(gate.shape), mx.array(to_up).reshape(gate.shape)


def silu_times(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up, for arrays of one shape (..., F)."""
    if gate.dtype != mx.float32 or gate.size < exponentials.FEW:
        return gate * mx.sigmoid(gate) * up
    out: Any = _silu_times(gate, up)
    return out
