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

import mlx.core as mx
import mlx.nn as nn

from .attention import Attention, Cache, Mask
from .config import Config
from .feed_forward import MLP, MoE
from .mla import LatentAttention
from .rope import Rope, Rotation


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.self_attn = LatentAttention(config) if config.mla else Attention(config)
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
