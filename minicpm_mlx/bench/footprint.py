"""What a decode step of a model reads, caches and computes, from its config alone."""

from __future__ import annotations

import mlx.core as mx

from ..memory import cache_bytes, weight_bytes
from ..model.config import Config
from .chips import Footprint
from .kernel_count import kernels_per_token


def footprint(config: Config, compute: mx.Dtype = mx.float16) -> Footprint:
    """The footprint of one stream, packed as the config says."""
    return Footprint(
        weights=weight_bytes(config, compute, read=True),
        cache=int(cache_bytes(config, compute)),
        kernels=kernels_per_token(config),
        operations=config.num_hidden_layers * _attention_operations(config),
    )


def _attention_operations(config: Config) -> int:
    """Multiplications and additions of a layer for each token of context, for one query."""
    widths = config.head_dim + config.value_dim
    if config.mla:  # queries meet the latents themselves, as keys and as values
        widths = config.mla.qk_rope_head_dim + 2 * config.mla.kv_lora_rank
    return 2 * config.num_attention_heads * widths
