"""Training on a CPU: immediate evaluation, and on x86 NumPy's exponentials.

All CPU-specific choices of training are made here; on a GPU these functions leave work to MLX.
MLX takes 20 ns for an exponential on x86 (see model/kernels/cpu_softmax.py). The kernels recompute
what their gradients need, so that only inputs are kept, as MLX's own attention does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from .. import device
from ..model.feed_forward import MLP
from ..model.kernels import cpu_softmax
from ..model.kernels.cpu_softmax import Floats
from ..model.transformer import Model


def are_faster() -> bool:
    """Whether the kernels here are faster than MLX's."""
    return device.slow_exponentials()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles `function` for a GPU; compiling for a CPU takes seconds and gains nothing."""
    return function if device.on_cpu() else mx.compile(function)


def evaluate(*arrays: object) -> None:
    """Evaluates arrays on a CPU, which has no other work meanwhile, to free memory early."""
    if device.on_cpu():
        mx.eval(arrays)


def detach(array: mx.array) -> mx.array:
    """Copies the values of `array` on a CPU. MLX holds all inputs of an array while it
    differentiates; a copy has none."""
    if not device.on_cpu():
        return array
    return mx.array(np.array(array.astype(mx.float32))).astype(array.dtype)


def use_fast_kernels(model: Model) -> None:
    """Makes `model` compute attention and SiLU here, if that is faster."""
    if not are_faster():
        return
    for block in model.layers:
        block.self_attn.attention = attention
        if isinstance(block.mlp, MLP) and block.mlp.activation.threshold is None:
            mlp: Any = block.mlp
            mlp.activation = silu_times


def loss_and_gradient(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Cross-entropy (n,) and its gradient (n, V) for logits (n, V), which are overwritten."""
    target_logits = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    mx.eval(target_logits, logits)
    probabilities, logs = cpu_softmax.softmax(logits)
    rows = np.array(probabilities, copy=False)
    rows[np.arange(len(rows)), np.array(targets)] -= 1
    return logs - target_logits, probabilities


def attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | str | None
) -> mx.array:
    """Like mx.fast.scaled_dot_product_attention; arguments as in cpu_softmax.attention."""
    B, H, T, _ = q.shape
    S = k.shape[2]

    @mx.custom_function
    def forward(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        out = cpu_softmax.attention(q, k, v, scale=scale, mask=mask)
        return mx.array(np.array(out))  # detached: see `detach`

    @forward.vjp
    def backward(inputs: list[mx.array], above: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        q, k, _ = inputs
        gradients = []
        for index in range(B):  # one text at a time: each needs several times T * S
            text = slice(index, index + 1)
            own_mask = mask[text] if isinstance(mask, mx.array) and len(mask) == B else mask
            weights = cpu_softmax.probabilities(q[text], k[text], scale=scale, mask=own_mask)
            arrays = [np.array(array[index]) for array in (*inputs, above)]
            values = np.array(weights, copy=False)[0]
            gradients.append(_attention_gradients(values, *arrays, scale=scale))
        return tuple(mx.array(np.stack(texts)) for texts in zip(*gradients, strict=True))

    if q.dtype != mx.float32 or B * H * T * S < cpu_softmax.FEW:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    out: Any = forward(q, k, v)
    return out


@np.errstate(invalid="ignore", over="ignore")
def _attention_gradients(
    weights: Floats, q: Floats, k: Floats, v: Floats, above: Floats, *, scale: float
) -> tuple[Floats, Floats, Floats]:
    """Gradients of q (H, T, D), k (K, S, D) and v (K, S, V), given that of the output, `above`
    (H, T, V), and the attention weights (H, T, S)."""
    H, T, D = q.shape
    K, S, _ = k.shape
    weights, above = weights.reshape(K, -1, S), above.reshape(K, -1, above.shape[-1])
    dv = weights.swapaxes(-1, -2) @ above
    scores = above @ v.swapaxes(-1, -2)  # (K, H / K * T, S)
    scores -= np.einsum("kts,kts->kt", scores, weights)[..., None]
    scores *= weights
    scores *= scale
    dk = scores.swapaxes(-1, -2) @ q.reshape(K, -1, D)
    return (scores @ k).reshape(H, T, D), dk, dv


@mx.custom_function
def _silu_times(gate: mx.array, up: mx.array) -> mx.array:
    return cpu_softmax.silu_mul(gate, up)


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
    with np.errstate(over="ignore", invalid="ignore"):  # exp(100) is inf, and 1 / inf is 0
        for start in range(0, len(gates), rows):
            block = slice(start, start + rows)
            sigmoid = 1 / (1 + np.exp(-gates[block]))
            silu = gates[block] * sigmoid
            slope = sigmoid + silu * (1 - sigmoid)
            np.multiply(aboves[block], silu, out=to_up[block])
            np.multiply(aboves[block] * ups[block], slope, out=to_gate[block])
    return mx.array(to_gate).reshape(gate.shape), mx.array(to_up).reshape(gate.shape)


def silu_times(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up, for arrays of one shape (..., F)."""
    if gate.dtype != mx.float32 or gate.size < cpu_softmax.FEW:
        return gate * mx.sigmoid(gate) * up
    out: Any = _silu_times(gate, up)
    return out
