"""Tiny models with random weights, and checkpoints of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from minicpm_mlx.model.config import Config
from minicpm_mlx.model.transformer import Model
from minicpm_mlx.weights.checkpoint import Checkpoint
from minicpm_mlx.weights.lazy_tensor import LazyTensor
from minicpm_mlx.weights.load import parameters

IDS = mx.array([[1, 7, 300, 45, 6, 7, 511, 0], [1, 9, 9, 2, 88, 400, 3, 17]])


TINY: dict[str, Any] = {
    "architectures": ["MiniCPMForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 16,
}


MOE = {"num_experts": 4, "num_experts_per_tok": 2}

MLA: dict[str, Any] = {
    "architectures": ["MiniCPM3ForCausalLM"],
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 32,
    "rms_norm_eps": 1e-5,
}


def random_model(seed: int = 0, **changes: Any) -> Model:
    """A model of random weights, the same each time; norms too, which MLX would leave at 1."""
    mx.random.seed(seed)
    model = Model(Config.from_dict({**TINY, **changes}))

    def wild(name: str, array: mx.array) -> mx.array:
        return mx.random.uniform(0.5, 2.0, array.shape) if "norm" in name else array * 2.0

    set_arrays(model, wild)
    mx.eval(model.parameters())
    return model


def set_arrays(model: nn.Module, change: Callable[[str, mx.array], mx.array]) -> None:
    found: Any = tree_flatten(model.parameters())
    model.load_weights([(name, change(name, array)) for name, array in found])


def checkpoint_of(model: Any, raw: dict[str, Any]) -> Checkpoint:
    return Checkpoint(raw=raw, tensors={k: LazyTensor.of(v) for k, v in parameters(model).items()})
