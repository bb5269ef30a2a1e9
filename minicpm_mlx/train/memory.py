"""What training needs in memory, known before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .. import device
from ..errors import InvalidArgumentError
from ..memory import weight_bytes
from ..model.config import Config
from .cross_entropy import CHUNK
from .data.batches import PAD
from .lora import LoRAConfig

STATES = {"adamw": 2, "adafactor": 0.1, "lion": 1, "muon": 1, "sgd": 1}
"""Numbers that an optimizer remembers for each that is trained."""

BLOCKS = 5.6
"""As many times what a layer's gradient needs is in memory while it is computed: measured, see
benchmarks/README.md."""

PAIRS = {"sft": 1, "preference": 2, "kto": 2}
"""Texts a sample is made of, by kind of data."""


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes, at the largest moment of a step with the longest samples; an estimate."""

    weights: int
    trained: int
    """What is trained, its gradients, and what the optimizer remembers."""
    activations: int
    """What the layers keep for their gradients."""
    working: int
    """What one layer, or the head with its logits, needs while it is computed."""
    available: int
    """What this machine has free now."""
    batch_size: int
    length: int
    """Tokens of the longest sample."""
    checkpointing: bool

    @property
    def total(self) -> int:
        return self.weights + self.trained + self.activations + self.working

    @property
    def fits(self) -> bool:
        return self.total <= self.available

    @property
    def described(self) -> str:
        """In words."""
        parts = {
            "weights": self.weights,
            "trained": self.trained,
            "activations": self.activations,
            "working": self.working,
        }
        unit, count = unit_of(self.total)
        listed = ", ".join(f"{name} {size / count:.2f}" for name, size in parts.items())
        again = ", layers computed twice" if self.checkpointing else ""
        return (
            f"memory: about {self.total / count:.1f} {unit} of {self.available / 1e9:.1f} GB free "
            f"({listed}){again}"
        )


def estimate_memory(
    config: Config,
    method: LoRAConfig,
    *,
    batch_size: int,
    length: int,
    checkpointing: bool,
    kind: str = "sft",
    optimizer: str = "adamw",
    dtype: str | None = None,
) -> TrainingMemory:
    """The estimate for samples of up to `length` tokens, `batch_size` of them at once."""
    stored = mx.float16 if config.quantization else mx.bfloat16
    compute = device.choose_dtype(stored, dtype, fused=False)
    texts = batch_size * PAIRS[kind]
    tokens = texts * (-(-length // PAD) * PAD)
    layers = method.layers or config.num_hidden_layers
    experts = config.num_experts_per_tok if config.num_experts else 1
    H, F = config.hidden_size, config.intermediate_size * experts
    projected = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    block = tokens * compute.size * (4 * H + 2 * projected + 3 * F)  # what a layer's gradient needs
    chunk = 4 * config.vocab_size * min(tokens, max(1, CHUNK // config.vocab_size))
    head = 2 * chunk + 3 * tokens * H * compute.size
    kept = tokens * compute.size * H * layers if checkpointing else block * layers
    count = 4 * trained_count(config, method)
    held = count * (1 + STATES[optimizer])
    step = count * (3.8 + STATES[optimizer])  # new values beside old ones
    return TrainingMemory(
        weights=weight_bytes(config, compute),
        trained=int(held),
        activations=kept,
        working=int(max(head, BLOCKS * block, step - held - kept)),
        available=device.available_memory(),
        batch_size=batch_size,
        length=length,
        checkpointing=checkpointing,
    )


def trained_count(config: Config, method: LoRAConfig) -> int:
    """Numbers that are trained."""
    layers = method.layers or config.num_hidden_layers
    H, F = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    shapes = {"q_proj": (H, queries), "k_proj": (H, keys), "v_proj": (H, keys)}
    shapes["o_proj"] = (queries, H)
    if not config.num_experts:
        shapes |= {"gate_proj": (H, F), "up_proj": (H, F), "down_proj": (F, H)}
    if method.kind == "full":
        ends = 0
        if method.layers is None:
            ends = config.vocab_size * H * (1 if config.tie_word_embeddings else 2) + H
        experts = config.num_experts * (3 * H * F + H)
        return ends + layers * (sum(a * b for a, b in shapes.values()) + experts + 2 * H)
    chosen = method.modules or tuple(shapes)
    each = sum(
        method.rank * (width + out) + (out if method.kind == "dora" else 0)
        for name, (width, out) in shapes.items()
        if name in chosen
    )
    return layers * each


def fit_to_memory(
    config: Config,
    method: LoRAConfig,
    *,
    samples: int,
    batch_size: int | None = None,
    checkpointing: bool | None = None,
    **rest: Any,
) -> TrainingMemory:
    """The fastest way that fits: the most samples at once, up to `samples`, and only where it
    must be, layers computed twice. What is given stays; if nothing fits, the smallest.
    """
    least = 2 if rest.get("kind") == "kto" else 1  # which compares with other replies
    whole = [n for n in range(samples, 0, -1) if samples % n == 0 and n >= least]
    sizes = [batch_size] if batch_size else whole or [least]
    ways = [False, True] if checkpointing is None else [checkpointing]
    if checkpointing is None and device.slow_exponentials():
        ways = [True]  # which is the faster way there (see kernels.py)
    found = [
        estimate_memory(config, method, batch_size=size, checkpointing=way, **rest)
        for way in ways
        for size in sizes
    ]
    return next((way for way in found if way.fits), min(found, key=lambda way: way.total))


def check(found: TrainingMemory) -> None:
    """InvalidArgumentError, with advice, where it cannot fit."""
    if found.fits:
        return
    advice = []
    if not found.checkpointing:
        advice.append("--grad-checkpoint")
    if found.batch_size > 1:
        advice.append("--batch-size 1")
    if found.length > 256:
        advice.append(f"--max-seq-length {max(256, found.length // 2 // 128 * 128)}")
    fewer = found.weights > found.available
    advice.append("a model in fewer bits (quantize)" if fewer else "fewer layers (--num-layers)")
    raise InvalidArgumentError(
        f"not enough {found.described}; try {', '.join(advice)}, or close other programs"
    )


def unit_of(size: float) -> tuple[str, float]:
    """A unit in which so many bytes are not next to nothing, and the bytes it has."""
    return ("GB", 1e9) if size >= 1e8 else ("MB", 1e6)
