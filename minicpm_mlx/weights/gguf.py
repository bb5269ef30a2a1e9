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
from .lazy import printable

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

    Raises WeightsError for a file that is not GGUF, or of another architecture or tensor type.
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
        raise WeightsError(f"{path}: not a readable GGUF file ({printable(error)})") from None
    if metadata.get("general.architecture") != "llama":  # others order the rows of q and k anew
        raise WeightsError(
            f"{path}: general.architecture is {printable(metadata.get('general.architecture'))}; "
            "expected llama"
        )
    query_heads = metadata.get("llama.attention.head_count")
    key_heads = metadata.get("llama.attention.head_count_kv", query_heads)
    arrays: dict[str, mx.array] = {}
    bits: dict[str, int] = {}
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        module = _rename(tensor.name, path)
        if kind == "F32":
            found = {"weight": np.array(tensor.data)}
        elif kind in ("Q4_1", "Q8_0") and tensor.data.ndim == 2:
            found = (_q4_1 if kind == "Q4_1" else _q8_0)(np.asarray(tensor.data))
            bits[module] = 4 if kind == "Q4_1" else 8
        else:
            raise WeightsError(
                f"{path}: {tensor.name} is {tensor.data.ndim}-dimensional {kind}; expected F32, or "
                "a matrix of Q4_1 or Q8_0"
            )
        if module.endswith(("q_proj", "k_proj")):
            heads = query_heads if module.endswith("q_proj") else key_heads
            shape = found["weight"].shape
            if not isinstance(heads, int) or heads < 1 or len(shape) != 2 or shape[0] % (2 * heads):
                raise WeightsError(
                    f"{path}: {tensor.name} has shape {shape}; expected rows for "
                    f"{printable(heads)} heads"
                )
            found = {name: _unpermute(rows, heads) for name, rows in found.items()}
        arrays.update({f"{module}.{name}": mx.array(array) for name, array in found.items()})
    return metadata, arrays, bits


def _rename(name: str, path: Path) -> str:
    match name.split("."):
        case [part, "weight"] if part in NAMES:
            return NAMES[part]
        case ["blk", index, part, "weight"] if part in NAMES and index.isdecimal():
            return f"model.layers.{index}.{NAMES[part]}"
    raise WeightsError(
        f"{path}: tensor {printable(name)}: expected the weights of a llama, {', '.join(NAMES)}"
    )


def _unpermute(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """GGUF interleaves the rotated pairs of each head's rows; checkpoints keep them in halves."""
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
