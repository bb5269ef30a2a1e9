"""Estimates the memory of training before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .. import device
from ..errors import InvalidArgumentError
from ..memory import parameter_count, weight_bytes
from ..model.config import Config
from . import cpu_kernels
from .cross_entropy import CHUNK
from .data.batches import padded
from .lora import LoRAConfig, projections

STATES = {"adamw": 2, "adafactor": 0.1, "lion": 1, "muon": 1, "sgd": 1}
"""Numbers that an optimizer stores per trained parameter."""

BLOCKS = 5.6
"""Peak memory of a layer's backward pass, in units of its activations: measured, see
benchmarks/README.md."""

PAIRS = {"sft": 1, "preference": 2, "kto": 2}
"""Texts per sample, by kind of data."""


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Estimated bytes at the peak of a step with the longest samples."""

    weights: int
    trained: int
    """Trained parameters, their gradients, and the optimizer's state."""
    activations: int
    """Activations that the layers keep for their gradients."""
    working: int
    """Temporary arrays of one layer, or of the head with its logits."""
    available: int
    """Free memory of this machine."""
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
        names = ("weights", "trained", "activations", "working")
        unit, size = unit_of(self.total)
        parts = ", ".join(f"{name} {getattr(self, name) / size:.2f}" for name in names)
        recomputed = ", layers computed twice" if self.checkpointing else ""
        return (
            f"memory: about {self.total / size:.1f} {unit} of {self.available / 1e9:.1f} GB free "
            f"({parts}){recomputed}"
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
    dtype: str | mx.Dtype | None = None,
) -> TrainingMemory:
    """Estimates batches of `batch_size` samples of up to `length` tokens."""
    stored = mx.float16 if config.quantization else mx.bfloat16
    compute = device.choose_dtype(stored, dtype, fused=False)
    texts = batch_size * PAIRS[kind]
    tokens = texts * padded(length)
    layers = method.layers or config.num_hidden_layers
    experts = config.num_experts_per_tok if config.num_experts else 1
    H, F = config.hidden_size, config.intermediate_size * experts
    attention = (path for path in config.projections if path.startswith("self_attn."))
    projected = sum(config.projections[path][1] for path in attention) - config.hidden_size
    block = tokens * compute.size * (4 * H + 2 * projected + 3 * F)  # activations of a layer
    chunk = 4 * config.vocab_size * min(tokens, max(1, CHUNK // config.vocab_size))
    head = 2 * chunk + 3 * tokens * H * compute.size
    activations = tokens * compute.size * H * layers if checkpointing else block * layers
    parameters = 4 * trained_count(config, method)
    trained = parameters * (1 + STATES[optimizer])
    update = parameters * (3.8 + STATES[optimizer])  # new arrays beside the old ones
    return TrainingMemory(
        weights=weight_bytes(config, compute),
        trained=int(trained),
        activations=activations,
        working=int(max(head, BLOCKS * block, update - trained - activations)),
        available=device.available_memory(),
        batch_size=batch_size,
        length=length,
        checkpointing=checkpointing,
    )


def trained_count(config: Config, method: LoRAConfig) -> int:
    layers = method.layers or config.num_hidden_layers
    H = config.hidden_size
    if method.kind == "full":
        total = parameter_count(config)
        outer = config.vocab_size * H * (1 if config.tie_word_embeddings else 2) + H
        inner = (total - outer) // config.num_hidden_layers * layers
        return total if method.layers is None else inner
    names = method.modules or projections(config)
    per_layer = sum(
        method.rank * (width + out) + (out if method.kind == "dora" else 0)
        for path, (width, out) in config.projections.items()
        if path.rpartition(".")[2] in names
    )
    return layers * per_layer


def fit_to_memory(
    config: Config,
    method: LoRAConfig,
    *,
    samples: int,
    batch_size: int | None = None,
    checkpointing: bool | None = None,
    **rest: Any,
) -> TrainingMemory:
    """Chooses the fastest settings that fit: the largest batch, up to `samples`, and checkpointing
    only if nothing fits without. Given values are kept; if nothing fits, the smallest is chosen.
    """
    least = 2 if rest.get("kind") == "kto" else 1  # kto compares with other replies of the batch
    divisors = [n for n in range(samples, 0, -1) if samples % n == 0 and n >= least]
    sizes = [batch_size] if batch_size else divisors or [least]
    modes = [False, True] if checkpointing is None else [checkpointing]
    if checkpointing is None and cpu_kernels.are_faster():
        modes = [True]  # checkpointing can use the CPU's kernels
    estimates = [
        estimate_memory(config, method, batch_size=size, checkpointing=mode, **rest)
        for mode in modes
        for size in sizes
    ]
    smallest = min(estimates, key=lambda estimate: estimate.total)
    return next((estimate for estimate in estimates if estimate.fits), smallest)


def check(estimate: TrainingMemory) -> None:
    """Raises InvalidArgumentError, with advice, if training does not fit."""
    if estimate.fits:
        return
    advice = []
    if not estimate.checkpointing:
        advice.append("--grad-checkpoint")
    if estimate.batch_size > 1:
        advice.append("--batch-size 1")
    if estimate.length > 256:
        advice.append(f"--max-seq-length {max(256, estimate.length // 2 // 128 * 128)}")
    if estimate.weights > estimate.available:
        advice.append("a model in fewer bits (quantize)")
    else:
        advice.append("fewer layers (--num-layers)")
    raise InvalidArgumentError(
        f"not enough {estimate.described}; try {', '.join(advice)}, or close other programs"
    )


def unit_of(size: float) -> tuple[str, float]:
    """The name of the unit for so many bytes, and its bytes."""
    return ("GB", 1e9) if size >= 1e8 else ("MB", 1e6)
