"""Estimates the memory that a model needs, from its config alone; chooses the prefill chunk by it.

`train/memory.py` does the same for training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx

from . import device
from .errors import InvalidArgumentError
from .model.config import Config
from .model.config_sections import Quantization


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes needed for a conversation of `context` tokens."""

    weights: int
    cache: int
    """Keys and values of `context` tokens."""
    working: int
    """Activations while a chunk of the prompt is read."""
    available: int
    """Free memory of this machine now."""
    context: int
    """Tokens."""

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.working

    @property
    def fits(self) -> bool:
        return self.total <= self.available

    @property
    def tokens_that_fit(self) -> int:
        """The longest context that fits."""
        room = self.available - self.weights - self.working
        return max(room * self.context // max(self.cache, 1), 0)


def estimate(
    config: Config,
    *,
    dtype: str | mx.Dtype | None = None,
    context: int | None = None,
    kv_bits: int | None = None,
) -> MemoryEstimate:
    """Estimate for the fused model, in `dtype` or the one this machine prefers."""
    stored = mx.float16 if config.quantization else mx.bfloat16
    compute = device.choose_dtype(stored, dtype)
    tokens = min(context or config.context_length, config.context_length)
    working = working_memory(config, PREFILL_CHUNK, compute.size) + 8 * config.vocab_size
    if device.on_cpu():  # attention on a CPU holds its scores, for several passes' keys at most
        scores = PREFILL_CHUNK * min(tokens, PREFILL_CHUNK * 8) * config.num_attention_heads
        working += 4 * scores * compute.size
    return MemoryEstimate(
        weights=weight_bytes(config, compute),
        cache=int(tokens * cache_bytes(config, compute, kv_bits)),
        working=working,
        available=device.available_memory(),
        context=tokens,
    )


def cache_bytes(config: Config, compute: mx.Dtype, kv_bits: int | None = None) -> float:
    """Bytes of what is cached of one token in all layers."""
    heads, *widths = config.cache_shape
    total = 0.0
    for width in widths:
        bits = float(8 * compute.size)
        if kv_bits is not None:  # and a scale and a bias for each group
            bits = kv_bits + 2 * bits / kv_group_size(width)
        total += heads * width * bits / 8
    return total * config.num_hidden_layers


def dense_attention(config: Config, dtype: str | mx.Dtype | None = None) -> dict[str, float]:
    """Cost of attending densely to a whole context where the published mode is sparse.

    The longest text that is dense there (`limit`) and here (`context`), both in tokens, the `times`
    as many keys and values that a token of the latter attends to, and `gigabytes` of its cache.
    Empty where the published mode is dense throughout.
    """
    limit, context = config.dense_len, config.context_length
    if limit is None or limit >= context:
        return {}
    cache = estimate(config, dtype=dtype).cache
    return {
        "limit": limit,
        "context": context,
        "times": context / limit,
        "gigabytes": cache / 1e9,
    }


def weight_bytes(config: Config, compute: mx.Dtype) -> int:
    """Bytes of the weights in memory; packed ones stay packed except on a CPU."""
    return packed_bytes(parameter_count(config), config.quantization, compute)


def packed_bytes(count: int, packing: Quantization | None, compute: mx.Dtype) -> int:
    """Bytes in memory of `count` weights that are stored with `packing`."""
    if packing is None or device.unpack_to(compute, count) is not None:
        return count * compute.size
    return int(count * packing.bits_per_weight / 8)


def check_fits(needed: MemoryEstimate) -> None:
    """Raise InvalidArgumentError with advice if there is not enough memory."""
    if needed.fits:
        return
    context = needed.tokens_that_fit
    if needed.weights + needed.working > needed.available or context < 256:
        advice = "close other programs, or take a smaller or more tightly quantized model"
    else:
        advice = f"--context {context // 128 * 128} fits; --kv-bits 8 halves what a token takes"
    raise InvalidArgumentError(
        f"not enough memory: {needed.weights / 1e9:.1f} GB of weights, {needed.cache / 1e9:.1f} GB "
        f"of cache for {needed.context} tokens and {needed.working / 1e9:.1f} GB to work with, "
        f"{needed.available / 1e9:.1f} GB free; {advice}"
    )


def fitting_context(config: Config, kv_bits: int | None = None) -> int:
    """Return the longest context in tokens that fits beside a model that is already loaded."""
    needed = estimate(config, kv_bits=kv_bits)
    room = replace(needed, weights=0).tokens_that_fit
    return min(needed.context, room)


def parameter_count(config: Config) -> int:
    """Number of weights; an embedding that is also the head counts once."""
    H, layer = config.hidden_size, 2 * config.hidden_size
    for path, (inputs, outputs) in config.projections.items():
        copies = max(config.num_experts, 1) if path.startswith("mlp.") else 1
        layer += copies * inputs * outputs
    layer += H * config.num_experts
    if mla := config.mla:
        layer += mla.q_lora_rank + mla.kv_lora_rank
    if config.attention_bias:
        layer += sum(config.projections[path][1] for path in config.biased)
    embeddings = config.vocab_size * H * (1 if config.tie_word_embeddings else 2)
    return embeddings + config.num_hidden_layers * layer + H


PREFILL_CHUNK = 512
"""Default number of prompt tokens a forward pass; on a CPU more are no faster."""


def working_memory(config: Config, tokens: int, size: int) -> int:
    """Estimate the bytes of activations while `tokens` are read at once, `size` bytes a number."""
    experts = config.num_experts_per_tok if config.num_experts else 1
    widths = 2 * experts * config.intermediate_size + 8 * config.hidden_size
    return 2 * tokens * widths * size


def prefill_chunk(config: Config) -> int:
    """Return how many prompt tokens to read at once, for a twentieth of the free memory."""
    if device.on_cpu():
        return PREFILL_CHUNK
    room = device.available_memory() // 20
    sizes = (4 * PREFILL_CHUNK, 2 * PREFILL_CHUNK, PREFILL_CHUNK, PREFILL_CHUNK // 2)
    return next((n for n in sizes if working_memory(config, n, 2) <= room), PREFILL_CHUNK // 4)


def kv_group_size(head_dim: int) -> int:
    """Numbers that share a scale in a quantized key-value cache."""
    return 32 if head_dim % 64 else 64
