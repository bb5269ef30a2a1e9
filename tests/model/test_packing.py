"""Packing and unpacking: the same numbers as MLX's, in the right layers, once each."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from minicpm_mlx import device, load_model
from minicpm_mlx.errors import InvalidArgumentError
from minicpm_mlx.model import packing as packing_module
from minicpm_mlx.model.config import Config
from minicpm_mlx.model.config_sections import Quantization
from minicpm_mlx.model.kernels import cpu_unpack
from minicpm_mlx.model.packing import apply_packing, dequantize, quantize
from minicpm_mlx.model.transformer import Model
from minicpm_mlx.quantization.job import Job
from minicpm_mlx.quantization.recipe import Recipe
from minicpm_mlx.weights.checkpoint import read_checkpoint, write_checkpoint
from support.data import CASES, GOLDEN

IDS = mx.array([[1, 7, 300, 45, 6, 7, 511, 0]])
FOUR = Quantization(bits=4, group_size=32)
DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def random(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(5))


def unpacked(packed: mx.array, scales: mx.array, biases: mx.array, bits: int) -> mx.array:
    dense, jobs = cpu_unpack.unpack(packed, scales, biases, bits)
    for job in jobs:
        job.run()
    return dense


def names(model: nn.Module) -> set[str]:
    found: Any = tree_flatten(model.parameters())
    return {name for name, _ in found}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("shape", [(3, 128), (5, 7, 256), (1300, 256)])  # the last: two blocks
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unpacking_on_a_cpu_gives_what_mlx_gives(
    bits: int, group: int, shape: tuple[int, ...], dtype: mx.Dtype
) -> None:
    packed, scales, biases = mx.quantize(random(*shape).astype(dtype), group_size=group, bits=bits)
    found = unpacked(packed, scales, biases, bits)
    assert (found.shape, found.dtype) == (shape, mx.float32)
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    expected = mx.dequantize(packed, scales, biases, group_size=group, bits=bits)
    # Two roundings of numbers up to |scale * code| + |bias|, or one where MLX fuses them.
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("on_cpu", [True, False], ids=["cpu", "gpu"])
@pytest.mark.parametrize(
    ("bits", "group", "mode"),
    [(4, 64, "affine"), (8, 32, "affine"), (3, 64, "affine"), (6, 64, "affine"), (4, 32, "mxfp4")],
)
def test_dequantized_layers_compute_as_packed_ones_do(
    monkeypatch: pytest.MonkeyPatch, on_cpu: bool, bits: int, group: int, mode: str
) -> None:
    monkeypatch.setattr(packing_module, "on_cpu", lambda: on_cpu)
    packing = Quantization(bits=bits, group_size=group, mode=mode)
    mx.random.seed(4)
    layers = nn.Sequential(nn.Embedding(50, 128), nn.Linear(128, 192), nn.Linear(192, 64, False))

    def outputs() -> list[mx.array]:
        embedding, *linear = layers.layers
        rows = embedding(IDS % 50).astype(mx.float32)  # float modes give out bfloat16
        return [rows, embedding.as_linear(rows), nn.Sequential(*linear)(rows)]

    assert len(quantize(layers, packing)) == 3
    expected = outputs()
    dequantize(layers, mx.float32)
    assert [type(layer) for layer in layers.layers] == [nn.Embedding, nn.Linear, nn.Linear]
    assert ["bias" in layer for layer in layers.layers] == [False, True, False]
    for found, wanted in zip(outputs(), expected, strict=True):
        assert mx.allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_dequantizing_gives_the_dtype_asked_for() -> None:
    layers = nn.Sequential(nn.Linear(64, 64))
    quantize(layers, FOUR)
    dequantize(layers, mx.bfloat16)
    assert (layers.layers[0].weight.dtype, layers.layers[0].bias.dtype) == (mx.bfloat16,) * 2


def test_every_matrix_is_packed_but_routers() -> None:
    model = load_model(GOLDEN / "minicpm_moe_like")
    packed = quantize(model, FOUR)
    routers = {f"model.layers.{i}.mlp.gate.weight" for i in range(3)}
    plain = {name for name in names(model) if name.endswith("weight")} - {
        f"{path}.weight" for path in packed
    }
    assert {name for name in plain if "norm" not in name} == routers
    assert "model.layers.2.mlp.experts.7.w2" in packed
    assert set(packed.values()) == {FOUR}


def test_rows_of_no_whole_number_of_groups_stay() -> None:
    model = load_model(GOLDEN / "minicpm_2b_like")  # rows of 128, and of 192 in down_proj
    packed = quantize(model, Quantization(bits=8, group_size=128))
    assert "model.layers.0.mlp.up_proj" in packed
    assert not any(path.endswith("down_proj") for path in packed)


def test_nothing_to_pack_is_an_error() -> None:
    model = load_model(GOLDEN / "minicpm_linear_rope")
    with pytest.raises(InvalidArgumentError, match="smaller group size"):
        quantize(model.model.layers[0].self_attn, Quantization(bits=4, group_size=128))


def test_a_tied_embedding_is_packed_once() -> None:
    model = load_model(GOLDEN / "minicpm_2b_like")
    assert "model.embed_tokens" in quantize(model, FOUR)
    assert {name for name in names(model) if "embed" in name or "head" in name} == {
        f"model.embed_tokens.{part}" for part in ("weight", "scales", "biases")
    }


def test_packing_as_told_passes_over_what_cannot_be_packed() -> None:
    model = Model(Config.load(GOLDEN / "minicpm_2b_like"))
    wide = Quantization(bits=4, group_size=128)
    paths = ["model.norm", "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj", "nowhere"]
    apply_packing(model, dict.fromkeys(paths, wide))
    found = {name for name in names(model) if name.endswith("scales")}
    assert found == {"model.layers.0.mlp.up_proj.scales"}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("case", CASES)
def test_a_quantized_copy_loads_as_it_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, bits: int
) -> None:
    monkeypatch.setattr(device, "unpack_to", lambda dtype, parameters: None)
    packing = Quantization(bits=bits, group_size=32)
    (tmp_path / "work").mkdir()
    job = Job(
        read_checkpoint(GOLDEN / case), Recipe(method="rtn", packing=packing), [], tmp_path / "work"
    )
    write_checkpoint(job.run(), tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())["quantization"]
    assert stated == {"bits": bits, "group_size": 32, "mode": "affine"}
    expected = load_model(GOLDEN / case, dtype="float32")
    quantize(expected, packing)
    expected.apply(lambda array: array.astype(mx.float16) if array.dtype == mx.float32 else array)
    expected.apply(lambda array: array.astype(mx.float32) if array.dtype == mx.float16 else array)
    found = load_model(tmp_path, dtype="float32")
    assert names(found) == names(expected)
    assert mx.array_equal(found(IDS), expected(IDS))
