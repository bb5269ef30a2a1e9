"""The MiniCPM transformer, written to be read; `fused.py` makes the fast form of it.

What is unusual about this architecture (muP, maximal update parametrization):
- the embedding is multiplied by `scale_emb`
- each residual branch is multiplied by `scale_depth` / sqrt(layers)
- the last hidden state is divided by hidden_size / `dim_model_base` before the head
- the head is usually the embedding itself
With all three scales at 1 this is a Llama.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from . import kernels
from .activations import Activation
from .config import Config
from .moe import MoE
from .rope import Rope, Rotation

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
        B, T, _ = x.shape
        q = self.q_proj(x).reshape(B, T, self.heads, -1).transpose(0, 2, 1, 3)  # (B, H, T, D)
        k = self.k_proj(x).reshape(B, T, self.kv_heads, -1).transpose(0, 2, 1, 3)  # (B, K, T, D)
        v = self.v_proj(x).reshape(B, T, self.kv_heads, -1).transpose(0, 2, 1, 3)  # (B, K, T, D)
        out = attend(rotate(q), rotate(k), v, self.scale, mask, cache, self.attention)
        return self.o_proj(out) * self.residual_scale


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.activation = Activation(config)
        self.residual_scale = config.residual_scale
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        # Scaled before down_proj rather than after: its raw output overflows float16.
        inner = self.activation(self.gate_proj(x), self.up_proj(x)) * self.residual_scale
        return self.down_proj(inner)


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MoE(config) if config.num_experts else MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, x: mx.array, rotate: Rotation, mask: Mask, cache: Cache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), rotate, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Token ids to last hidden states; `Model` adds the head."""

    def __init__(self, config: Config):
        super().__init__()
        self.rope = Rope(config)
        self.scale_emb = config.scale_emb
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Block(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(
        self, ids: mx.array, cache: Sequence[Cache] | None = None, length: int | None = None
    ) -> mx.array:
        x = self.embed_tokens(ids) * self.scale_emb  # (B, T, hidden)
        rotate, mask, caches = prepare_pass(self.rope, ids, cache, len(self.layers), length)
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            x = layer(x, rotate, mask, layer_cache)
        return self.norm(x)


class Model(nn.Module):
    """Token ids to logits, in the calling convention of mlx-lm's models."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.adapter: str | None = None  # digest of the one that apply_adapter() put on
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def layers(self) -> list[Block]:
        return self.model.layers

    def __call__(
        self, ids: mx.array, cache: Sequence[Cache] | None = None, length: int | None = None
    ) -> mx.array:
        """Logits (B, T, V) for ids (B, T).

        `cache` is one key-value cache a layer. `length` is the length of the whole text, for a
        prompt read in chunks to be rotated as if read at once; by default the text ends with `ids`.
        """
        return self.logits(self.hidden(ids, cache, length))

    def hidden(
        self, ids: mx.array, cache: Sequence[Cache] | None = None, length: int | None = None
    ) -> mx.array:
        """Last hidden states (B, T, hidden), of which callers compute the logits they need."""
        return self.model(ids, cache, length)

    def logits(self, hidden: mx.array) -> mx.array:
        """The head: hidden states (..., hidden) to logits (..., V)."""
        hidden = hidden / self.config.logit_divisor
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(hidden)
        return self.lm_head(hidden)


def prepare_pass(
    rope: Rope, ids: mx.array, cache: Sequence[Cache] | None, layers: int, length: int | None
) -> tuple[Rotation, Mask, Sequence[Cache | None]]:
    """Compute once the rotation and mask that all layers share; return them and a cache a layer."""
    T = ids.shape[1]
    if not cache:
        return rope.at(0, T, length or T), "causal" if T > 1 else None, [None] * layers
    offset = cache[0].offset
    mask = cache[0].make_mask(T, return_array=False, window_size=None)
    return rope.at(offset, T, length or offset + T), mask, cache


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
    B, _, T, _ = q.shape
    if T == 1 and mask is None and getattr(cache, "bits", None) is not None:
        out = _attend_packed(q, k, v, scale, cache)
    else:
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)  # (B, K, S, D)
        out = attention(q, k, v, scale=scale, mask=mask)
    return out.transpose(0, 2, 1, 3).reshape(B, T, -1)


def _attend_packed(q: mx.array, k: mx.array, v: mx.array, scale: float, cache: Any) -> mx.array:
    """Attend with one query a head, q (B, H, 1, D), to a packed cache without unpacking it."""
    B, H, _, D = q.shape
    matmul = partial(mx.quantized_matmul, group_size=cache.group_size, bits=cache.bits)
    keys, values = cache.append(k, v)  # each codes, scales and biases, (B, K, S, D / ...)
    q = (q * scale).reshape(B, keys[0].shape[1], -1, D)  # the H / K heads that share keys, together
    # Scores (B, K, H / K, S), then values.
    (k, k_scales, k_biases), (v, v_scales, v_biases) = keys, values
    weights = mx.softmax(matmul(q, k, k_scales, k_biases, transpose=True), axis=-1)
    return matmul(weights, v, v_scales, v_biases, transpose=False).reshape(B, H, 1, D)
