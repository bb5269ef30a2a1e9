"""GPTQ's and AWQ's exports, packed here number by number from the formats' descriptions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_mlx import load_model
from minicpm_mlx.convert.checkpoint import convert
from minicpm_mlx.errors import ConfigError, WeightsError
from minicpm_mlx.model.config import Config
from minicpm_mlx.model.config_sections import Quantization
from minicpm_mlx.weights.checkpoint import read_checkpoint
from minicpm_mlx.weights.gptq_awq import in_mlx_form
from minicpm_mlx.weights.lazy_tensor import LazyTensor
from support.data import GOLDEN

Arrays = dict[str, npt.NDArray[Any]]
Codes = npt.NDArray[np.int64]

IDS = mx.array([[1, 7, 300, 45, 6, 7, 511, 0]])
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
FORMS = {
    "gptq": GPTQ,
    "gptq v1": GPTQ | {"checkpoint_format": "gptq"},
    "gptq v2": GPTQ | {"checkpoint_format": "gptq_v2"},
    "awq": AWQ,
    "awq of old": {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"},
}
AWQ_PLACES = {0: 0, 2: 1, 4: 2, 6: 3, 1: 4, 3: 5, 5: 6, 7: 7}
"""By output, modulo 8, which four bits of its word hold it, counted from the lowest."""


def word(values: Mapping[int, int]) -> int:
    """Four-bit `values` by their place in a 32-bit word, as the signed number torch holds."""
    total = sum(value * 16**place for place, value in values.items())
    return total - 2**32 if total >= 2**31 else total


def along_columns(codes: Codes, places: Mapping[int, int]) -> npt.NDArray[np.int32]:
    """(n, columns) to words (n, columns / 8)."""
    rows, columns = codes.shape
    packed = np.zeros((rows, columns // 8), np.int32)
    for i in range(rows):
        for j in range(columns // 8):
            packed[i, j] = word({places[k]: int(codes[i, 8 * j + k]) for k in range(8)})
    return packed


def pack(codes: Codes, zeros: Codes, scales: npt.NDArray[Any], how: Mapping[str, Any]) -> Arrays:
    """Codes (in, out), zero points and scales (groups, out) as an exporter writes them."""
    if how["quant_method"] == "awq":
        return {
            "qweight": along_columns(codes, AWQ_PLACES),
            "qzeros": along_columns(zeros, AWQ_PLACES),
            "scales": scales,
        }
    straight = {k: k for k in range(8)}  # the lowest bits first
    less = 0 if how.get("checkpoint_format") == "gptq_v2" else 1
    inputs, groups = len(codes), len(zeros)
    return {
        "qweight": along_columns(codes.T, straight).T,
        "qzeros": along_columns((zeros - less) % 16, straight),
        "scales": scales,
        "g_idx": np.array([i // (inputs // groups) for i in range(inputs)], np.int32),
    }


def rounded(weight: npt.NDArray[Any], size: int) -> tuple[Codes, Codes, npt.NDArray[np.float16]]:
    """Codes (in, out), zero points and scales of a matrix (out, in), and so its rounding."""
    groups = weight.T.reshape(-1, size, weight.shape[0])  # (groups, size, out)
    low, high = groups.min(1).clip(max=0), groups.max(1).clip(min=0)
    scales = ((high - low) / 15).astype(np.float16)
    zeros = np.rint(-low / scales).astype(np.int64).clip(0, 15)
    codes = np.rint(groups / scales[:, None].astype(np.float64)) + zeros[:, None]
    return codes.clip(0, 15).astype(np.int64).reshape(weight.T.shape), zeros, scales


def unrounded(
    codes: Codes, zeros: Codes, scales: npt.NDArray[np.float16]
) -> npt.NDArray[np.float32]:
    """The matrix (out, in) that the three mean."""
    size = len(codes) // len(zeros)
    spread = np.repeat(scales.astype(np.float32), size, axis=0)
    return np.ascontiguousarray(((codes - np.repeat(zeros, size, axis=0)) * spread).T)


def exported(
    folder: Path, how: Mapping[str, Any], case: str = "minicpm_2b_like", **changes: Any
) -> Arrays:
    """Write a golden case to `folder` as an exporter does; the dense matrices it stands for."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {k: np.array(v) for k, v in dict(mx.load(str(GOLDEN / case / FILE))).items()}
    size = how.get("group_size", how.get("q_group_size"))
    assert isinstance(size, int)
    dense, written = {}, {}
    for name, array in arrays.items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            dense[name] = written[name] = array.astype(np.float16)
            continue
        parts = rounded(array, size)
        dense[name] = unrounded(*parts)
        written |= {f"{module}.{part}": value for part, value in pack(*parts, how).items()}
    written |= changes.pop("arrays", {})
    tensors = {name: mx.array(array) for name, array in written.items() if array is not None}
    mx.save_safetensors(str(folder / FILE), tensors, {"format": "pt"})
    raw = json.loads((GOLDEN / case / "config.json").read_text())
    raw |= {"torch_dtype": "float16", "quantization_config": {**how, **changes}}
    (folder / "config.json").write_text(json.dumps(raw))
    return dense


