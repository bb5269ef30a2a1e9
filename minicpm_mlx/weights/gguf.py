"""Reading llama-architecture GGUF files into MLX's packed form, without changing a value.

Q4_1 and Q8_0 blocks hold 32 weights, a half-precision scale and (Q4_1) a minimum: the same thing
as MLX's affine groups of 32, in another order. Scales are widened to float32, so that folding muP
multipliers into them later rounds no more than float32 does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..errors import MissingPackageError, WeightsError

GROUP = 32
"""Weights a block."""

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

Arrays = dict[str, npt.NDArray[Any]]


def read(path: Path) -> tuple[dict[str, Any], dict[str, mx.array], dict[str, int]]:
    """The metadata of a GGUF file, its tensors under the checkpoint's names, and bits by module.

    Raises WeightsError for a file that is not GGUF or holds a tensor type not supported here.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise MissingPackageError(
            'reading GGUF needs the gguf package: pip install "minicpm-mlx[gguf]"'
        ) from None
    try:
        reader = GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the parser raises whatever a damaged file leads it to
        raise WeightsError(f"{path}: not a readable GGUF file ({error})") from None
    heads = {
        "attn_q": metadata.get("llama.attention.head_count"),
        "attn_k": metadata.get("llama.attention.head_count_kv"),
    }
    arrays: dict[str, mx.array] = {}
    bits: dict[str, int] = {}
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        part = tensor.name.split(".")[-2]
        module = _rename(tensor.name)
        if kind == "F32":
            found = {"weight": np.array(tensor.data)}
        elif kind in ("Q4_1", "Q8_0"):
            found = (_q4_1 if kind == "Q4_1" else _q8_0)(np.asarray(tensor.data))
            bits[module] = 4 if kind == "Q4_1" else 8
        else:
            raise WeightsError(f"{path}: {tensor.name} is {kind}; expected F32, Q4_1 or Q8_0")
        for name, array in found.items():
            arrays[f"{module}.{name}"] = mx.array(_unpermute(array, heads.get(part)))
    return metadata, arrays, bits


def _rename(name: str) -> str:
    *block, part, _ = name.split(".")
    if part not in NAMES:
        raise WeightsError(f"GGUF tensor {name}: expected one of a llama, {', '.join(NAMES)}")
    return f"model.layers.{block[1]}.{NAMES[part]}" if block else NAMES[part]


def _unpermute(rows: npt.NDArray[Any], heads: int | None) -> npt.NDArray[Any]:
    """GGUF interleaves the rotated pairs of each head's rows; checkpoints keep them in halves."""
    if heads is None:
        return rows
    out, width = rows.shape
    return rows.reshape(heads, -1, 2, width).swapaxes(1, 2).reshape(out, width)


def _q4_1(raw: npt.NDArray[np.uint8]) -> Arrays:
    """Blocks of scale, minimum and 16 bytes; byte j holds weight j low and weight j + 16 high."""
    blocks = raw.reshape(raw.shape[0], -1, 20)
    halves = blocks[..., :4].copy().view(np.float16).astype(np.float32)
    codes = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], axis=-1)
    packed = codes[..., ::2] | (codes[..., 1::2] << 4)  # MLX: consecutive weights, low bits first
    return {
        "weight": packed.reshape(raw.shape[0], -1).view(np.uint32),
        "scales": halves[..., 0],
        "biases": halves[..., 1],
    }


def _q8_0(raw: npt.NDArray[np.uint8]) -> Arrays:
    """Blocks of scale and 32 signed bytes; MLX counts from 0, so the bias is -128 scales."""
    blocks = raw.reshape(raw.shape[0], -1, 34)
    scales = blocks[..., :2].copy().view(np.float16).astype(np.float32)[..., 0]
    codes = blocks[..., 2:] ^ 128
    return {
        "weight": codes.reshape(raw.shape[0], -1).view(np.uint32),
        "scales": scales,
        "biases": scales * -128,
    }
