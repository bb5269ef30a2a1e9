"""Estimates the memory that a model needs, from its config alone; chooses the prefill chunk by it.

`train/memory.py` does the same for training.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    # A longer context is counted for no more: few prompts are as long.
    read = min(tokens, LONG_PROMPT)
    working = working_memory(config, PREFILL_CHUNK, read, compute.size) + 8 * config.vocab_size
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


def weight_bytes(config: Config, compute: mx.Dtype, *, read: bool = False) -> int:
    """Bytes of the weights in memory, each packed as the config says, or, on a CPU, unpacked.

    With `read` of those that the step of one token reads: no embedding that is not also the head,
    and of experts as many as the token is routed to.
    """
    counts = dict(_matrices(config))
    vectors = parameter_count(config) - sum(counts.values())
    if read:
        if not config.tie_word_embeddings:
            del counts["model.embed_tokens"]
        share = config.num_experts_per_tok / max(config.num_experts, 1)
        counts = {p: int(n * share) if ".experts." in p else n for p, n in counts.items()}
    usual, exceptions = config.quantization, dict(config.layer_quantization)
    if usual is None or device.unpack_to(compute, parameter_count(config)) is not None:
        return (sum(counts.values()) + vectors) * compute.size
    size = float(vectors * compute.size)
    for path, count in counts.items():
        packing = exceptions.get(path, usual)
        packed = path not in config.unpacked and not path.endswith("mlp.gate")
        size += count * (packing.bits_per_weight / 8 if packed else compute.size)
    return int(size)


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
    layer = 2 * config.hidden_size  # norms
    if mla := config.mla:
        layer += mla.q_lora_rank + mla.kv_lora_rank
    if config.attention_bias:
        layer += sum(config.projections[path][1] for path in config.biased)
    vectors = config.num_hidden_layers * layer + config.hidden_size
    return vectors + sum(count for _, count in _matrices(config))


def _matrices(config: Config) -> Iterator[tuple[str, int]]:
    """Path and number of weights of each matrix."""
    outer = config.vocab_size * config.hidden_size
    yield "model.embed_tokens", outer
    if not config.tie_word_embeddings:
        yield "lm_head", outer
    for number in range(config.num_hidden_layers):
        layer = f"model.layers.{number}"
        for path, (inputs, outputs) in config.projections.items():
            if config.num_experts and path.startswith("mlp."):
                for expert in range(config.num_experts):
                    name = path.replace("mlp.", f"mlp.experts.{expert}.")
                    yield f"{layer}.{name}", inputs * outputs
            else:
                yield f"{layer}.{path}", inputs * outputs
        if config.num_experts:
            yield f"{layer}.mlp.gate", config.hidden_size * config.num_experts


PREFILL_CHUNK = 512
"""Default number of prompt tokens a forward pass; on a CPU more are no faster."""


LONG_PROMPT = 8 * PREFILL_CHUNK

METAL_HEADS = (64, 80, 128)
"""Widths of heads for which MLX's attention holds no scores, where queries and values are alike."""


def working_memory(config: Config, tokens: int, context: int, size: int) -> int:
    """Estimate the bytes of activations while the last `tokens` of `context` are read at once,
    `size` bytes a number."""
    experts = config.num_experts_per_tok if config.num_experts else 1
    widths = 2 * experts * config.intermediate_size + 8 * config.hidden_size
    keys = config.head_dim + config.value_dim if config.mla else 0  # projected from the latents
    attention = config.num_attention_heads * context * (keys + tokens * _score_copies(config))
    return (2 * tokens * widths + attention) * size


def _score_copies(config: Config) -> int:
    """How often attention holds the scores of a chunk, in this device's form of it."""
    if device.slow_exponentials():
        return 1
    if device.on_cpu():
        return 4
    fused = config.head_dim == config.value_dim and config.head_dim in METAL_HEADS
    return 0 if fused else 2


def prefill_chunk(config: Config, context: int = LONG_PROMPT, most: int | None = None) -> int:
    """Return how many tokens of a prompt of `context` to read at once, for a twentieth of the free
    memory, and no more than `most`."""
    if most is not None:
        return min(prefill_chunk(config, context), most)
    if device.on_cpu():
        return PREFILL_CHUNK
    room = device.available_memory() // 20
    sizes = (4 * PREFILL_CHUNK, 2 * PREFILL_CHUNK, PREFILL_CHUNK, PREFILL_CHUNK // 2)
    return next(
        (n for n in sizes if working_memory(config, n, context, 2) <= room), PREFILL_CHUNK // 4
    )


def kv_group_size(head_dim: int) -> int:
    """Numbers that share a scale in a quantized key-value cache."""
    return 32 if head_dim % 64 else 64