FILE = "model.safetensors"


@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("form", FORMS)
def test_an_export_computes_what_its_dequantized_reference_does(
    tmp_path: Path, form: str, fuse: bool
) -> None:
    dense = exported(tmp_path / "packed", FORMS[form])
    twin = tmp_path / "dense"
    twin.mkdir()
    raw = json.loads((GOLDEN / "minicpm_2b_like" / "config.json").read_text())
    (twin / "config.json").write_text(json.dumps(raw))
    mx.save_safetensors(str(twin / FILE), {name: mx.array(a) for name, a in dense.items()})
    found = load_model(tmp_path / "packed", dtype="float32", fuse=fuse)(IDS)
    expected = load_model(twin, dtype="float32", fuse=fuse)(IDS)
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-4)
    original = load_model(GOLDEN / "minicpm_2b_like", dtype="float32")(IDS)
    assert mx.abs(found - original).max() > 0.1  # so that the comparison says something


@pytest.mark.parametrize("form", FORMS)
def test_an_export_reads_as_mlx_packs(tmp_path: Path, form: str) -> None:
    exported(tmp_path, FORMS[form])
    assert Config.load(tmp_path).quantization == Quantization(bits=4, group_size=64)
    checkpoint = read_checkpoint(tmp_path)
    assert "quantization_config" not in checkpoint.raw
    for name, tensor in checkpoint.tensors.items():
        array = tensor.load()
        assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype), name
    down = "model.layers.1.mlp.down_proj"
    assert checkpoint.tensors[f"{down}.weight"].shape == (128, 192 // 8)
    assert checkpoint.tensors["model.embed_tokens.weight"].dtype == mx.float16


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    form=st.sampled_from(sorted(FORMS)),
    size=st.sampled_from([32, 64, 128]),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3)),
)
def test_every_code_and_zero_point_is_where_the_format_says(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    form: str,
    size: int,
    shape: tuple[int, int],
) -> None:
    groups, outputs = shape
    draw = np.random.default_rng(seed)
    codes = draw.integers(0, 16, (size * groups, 8 * outputs))
    zeros = draw.integers(0, 16, (groups, 8 * outputs))
    scales = draw.uniform(1e-3, 1, zeros.shape).astype(np.float16)
    key = "q_group_size" if "q_group_size" in FORMS[form] else "group_size"
    how = FORMS[form] | {key: size}
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text(json.dumps({"quantization_config": how}))
    packed = pack(codes, zeros, scales, how).items()
    found = in_mlx_form({f"m.{k}": LazyTensor.of(mx.array(v)) for k, v in packed}, folder)
    parts = [found[f"m.{part}"].load() for part in ("weight", "scales", "biases")]
    weight = mx.dequantize(*parts, group_size=size, bits=4)
    expected = unrounded(codes, zeros, scales)
    np.testing.assert_allclose(np.array(weight), expected, atol=2e-6)


