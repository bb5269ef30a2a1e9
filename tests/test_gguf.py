"""GGUF files of a llama: every value survives, and every other file is refused."""

import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from minicpm_mlx.errors import WeightsError
from minicpm_mlx.weights.gguf import read

gguf = pytest.importorskip("gguf")
from gguf import GGMLQuantizationType as Type  # noqa: E402
from gguf import quants  # noqa: E402

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCAB = 64, 4, 2, 16, 96, 40
SHAPES = {
    "token_embd": (VOCAB, HIDDEN),
    "output_norm": (HIDDEN,),
    "blk.0.attn_norm": (HIDDEN,),
    "blk.0.attn_q": (HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_output": (HIDDEN, HEADS * HEAD_DIM),
    "blk.0.ffn_norm": (HIDDEN,),
    "blk.0.ffn_gate": (INNER, HIDDEN),
    "blk.0.ffn_up": (INNER, HIDDEN),
    "blk.0.ffn_down": (HIDDEN, INNER),
}
MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "blk.0.attn_norm": "model.layers.0.input_layernorm",
    "blk.0.attn_q": "model.layers.0.self_attn.q_proj",
    "blk.0.attn_k": "model.layers.0.self_attn.k_proj",
    "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
    "blk.0.attn_output": "model.layers.0.self_attn.o_proj",
    "blk.0.ffn_norm": "model.layers.0.post_attention_layernorm",
    "blk.0.ffn_gate": "model.layers.0.mlp.gate_proj",
    "blk.0.ffn_up": "model.layers.0.mlp.up_proj",
    "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
}
Tensors = dict[str, np.ndarray]


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of q and k (LlamaModel.permute)."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def tensors() -> Tensors:
    """A checkpoint's tensors under GGUF's names, in the checkpoint's order of rows."""
    random = np.random.default_rng(7)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def write(
    path: Path,
    content: Tensors,
    kind: Type = Type.F32,
    *,
    architecture: str = "llama",
    heads: Any = HEADS,
    kv_heads: int | None = KV_HEADS,
) -> Path:
    """A GGUF file: matrices as `kind`, vectors as F32, names without a dot get ".weight"."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_head_count(heads)
    if kv_heads is not None:
        writer.add_head_count_kv(kv_heads)
    for name, array in content.items():
        name = name if name.endswith(".bias") else f"{name}.weight"
        if array.ndim == 2 and kind != Type.F32:
            writer.add_tensor(name, quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converted(content: Tensors) -> Tensors:
    """`content` with the rows of q and k in llama.cpp's order."""
    heads = {"blk.0.attn_q": HEADS, "blk.0.attn_k": KV_HEADS}
    return {n: permuted(a, heads[n]) if n in heads else a for n, a in content.items()}


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    return message


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


@pytest.mark.parametrize(("kind", "bits"), [(Type.Q4_1, 4), (Type.Q8_0, 8)])
def test_quantized_blocks_keep_every_value(path: Path, kind: Type, bits: int) -> None:
    content = tensors()
    _, arrays, packed = read(write(path, converted(content), kind))
    matrices = {MODULES[name] for name, array in content.items() if array.ndim == 2}
    assert packed == dict.fromkeys(matrices, bits)
    for name, array in content.items():
        module = MODULES[name]
        if array.ndim == 1:
            assert np.array_equal(np.array(arrays[f"{module}.weight"]), array)
            continue
        parts = [arrays[f"{module}.{part}"] for part in ("weight", "scales", "biases")]
        assert [part.dtype for part in parts] == [mx.uint32, mx.float32, mx.float32]
        found = mx.dequantize(*parts, group_size=32, bits=bits)
        # A row's blocks do not depend on the order of rows, so neither does its rounding.
        expected = quants.dequantize(quants.quantize(array, kind), kind)
        np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=2e-6)


def test_unpacked_tensors_are_read_as_they_are(path: Path) -> None:
    content = tensors()
    metadata, arrays, packed = read(write(path, converted(content)))
    assert packed == {}
    assert {f"{MODULES[name]}.weight" for name in content} == set(arrays)
    for name, array in content.items():
        assert np.array_equal(np.array(arrays[f"{MODULES[name]}.weight"]), array)
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.attention.head_count"] == HEADS


def test_without_key_heads_there_are_as_many_as_query_heads(path: Path) -> None:
    rows = tensors()["blk.0.attn_q"]
    _, arrays, _ = read(write(path, {"blk.0.attn_k": permuted(rows, HEADS)}, kv_heads=None))
    assert np.array_equal(np.array(arrays["model.layers.0.self_attn.k_proj.weight"]), rows)


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q5_1, Type.F16])
def test_another_tensor_type_is_named(path: Path, kind: Type) -> None:
    message = refusal(write(path, {"blk.0.ffn_up": tensors()["blk.0.ffn_up"]}, kind))
    assert f"blk.0.ffn_up.weight is 2-dimensional {kind.name}" in message
    assert "Q4_1 or Q8_0" in message


def test_another_architecture_is_refused(path: Path) -> None:
    message = refusal(write(path, tensors(), architecture="qwen2"))
    assert "general.architecture is qwen2; expected llama" in message


@pytest.mark.parametrize(
    "name", ["blk.0.attn_q.bias", "rope_freqs", "blk.0.ffn_gate_exps", "blk.x.ffn_up", "ffn\n_up"]
)
def test_a_tensor_of_no_llama_is_named(path: Path, name: str) -> None:
    message = refusal(write(path, {name: np.zeros(32, np.float32)}))
    assert name.replace("\n", "?") in message


@pytest.mark.parametrize("heads", [0, 3, 64, [4]])
def test_heads_that_do_not_divide_the_rows_are_refused(path: Path, heads: Any) -> None:
    message = refusal(write(path, tensors(), heads=heads))
    assert "blk.0.attn_q.weight has shape (64, 64)" in message


@pytest.mark.parametrize(
    "content", [b"", b"GG", b"GGUF", b"PK\3\4" + b"\0" * 60, b"GGUF" + b"\xff" * 60]
)
def test_what_is_not_gguf_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert "not a readable GGUF file" in refusal(path)


def test_a_missing_file_is_named(path: Path) -> None:
    assert "not a readable GGUF file" in refusal(path)


@pytest.mark.parametrize("share", [0.01, 0.03, 0.5, 0.99])
def test_a_file_cut_short_is_refused(path: Path, share: float) -> None:
    whole = write(path, tensors(), Type.Q8_0).read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert "not a readable GGUF file" in refusal(path)


def test_an_unknown_version_is_refused(path: Path) -> None:
    whole = write(path, tensors()).read_bytes()
    path.write_bytes(whole[:4] + struct.pack("<I", 99) + whole[8:])
    assert "version 99" in refusal(path)
