"""The MiniCPM transformer, written to be read; `fuse.py` makes the fast form of it.

What is unusual about this architecture (muP, maximal update parametrization):
- the embedding is multiplied by `scale_emb`
- each residual branch is multiplied by `scale_depth` / sqrt(layers)
- the last hidden state is divided by hidden_size / `dim_model_base` before the head
- the head is usually the embedding itself
With all three scales at 1 this is a Llama.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .activations import Activation
from .config import Config
from .moe import MoE
from .rope import Rope, Rotation

Mask = mx.array | str | None
"""Which positions see which: MLX's "causal", a boolean array (B, 1, T, T), or None for all."""


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        D, H, K = config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.heads, self.kv_heads, self.scale = H, K, D**-0.5
        self.attention: Callable[..., mx.array] | None = None  # in the place of MLX's
        self.residual_scale = config.residual_scale
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, H * D, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, K * D, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, K * D, bias=bias)
        self.o_proj = nn.Linear(H * D, config.hidden_size, bias=bias)

    def __call__(self, x: mx.array, rotate: Rotation, mask: Mask, cache: Any) -> mx.array:
        B, T, _ = x.shape
        q = self.q_proj(x).reshape(B, T, self.heads, -1).transpose(0, 2, 1, 3)  # (B, H, T, D)
        k = self.k_proj(x).reshape(B, T, self.kv_heads, -1).transpose(0, 2, 1, 3)  # (B, K, T, D)
        v = self.v_proj(x).reshape(B, T, self.kv_heads, -1).transpose(0, 2, 1, 3)
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

    def __call__(self, x: mx.array, rotate: Rotation, mask: Mask, cache: Any) -> mx.array:
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
        self, ids: mx.array, cache: Sequence[Any] | None = None, length: int | None = None
    ) -> mx.array:
        x = self.embed_tokens(ids) * self.scale_emb  # (B, T, hidden)
        rotate, mask, caches = prepare(self.rope, ids, cache, len(self.layers), length)
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            x = layer(x, rotate, mask, layer_cache)
        return self.norm(x)


class Model(nn.Module):
    """Token ids to logits, in the calling convention of mlx-lm's models."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.adapter: str | None = None  # digest of the one that adapt() put on
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def layers(self) -> list[Block]:
        return self.model.layers

    def __call__(
        self, ids: mx.array, cache: Sequence[Any] | None = None, length: int | None = None
    ) -> mx.array:
        """Logits (B, T, V) for ids (B, T).

        `cache` is one key-value cache a layer, ours or mlx-lm's. `length` is the length of the text
        these ids are part of where it is known beforehand, so that a prompt read in chunks is
        rotated as if read at once; by default it ends with these ids.
        """
        return self.logits(self.hidden(ids, cache, length))

    def hidden(
        self, ids: mx.array, cache: Sequence[Any] | None = None, length: int | None = None
    ) -> mx.array:
        """Last hidden states (B, T, hidden), for callers that need few logits or none."""
        return self.model(ids, cache, length)

    def logits(self, hidden: mx.array) -> mx.array:
        """The head: hidden states (..., hidden) to logits (..., V)."""
        hidden = hidden / self.config.logit_divisor
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(hidden)
        return self.lm_head(hidden)


def prepare(
    rope: Rope, ids: mx.array, cache: Sequence[Any] | None, layers: int, length: int | None
) -> tuple[Rotation, Mask, Sequence[Any]]:
    """What all layers share in a forward pass of `ids`: rotation and mask; and a cache for each."""
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
    cache: Any,
    attention: Callable[..., mx.array] | None = None,
) -> mx.array:
    """Cache and attend: rotated q (B, H, T, D) and k, and v (B, K, T, D), to (B, T, H * D).

    `attention` takes the place of MLX's.
    """
    B, _, T, _ = q.shape
    if T == 1 and mask is None and getattr(cache, "bits", None) is not None:
        out = _attend_packed(q, cache.append(k, v), scale, cache)
    else:
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        attention = attention or mx.fast.scaled_dot_product_attention
        out = attention(q, k, v, scale=scale, mask=mask)
    return out.transpose(0, 2, 1, 3).reshape(B, T, -1)


def _attend_packed(q: mx.array, kept: Any, scale: float, cache: Any) -> mx.array:
    """One query a head, q (B, H, 1, D), over keys and values in few bits, which stay packed."""
    B, H, _, D = q.shape
    times = partial(mx.quantized_matmul, group_size=cache.group_size, bits=cache.bits)
    (k, k_scales, k_biases), (v, v_scales, v_biases) = kept
    q = (q * scale).reshape(B, k.shape[1], -1, D)  # heads that share keys, together
    weights = mx.softmax(times(q, k, k_scales, k_biases, transpose=True), axis=-1)
    return times(weights, v, v_scales, v_biases, transpose=False).reshape(B, H, 1, D)
