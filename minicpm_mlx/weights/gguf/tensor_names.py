"""GGUF's names for a model's tensors, and its order of the rows that are rotated."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy.typing as npt

from ...arguments import printable
from ...errors import WeightsError
from ...model.config import Config

MODULES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = {
    "rope_factors_short.weight": "short_factor",
    "rope_factors_long.weight": "long_factor",
}
"""Tensors that hold what config.json has in rope_scaling."""

_IN_LAYER = re.compile(
    r"blk\.(?P<layer>0|[1-9][0-9]{,4})\.(?P<module>\w+)\.(?P<part>weight|bias)", re.ASCII
)
_GGUF_NAMES = {name: part for part, name in (MODULES | LAYER_MODULES).items()}

Array = npt.NDArray[Any]
Order = Callable[[Array], Array]
"""Rows (or a vector) of a tensor to the same in another order."""


def checkpoint_name(name: str) -> tuple[str, str]:
    """Module and part ("weight", "bias") of a tensor; WeightsError for one of no llama."""
    module, _, part = name.rpartition(".")
    if part == "weight" and module in MODULES:
        return MODULES[module], part
    if (match := _IN_LAYER.fullmatch(name)) and match["module"] in LAYER_MODULES:
        return f"model.layers.{match['layer']}.{LAYER_MODULES[match['module']]}", match["part"]
    known = ", ".join([*MODULES, *LAYER_MODULES])
    raise WeightsError(f"tensor {printable(name)}: expected the weights of a llama, {known}")


def gguf_name(module: str, part: str) -> str:
    """GGUF's name of a checkpoint's tensor."""
    match module.split("."):
        case ["model", "layers", index, *inner]:
            return f"blk.{index}.{_GGUF_NAMES['.'.join(inner)]}.{part}"
    return f"{_GGUF_NAMES[module]}.{part}"


def from_gguf(module: str, config: Config) -> Order:
    """The permutation of a module's rows from GGUF's order to the checkpoint's.

    RoPE rotates pairs of rows in each head of q and k. Checkpoints of transformers pair row i with
    i + head_dim / 2, llama.cpp pairs neighbours, so its converter interleaves the two halves.
    For minicpm3 llama.cpp pairs halves as well.
    """
    heads = _heads(module, config)
    return lambda rows: _swapped(rows, heads, -1, 2) if heads else rows


def to_gguf(module: str, config: Config) -> Order:
    """The permutation of a module's rows to GGUF's order; see `from_gguf`."""
    heads = _heads(module, config)
    return lambda rows: _swapped(rows, heads, 2, -1) if heads else rows


def _heads(module: str, config: Config) -> int:
    """Number of heads in a module's rows that RoPE rotates; 0: none."""
    if module.endswith("q_proj"):
        return config.num_attention_heads
    return config.num_key_value_heads if module.endswith("k_proj") else 0


def _swapped(rows: Array, heads: int, first: int, second: int) -> Array:
    split = rows.reshape(heads, first, second, *rows.shape[1:])
    swapped: Array = split.swapaxes(1, 2).reshape(rows.shape)
    return swapped
