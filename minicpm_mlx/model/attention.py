"""Attention with grouped queries, and the interface of the caches that it reads and writes."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from . import kernels
from .config import Config
from .rope import Rotation

Mask = mx.array | str | None
"""MLX's "causal", a boolean array (B, 1, T, S) of what a position sees, or None for all."""


class Cache(Protocol):
    """One layer's key-value cache: KVCache, SharedLayerCache or one of mlx-lm's."""

    @property
    def offset(self) -> int | mx.array:
        """Positions that are cached, one number or one a row (B,)."""
        ...

    def make_mask(self, T: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """Return the mask of the next T positions."""
        ...

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values (B, K, T, D); return all, (B, K, S, D)."""
        ...


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        D, H, K = config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.heads, self.kv_heads, self.scale = H, K, D**-0.5
        # Differentiable; training replaces it where MLX's is slow.
        self.attention: kernels.Attention = mx.fast.scaled_dot_product_attention
        self.residual_scale = config.residual_scale
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, H * D, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, K * D, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, K * D, bias=bias)
        self.o_proj = nn.Linear(H * D, config.hidden_size, bias=bias)

    def __call__(self, x: mx.array, rotate: Rotation, mask: Mask, cache: Cache | None) -> mx.array:
        q = split_heads(self.q_proj(x), self.heads)  # (B, H, T, D)
        k = split_heads(self.k_proj(x), self.kv_heads)  # (B, K, T, D)
        v = split_heads(self.v_proj(x), self.kv_heads)
        out = attend(rotate(q), rotate(k), v, self.scale, mask, cache, self.attention)
        return self.o_proj(out) * self.residual_scale


def attend(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    mask: Mask,
    cache: Cache | None,
    attention: kernels.Attention = mx.fast.scaled_dot_product_attention,
) -> mx.array:
    """Cache and attend: rotated q (B, H, T, D) and k, and v (B, K, T, D), to (B, T, H * D)."""
    if cache is None:
        return join_heads(attention(q, k, v, scale=scale, mask=mask))
    if mask is None and getattr(cache, "bits", None) is not None and q.shape[2] == 1:
        return join_heads(_attend_packed(q, k, v, scale, cache))
    k, v = cache.update_and_fetch(k, v)  # (B, K, S, D)
    return join_heads(attention(q, k, v, scale=scale, mask=mask))


def split_heads(x: mx.array, heads: int) -> mx.array:
    """(B, T, H * D) to (B, H, T, D)."""
    B, T, _ = x.shape
    if T == 1:  # the same numbers in the same order: a view less to make for each token
        return x.reshape(B, heads, 1, -1)
    return x.reshape(B, T, heads, -1).swapaxes(1, 2)


def join_heads(x: mx.array) -> mx.array:
    """(B, H, T, D) to (B, T, H * D)."""
    B, _, T, _ = x.shape
    return (x if T == 1 else x.swapaxes(1, 2)).reshape(B, T, -1)


def _attend_packed(q: mx.array, k: mx.array, v: mx.array, scale: float, cache: Any) -> mx.array:
    """Attend with one query a head, q (B, H, 1, D), to a packed cache without unpacking it."""
    B, H, _, D = q.shape
    keys, values = cache.append(k, v)  # each codes, scales and biases, (B, K, S, D / ...)
    matmul: Any = partial(mx.quantized_matmul, **cache.packing(keys))
    q = (q * scale).reshape(B, keys[0].shape[1], -1, D)  # the H / K heads that share keys, together
    # Scores (B, K, H / K, S), then values.
    (k, k_scales, k_biases), (v, v_scales, v_biases) = keys, values
    weights = mx.softmax(matmul(q, k, k_scales, k_biases, transpose=True), axis=-1)
    return matmul(weights, v, v_scales, v_biases, transpose=False).reshape(B, H, 1, D)