@pytest.mark.parametrize(("form", "target"), [("gptq", "mlx"), ("awq", "llama"), ("awq", "mup")])
def test_an_export_converts(tmp_path: Path, form: str, target: str) -> None:
    exported(tmp_path / "packed", FORMS[form])
    convert(tmp_path / "packed", tmp_path / "out", format=target)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["quantization"] == {"bits": 4, "group_size": 64, "mode": "affine"}
    assert "quantization_config" not in raw
    found = load_model(tmp_path / "out", dtype="float32")(IDS)
    expected = load_model(tmp_path / "packed", dtype="float32")(IDS)
    limit = 2e-2 if target == "llama" else 1e-4  # the float16 embedding is multiplied and rounded
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=limit)


def test_a_head_may_be_packed_as_well(tmp_path: Path) -> None:
    exported(tmp_path, GPTQ, "minicpm_2b_128k_like")
    head = np.array(mx.load(str(tmp_path / FILE))["lm_head.weight"]).astype(np.float32)
    parts = pack(*rounded(head, 64), GPTQ)
    changed: dict[str, Any] = {f"lm_head.{part}": array for part, array in parts.items()}
    exported(tmp_path, GPTQ, "minicpm_2b_128k_like", arrays={**changed, "lm_head.weight": None})
    found = load_model(tmp_path, dtype="float32")
    matrix = unrounded(*rounded(head, 64))
    weight = found.lm_head.weight
    if weight.dtype == mx.uint32:
        layer = found.lm_head
        weight = mx.dequantize(weight, layer.scales, layer.biases, group_size=64, bits=4)
    np.testing.assert_allclose(np.array(weight), matrix, atol=1e-6)


def test_biases_that_are_all_zero_are_left_out(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.bias"
    exported(tmp_path, GPTQ, arrays={name: np.zeros(128, np.float16)})
    assert name not in read_checkpoint(tmp_path).tensors
    exported(tmp_path, GPTQ, arrays={name: np.eye(1, 128, dtype=np.float16)[0]})
    with pytest.raises(WeightsError, match=r"down_proj.bias is not part of this architecture"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, "gptq in 8 bits"),
        ({"bits": 3}, "gptq in 3 bits"),
        ({"group_size": -1}, "gptq in groups of -1"),
        ({"group_size": 16}, "gptq in groups of 16"),
        ({"group_size": None}, "gptq in groups of None"),
        ({"checkpoint_format": "marlin"}, "gptq in the format 'marlin'"),
        ({"is_marlin_format": True}, "gptq in the format marlin"),
        ({**AWQ, "version": "gemv"}, "awq in the format 'gemv'"),
        ({**AWQ, "version": "gemv_fast"}, "awq in the format 'gemv_fast'"),
        ({**AWQ, "version": "marlin"}, "awq in the format 'marlin'"),
        ({**AWQ, "zero_point": False}, "awq without zero points"),
        ({**AWQ, "bits": 8}, "awq in 8 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method 'bitsandbytes'"),
        ({"quant_method": "fp8"}, "quant_method 'fp8'"),
        ({"quant_method": "compressed-tensors"}, "quant_method 'compressed-tensors'"),
        ({"quant_method": None}, "quant_method None"),
    ],
)
def test_what_has_no_form_in_mlx_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    raw = json.loads((GOLDEN / "minicpm_2b_like" / "config.json").read_text())
    raw["quantization_config"] = GPTQ | changes
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=rf"{message}; expected .*minicpm-mlx quantize"):
        Config.load(tmp_path)


