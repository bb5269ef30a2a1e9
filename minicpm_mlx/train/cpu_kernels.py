"""Attention and SiLU that can be differentiated, with NumPy's exponentials: for x86 processors.

MLX takes 20 ns for an exponential there (see exponentials.py). What the gradient needs again is
computed again, so that only the inputs are kept, as MLX's own attention does.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from .. import device
from ..model.kernels import cpu_softmax
from ..model.kernels.cpu_softmax import Floats
from ..model.transformer import MLP, Model


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
    B, H, T, _ = q.shape
    S = k.shape[2]

    @mx.custom_function
    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return _values(cpu_softmax.attention(q, k, v, scale=scale, mask=mask))

    @attend.vjp
    def gradients(inputs: list[mx.array], above: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        q, k, _ = inputs
        texts = []
        for number in range(B):  # one at a time, as each needs several times its T * S
            one = slice(number, number + 1)
            seen = mask[one] if isinstance(mask, mx.array) and len(mask) == B else mask
            weights = cpu_softmax.probabilities(q[one], k[one], scale=scale, mask=seen)
            arrays = [np.array(array[number]) for array in (*inputs, above)]
            looked = np.array(weights, copy=False)[0]
            texts.append(_attention_gradients(looked, *arrays, scale=scale))
        return tuple(mx.array(np.stack(parts)) for parts in zip(*texts, strict=True))

    if q.dtype != mx.float32 or B * H * T * S < cpu_softmax.FEW:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    out: Any = attend(q, k, v)
    return out


def _values(array: mx.array) -> mx.array:
    """`array`, of which MLX does not know what it was made of: it holds all of that while it
    differentiates."""
    return mx.array(np.array(array))


@np.errstate(invalid="ignore", over="ignore")
def _attention_gradients(
    weights: Floats, q: Floats, k: Floats, v: Floats, above: Floats, *, scale: float
) -> tuple[Floats, Floats, Floats]:
    """With respect to q (H, T, D), k and v (K, S, D), of the gradient `above` at the output.

    `weights` (H, T, S) says how much each query looked at each key.
    """
    H, T, D = q.shape
    K, S, _ = k.shape
    weights, above = weights.reshape(K, -1, S), above.reshape(K, -1, D)
    dv = weights.swapaxes(-1, -2) @ above
    change = above @ v.swapaxes(-1, -2)  # (K, H / K * T, S)
    change -= np.einsum("kts,kts->kt", change, weights)[..., None]
    change *= weights
    change *= scale
    dk = change.swapaxes(-1, -2) @ q.reshape(K, -1, D)
    return (change @ k).reshape(H, T, D), dk, dv


@mx.custom_function
def _silu_times(gate: mx.array, up: mx.array) -> mx.array:
    return cpu_softmax.silu_times(gate, up)


@_silu_times.vjp
def _silu_gradients(
    inputs: list[mx.array], above: mx.array, _: mx.array
) -> tuple[mx.array, mx.array]:
    gate, up = inputs
    mx.eval(gate, up, above)
    F = gate.shape[-1]
    gates, ups, aboves = (np.asarray(array).reshape(-1, F) for array in (gate, up, above))
    to_gate, to_up = np.empty(gates.shape, np.float32), np.empty(gates.shape, np.float32)
    rows = cpu_softmax.BLOCK // F + 1
    with np.errstate(
        over="ignore", invalid="ignore"
    ):  # exp(100) is inf, and what is divided by it 0
        for start in range(0, len(gates), rows):
            at = slice(start, start + rows)
            sigmoid = 1 / (1 + np.exp(-gates[at]))
            silu = gates[at] * sigmoid
            np.multiply(aboves[at], silu, out=to_up[at])
            np.multiply(aboves[at] * ups[at], sigmoid + silu * (1 - sigmoid), out=to_gate[at])
    return mx.array(to_gate).reshape(gate.shape), mx.array(to_up).reshape(gate.shape)


def silu_times(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up, for arrays of one shape (..., F)."""
    if gate.dtype != mx.float32 or gate.size < cpu_softmax.FEW:
        return gate * mx.sigmoid(gate) * up
    out: Any = _silu_times(gate, up)
    return out
