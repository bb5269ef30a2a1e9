"""Method exact: ternary weights in 2 bits, equal to the source's bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minicpm_mlx as mm
from minicpm_mlx.errors import InvalidArgumentError
from minicpm_mlx.model_cards import resolve
from minicpm_mlx.quantization.recipe import Recipe, packing
from minicpm_mlx.quantization.report import model_card, summary
from minicpm_mlx.quantization.ternary import check_equal, check_ternary, pack_ternary
from minicpm_mlx.quantization.write import write_quantized
from minicpm_mlx.weights.checkpoint import Checkpoint, read_checkpoint
from minicpm_mlx.weights.gguf import convert_gguf, write_gguf
from minicpm_mlx.weights.lazy_ops import cast, dense
from minicpm_mlx.weights.lazy_tensor import LazyTensor
from minicpm_mlx.weights.llama_format import fold_tied
from support.gguf_files import with_tokenizer
from support.random_models import IDS, MLA, TINY, checkpoint_of, random_model
from support.ternary import FORMATS, ternary, ternary_model, written


def quantized(source: Path, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    return write_quantized(source, folder, Recipe(method="exact"), resolve(str(source)))


@pytest.mark.parametrize(("dtype", "group"), [("float32", 32), ("bfloat16", 64), ("float16", 128)])
def test_a_packed_model_has_the_same_weights_and_logits(
    dtype: str, group: int, tmp_path: Path
) -> None:
    base, out = written(ternary_model(group, FORMATS[dtype]), tmp_path / "base"), tmp_path / "out"
    report = quantized(base, out)
    packed, source = read_checkpoint(out), read_checkpoint(base)
    assert {how.group_size for how in packed.packings.values()} == {group}
    assert len(packed.packings) == report["equal"]["matrices"] == 7
    for name, tensor in source.tensors.items():
        if "proj" not in name:
            assert packed.tensors[name].dtype == FORMATS[dtype]
            assert mx.array_equal(packed.tensors[name].load(), tensor.load())
    for fuse in (False, True):  # dense in float32 here, so the same products
        ours, expected = (mm.load_model(f, "float32", fuse)(IDS) for f in (out, base))
        assert mx.array_equal(ours, expected)
    assert report["quality"]["kl_mean"] == 0
    assert report["method"] == "exact"
    assert "7 matrices" in summary(report)["exact"]
    assert "embed_tokens" in summary(report)["left dense"]
    assert "not ternary" in model_card(report)


def test_latent_attention_is_packed_exactly(tmp_path: Path) -> None:
    base = written(ternary_model(32, mx.float32, **MLA), tmp_path / "base")
    report = quantized(base, tmp_path / "out")
    assert report["equal"]["matrices"] == 8
    for fuse in (False, True):
        ours, expected = (mm.load_model(f, "float32", fuse)(IDS) for f in (tmp_path / "out", base))
        assert mx.array_equal(ours, expected)


def test_folding_keeps_packed_and_dense_weights_equal(tmp_path: Path) -> None:
    source = ternary_model()
    folded = fold_tied(pack_ternary(source))
    assert check_equal(fold_tied(source), folded) == {"matrices": 7, "weights": 163840}


def test_mlx_lm_reads_the_packed_folder(tmp_path: Path) -> None:
    from mlx_lm.utils import load_model

    base, out = written(ternary_model(), tmp_path / "base"), tmp_path / "out"
    quantized(base, out)
    theirs, _ = load_model(out)
    found = theirs.model.layers[0].mlp.down_proj
    assert isinstance(found, nn.QuantizedLinear)
    assert (found.bits, found.group_size) == (2, 64)
    theirs.set_dtype(mx.float32)
    ours = mm.load_model(base, "float32", fuse=True)(IDS)
    np.testing.assert_allclose(np.array(theirs(IDS)), np.array(ours), atol=1e-3)


@settings(max_examples=30)
@given(
    st.sampled_from(sorted(FORMATS)),
    st.sampled_from([32, 64, 128]),
    st.lists(st.sampled_from(["mixed", "zero", "negative zero", "plus", "minus"]), min_size=4),
    st.floats(2**-14, 2**10, width=16),
)
def test_any_ternary_matrix_unpacks_to_itself(
    dtype: str, group: int, kinds: list[str], s: float
) -> None:
    rows = len(kinds)
    values = {"zero": [0.0], "negative zero": [-0.0], "plus": [s], "minus": [-s, -0.0]}
    weight = np.zeros((rows, 128), np.float32)
    for row, kind in enumerate(kinds):
        choice = values.get(kind, [-s, 0.0, s, -0.0])
        weight[row] = np.resize(np.array(choice, np.float32), 128)
    weight = weight * np.repeat(np.float32(2) ** np.arange(128 // group), group)
    array = mx.array(weight).astype(FORMATS[dtype])
    check = check_ternary(array)
    assert check.group_size is not None
    assert check.group_size >= group
    config = {**TINY, "hidden_size": 128, "vocab_size": rows}
    one = Checkpoint(raw=config, tensors={"model.embed_tokens.weight": LazyTensor.of(array)})
    assert check_equal(one, pack_ternary(one)) == {"matrices": 1, "weights": array.size}


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("odd", [0.5, float("nan"), float("inf"), -0.099])
def test_a_single_odd_weight_is_found(odd: float, dtype: str) -> None:
    weight = np.resize(np.array([0.1, 0, -0.1], np.float32), (4, 128))
    weight[2, 70] = odd
    found = check_ternary(mx.array(weight).astype(FORMATS[dtype]))
    assert (found.group_size, found.groups, found.misfits) == (None, 16, 1)


def test_infinite_groups_and_those_whose_double_is_do_not_fit() -> None:
    for value in (float("inf"), 40000.0):
        weight = mx.full((2, 64), value, mx.float16)
        assert check_ternary(weight).misfits == 4
    assert check_ternary(mx.full((2, 64), 32000.0, mx.float16)).group_size == 64


def test_matrices_that_are_joined_share_a_group_size() -> None:
    model = ternary_model(128)
    name = "model.layers.0.self_attn.k_proj"
    tensors = {**model.tensors, f"{name}.weight": LazyTensor.of(ternary((128, 128), 32))}
    found = pack_ternary(Checkpoint(raw=model.raw, tensors=tensors)).packings
    sizes = {path.rpartition(".")[2]: how.group_size for path, how in found.items()}
    assert sizes["q_proj"] == sizes["k_proj"] == sizes["v_proj"] == 32
    assert sizes["o_proj"] == sizes["gate_proj"] == 128


def test_another_model_is_refused_with_the_share_and_the_worst_matrix(tmp_path: Path) -> None:
    model = ternary_model()
    bad = np.array(model.tensors["model.layers.0.mlp.down_proj.weight"].load().astype(mx.float32))
    bad[3, 40] = 0.5
    tensors = dict(model.tensors)
    tensors["model.layers.0.mlp.down_proj.weight"] = LazyTensor.of(mx.array(bad))
    base = written(Checkpoint(raw=model.raw, tensors=tensors), tmp_path / "base")
    expected = (
        r"method exact is for .* of 5120 groups .* 1 \(0.0195 %\) .*mlp.down_proj \(0.0977 %\)"
    )
    with pytest.raises(InvalidArgumentError, match=expected):
        quantized(base, tmp_path / "out")
    plain = written(checkpoint_of(random_model(), TINY), tmp_path / "plain")
    with pytest.raises(InvalidArgumentError, match=r"\(100 %\)"):
        quantized(plain, tmp_path / "out2")


def test_rows_of_odd_widths_stay_dense_and_are_named(tmp_path: Path) -> None:
    model = ternary_model(32, intermediate_size=104)
    report = quantized(written(model, tmp_path / "base"), tmp_path / "out")
    assert report["dense"]["matrices"] == {"mlp.down_proj": 1}
    assert report["not_ternary"]["matrices"] == {"model.embed_tokens": 1}


def test_a_recipe_with_a_packing_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="exact takes 2 bits"):
        Recipe(method="exact", packing=packing(2, 32))


@pytest.mark.parametrize(("kind", "kept"), [("F16", 0), ("Q4_0", 7), ("Q4_1", 7)])
def test_a_gguf_file_holds_the_weights_unchanged(kind: str, kept: int, tmp_path: Path) -> None:
    base = written(ternary_model(), tmp_path / "base")
    folder, back = with_tokenizer(base, tmp_path / "with"), tmp_path / "back"
    packed = pack_ternary(read_checkpoint(folder))
    assert write_gguf(packed, folder, tmp_path / "m.gguf", kind).kept == kept
    back.mkdir()
    convert_gguf(tmp_path / "m.gguf", back)
    wider = cast(read_checkpoint(back), mx.float32)  # codes times s need more than 16 bits
    found, expected = dense(wider).tensors, read_checkpoint(base).tensors
    for name, tensor in expected.items():
        if "_proj" in name:
            wide = (t.load().astype(mx.float32) for t in (found[name], tensor))
            assert mx.array_equal(*wide)