@pytest.mark.parametrize("stated", [[], "gptq", 4, True])
def test_a_quantization_config_must_be_an_object(stated: Any) -> None:
    raw = json.loads((GOLDEN / "minicpm_2b_like" / "config.json").read_text())
    with pytest.raises(ConfigError, match="quantization_config must be an object"):
        Config.from_dict(raw | {"quantization_config": stated})


@pytest.mark.parametrize("form", ["gptq v1", "gptq v2"])
def test_groups_in_the_order_of_activations_are_unpacked(tmp_path: Path, form: str) -> None:
    """As an export with desc_act has them: which inputs share a scale is drawn at random."""
    module, size = "model.layers.0.mlp.up_proj", 64
    weight = np.array(mx.load(str(GOLDEN / "minicpm_2b_like" / FILE))[f"{module}.weight"])
    drawn = np.random.default_rng(5).permutation(weight.shape[1])
    codes, zeros, scales = rounded(weight[:, drawn], size)
    back = np.argsort(drawn)
    parts = pack(codes[back], zeros, scales, FORMS[form])
    parts["g_idx"] = (back // size).astype(np.int32)
    wanted = unrounded(codes, zeros, scales)[:, back]
    changed = {f"{module}.{part}": array for part, array in parts.items()}
    exported(tmp_path, FORMS[form], desc_act=True, arrays=changed)
    checkpoint = read_checkpoint(tmp_path)
    found = checkpoint.tensors[f"{module}.weight"]
    assert np.array_equal(np.array(found.load()), wanted.astype(np.float16))
    assert (found.shape, found.dtype) == (wanted.shape, mx.float16)
    assert "model.layers.1.mlp.up_proj" in checkpoint.packings  # whose order changed nothing
    assert mx.isfinite(load_model(tmp_path, fuse=True)(IDS)).all().item()


@pytest.mark.parametrize(
    ("part", "array", "message"),
    [
        ("qzeros", None, "qzeros is missing"),
        ("scales", None, "scales is missing"),
        ("scales", np.zeros((1, 192), np.float16), r"has shape \(1, 192\); expected \(2, 192\)"),
        ("qzeros", np.zeros((2, 192), np.int32), r"has shape \(2, 192\); expected \(2, 24\)"),
        ("qweight", np.zeros(16, np.int32), "must be matrices"),
        ("qweight", np.zeros((16, 192), np.float16), "qweight is float16; expected 32-bit words"),
        ("g_idx", np.zeros(3, np.int32), "g_idx: expected 128 whole numbers, one an input"),
        ("g_idx", np.zeros(128, np.float32), r"got shape \(128,\) of float32"),
        ("g_idx", np.full(128, 2, np.int32), "groups from 0 to 1, got 2 to 2"),
        ("g_idx", np.full(128, -1, np.int32), "groups from 0 to 1, got -1 to -1"),
    ],
)
def test_an_export_with_a_part_missing_or_misshapen_is_refused(
    tmp_path: Path, part: str, array: Any, message: str
) -> None:
    exported(tmp_path, GPTQ, arrays={f"model.layers.0.mlp.up_proj.{part}": array})
    with pytest.raises(WeightsError, match=message):
        read_checkpoint(tmp_path)


def test_packed_weights_without_a_word_on_how_are_refused(tmp_path: Path) -> None:
    exported(tmp_path, GPTQ)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(WeightsError, match=r"no quantization_config.*copy it there"):
        read_checkpoint(tmp_path)


def test_an_export_in_torch_files_is_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="writes the .bin file")
    exported(tmp_path / "safetensors", GPTQ)
    arrays = mx.load(str(tmp_path / "safetensors" / FILE))
    folder = tmp_path / "bin"
    folder.mkdir()
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    config = (tmp_path / "safetensors" / "config.json").read_text()
    (folder / "config.json").write_text(config)
    folders = (folder, tmp_path / "safetensors")
    found, expected = (load_model(folder, dtype="float32")(IDS) for folder in folders)
    assert mx.array_equal(found, expected)
