"""Small models with ternary layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from minicpm_mlx.weights.checkpoint import Checkpoint, write_checkpoint
from minicpm_mlx.weights.lazy_tensor import LazyTensor

from .data import write_tokenizer
from .random_models import TINY, checkpoint_of, random_model

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "dim_model_base": 32}
FORMATS = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def ternary(shape: tuple[int, ...], group: int, seed: int = 0) -> mx.array:
    """Random (out, in) of -s, 0 and s, each group with its own s; all alike if there are none."""
    group = group if shape[1] % group == 0 else shape[1]
    draw = np.random.default_rng(seed)
    scale = draw.uniform(0.01, 0.1, (shape[0], shape[1] // group, 1))
    signs = draw.integers(-1, 2, (shape[0], shape[1] // group, group))
    return mx.array((signs * scale).reshape(shape).astype(np.float32))


def ternary_model(group: int = 64, dtype: mx.Dtype = mx.bfloat16, **changes: Any) -> Checkpoint:
    """A model whose layers are ternary; embedding, head and norms are not."""
    raw = {**TINY, **WIDE, **changes}
    tensors = dict(checkpoint_of(random_model(**(WIDE | changes)), raw).tensors)
    for number, (name, tensor) in enumerate(tensors.items()):
        array = tensor.load()
        if "layers." in name and array.ndim == 2 and "mlp.gate.w" not in name:
            array = ternary(array.shape, group, number)
        tensors[name] = LazyTensor.of(array.astype(dtype))
    return Checkpoint(raw=raw, tensors=tensors)


def written(checkpoint: Checkpoint, folder: Path) -> Path:
    folder.mkdir()
    write_checkpoint(checkpoint, folder)
    write_tokenizer(folder)
    return folder
