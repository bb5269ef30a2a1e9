"""Operations with a faster form for some devices: attention, SiLU, logsumexp, one-row products.

The functions here choose the form for the current device, so that their callers need not. The forms
for bare CPUs are in the modules of this package, and so are kernels of our own for GPUs (own.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx

from ... import device
from . import cpu_softmax
from .own import add_norm

__all__ = ["add_norm", "attention", "logsumexp", "mlx_silu_mul", "silu_mul"]

Attention = Callable[..., mx.array]
"""(q, k, v, *, scale, mask), as mx.fast.scaled_dot_product_attention."""
GatedActivation = Callable[[mx.array, mx.array], mx.array]
"""(gate, up), both (..., F), to act(gate) * up."""


def attention() -> Attention:
    """Return the fastest attention for inference; it may have no gradient."""
    if device.slow_exponentials():
        return cpu_softmax.attention
    return mx.fast.scaled_dot_product_attention


def silu_mul() -> GatedActivation:
    """Return the fastest silu(gate) * up for inference; it may have no gradient."""
    return cpu_softmax.silu_mul if device.slow_exponentials() else mlx_silu_mul


@partial(mx.compile, shapeless=True)  # one kernel instead of three
def mlx_silu_mul(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


def logsumexp(logits: mx.array) -> mx.array:
    """Return log(sum(exp(logits))) of float32 logits (N, V) over the last axis: (N,)."""
    # MLX's sum on a CPU is also off by 1e-4.
    return (
        cpu_softmax.logsumexp(logits)
        if device.slow_exponentials()
        else mx.logsumexp(logits, axis=-1)
    )
