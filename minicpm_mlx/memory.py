"""What a model needs in memory, known from its config before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from . import device
from .errors import InvalidArgumentError
from .model.config import Config


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes, at the longest conversation."""

    weights: int
    cache: int
    """Keys and values of `context` tokens."""
    working: int
    """Activations of a chunk of the prompt, at most; an estimate."""
    available: int
    """What this machine has free now."""
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
        """The longest context for which there is room."""
        left = self.available - self.weights - self.working
        return max(left * self.context // max(self.cache, 1), 0)


def plan(
    config: Config,
    *,
    dtype: str | None = None,
    context: int | None = None,
    kv_bits: int | None = None,
) -> MemoryEstimate:
    """The plan of a model run here, fused, in `dtype` or what this machine prefers."""
    stored = mx.float16 if config.quantization else mx.bfloat16
    compute = device.choose_dtype(stored, dtype)
    tokens = min(context or config.context_length, config.context_length)
    width = config.head_dim * (2 * config.num_hidden_layers * config.num_key_value_heads)
    bits = float(8 * compute.size)
    if kv_bits is not None:  # a scale and a bias for each group
        bits = kv_bits + 2 * bits / group_of(config.head_dim)
    working = working_memory(config, CHUNK, compute.size) + 8 * config.vocab_size
    if device.on_cpu():  # where attention holds its scores
        working += 4 * CHUNK * min(tokens, CHUNK * 8) * config.num_attention_heads * compute.size
    return MemoryEstimate(
        weights=weight_bytes(config, compute),
        cache=int(tokens * width * bits / 8),
        working=working,
        available=device.available_memory(),
        context=tokens,
    )


def weight_bytes(config: Config, compute: mx.Dtype) -> int:
    """What the weights take, computed with in `compute`; packed ones stay so but on a CPU."""
    count, packing = parameter_count(config), config.quantization
    if packing is None or device.unpack_to(compute, count) is not None:
        return count * compute.size
    return int(count * packing.bits_per_weight / 8)


def check(found: MemoryEstimate) -> None:
    """Refuse what cannot fit, with what would."""
    if found.fits:
        return
    room = found.tokens_that_fit
    if found.weights + found.working > found.available or room < 256:
        advice = "close other programs, or take a smaller or more tightly quantized model"
    else:
        advice = f"--context {room // 128 * 128} fits; --kv-bits 8 halves what a token takes"
    raise InvalidArgumentError(
        f"not enough memory: {found.weights / 1e9:.1f} GB of weights, {found.cache / 1e9:.1f} GB "
        f"of cache for {found.context} tokens and {found.working / 1e9:.1f} GB to work with, "
        f"{found.available / 1e9:.1f} GB free; {advice}"
    )


def fitting_context(config: Config, kv_bits: int | None = None) -> int:
    """Tokens of context for which a model that is loaded already finds room."""
    found = plan(config, kv_bits=kv_bits)
    left = found.available - found.working
    return min(found.context, max(left * found.context // max(found.cache, 1), 0))


def parameter_count(config: Config) -> int:
    """Weights of the model, one embedding counted once."""
    H, D, F = config.hidden_size, config.head_dim, config.intermediate_size
    queries, keys = config.num_attention_heads * D, config.num_key_value_heads * D
    attention = 2 * H * queries + 2 * H * keys
    if config.attention_bias:
        attention += queries + 2 * keys + H
    experts = max(config.num_experts, 1)
    feed_forward = experts * 3 * H * F + (H * config.num_experts)
    layer = attention + feed_forward + 2 * H
    embeddings = config.vocab_size * H * (1 if config.tie_word_embeddings else 2)
    return embeddings + config.num_hidden_layers * layer + H


CHUNK = 512
"""Prompt tokens a forward pass, at least where memory allows, and at most on a CPU: there more gain
no speed."""


def working_memory(config: Config, tokens: int, size: int) -> int:
    """Bytes of activations while `tokens` are read at once, at most, in numbers of `size` bytes; an
    estimate."""
    experts = config.num_experts_per_tok if config.num_experts else 1
    widths = 2 * experts * config.intermediate_size + 8 * config.hidden_size
    return 2 * tokens * widths * size


def chunk_of(config: Config) -> int:
    """Prompt tokens to read at once: as many as take a twentieth of the memory there is."""
    if device.on_cpu():
        return CHUNK
    room = device.available_memory() // 20
    sizes = (4 * CHUNK, 2 * CHUNK, CHUNK, CHUNK // 2)
    return next((n for n in sizes if working_memory(config, n, 2) <= room), CHUNK // 4)


def group_of(head_dim: int) -> int:
    """Numbers that share a scale where heads of this width are kept in few bits."""
    return 32 if head_dim % 64 else 64
