"""Folding muP into a Llama's weights and out of them again: the same model, the same numbers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_mlx.errors import InvalidArgumentError, WeightsError
from minicpm_mlx.model.config_sections import Quantization
from minicpm_mlx.quantization.job import Job
from minicpm_mlx.quantization.recipe import Recipe
from minicpm_mlx.weights.checkpoint import Checkpoint, read_checkpoint
from minicpm_mlx.weights.lazy_ops import cast, dense
from minicpm_mlx.weights.llama_format import Scales, fold, fold_tied, unfold
from minicpm_mlx.weights.load import assemble
from support.data import CASES, GOLDEN

IDS = mx.array([[1, 7, 300, 45, 6, 7, 511, 0]])
SCALES = Scales(scale_emb=12, scale_depth=1.4, dim_model_base=32)
FOLDABLE = [
    case
    for case in CASES
    if not any(
        word in case for word in ("moe", "_s_", "longctx", "llama_format", "minicpm3", "minicpm5")
    )
]
TIES = [case for case in FOLDABLE if "128k" not in case]


def logits(checkpoint: Checkpoint) -> Any:
    return np.array(assemble(checkpoint.config, dict(checkpoint.tensors), mx.float32)(IDS))


def scales_of(checkpoint: Checkpoint) -> Scales:
    raw = checkpoint.raw
    return Scales(**{key: raw[key] for key in ("scale_emb", "scale_depth", "dim_model_base")})


def assert_same(found: Checkpoint, expected: Checkpoint, rtol: float) -> None:
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        other = found.tensors[name]
        assert (other.shape, other.dtype) == (tensor.shape, tensor.dtype)
        left, right = other.load(), tensor.load()
        assert left.dtype == other.dtype
        if mx.issubdtype(tensor.dtype, mx.floating):
            left, right = left.astype(mx.float32), right.astype(mx.float32)
            np.testing.assert_allclose(np.array(left), np.array(right), rtol=rtol, err_msg=name)
        else:
            assert mx.array_equal(left, right), name


def rounded(packing: Quantization, folder: Path) -> Checkpoint:
    source = read_checkpoint(GOLDEN / "minicpm_2b_like")
    return Job(source, Recipe(method="rtn", packing=packing), [], folder).run()


@pytest.mark.parametrize("case", FOLDABLE)
def test_a_folded_model_computes_the_same_and_unfolds_to_its_source(case: str) -> None:
    source = read_checkpoint(GOLDEN / case)
    folded = fold(source)
    assert "lm_head.weight" in folded.tensors
    assert (folded.config.scale_emb, folded.config.residual_scale) == (1, 1)
    assert folded.config.logit_divisor == 1
    assert not folded.config.tie_word_embeddings
    np.testing.assert_allclose(logits(folded), logits(source), atol=1e-4)
    again = unfold(folded, scales_of(source))
    assert again.config == source.config
    assert_same(again, source, rtol=3e-7)


def test_folding_is_what_openbmb_does() -> None:
    expected = read_checkpoint(GOLDEN / "minicpm_2b_like_llama_format")
    found = fold(read_checkpoint(GOLDEN / "minicpm_2b_like"))
    assert_same(found, expected, rtol=3e-7)
    assert replace(found.config, mup_folded=None) == expected.config  # the record is ours


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in CASES
        if not any(word in case for word in ("moe", "_s_", "minicpm4_like", "minicpm3"))
    ],
)
def test_the_tied_form_is_no_larger_and_computes_the_same(case: str) -> None:
    source = read_checkpoint(GOLDEN / case)
    folded = fold_tied(source)
    assert folded.tensors.keys() == source.tensors.keys()
    assert folded.config.tie_word_embeddings == source.config.tie_word_embeddings
    np.testing.assert_allclose(logits(folded), logits(source), atol=1e-4)
    if not source.config.mup_folded and source.config.scale_depth:
        again = unfold(folded, scales_of(source))
        assert again.config == source.config
        assert_same(again, source, rtol=3e-7)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("case", TIES)
def test_a_head_that_is_the_embedding_is_tied_again(case: str, dtype: mx.Dtype) -> None:
    source = cast(read_checkpoint(GOLDEN / case), dtype)
    again = unfold(fold(source), scales_of(source))
    assert again.config.tie_word_embeddings
    assert "lm_head.weight" not in again.tensors


def test_a_head_that_differs_in_one_weight_stays_untied() -> None:
    source = read_checkpoint(GOLDEN / "minicpm_2b_like")
    folded = fold(source)
    head = folded.tensors["lm_head.weight"]

    def load() -> mx.array:
        array = head.load()
        array[300, 5] *= 1.001
        return array

    tensors = {**folded.tensors, "lm_head.weight": replace(head, load=load)}
    other = Checkpoint(raw=folded.raw, tensors=tensors)
    assert "lm_head.weight" in unfold(other, SCALES).tensors
    assert "lm_head.weight" not in unfold(other, SCALES, tie=True).tensors


@settings(max_examples=20, deadline=None)
@given(
    emb=st.floats(0.01, 100),
    depth=st.floats(0.01, 10),
    base=st.integers(1, 4096),
    tied=st.booleans(),
)
def test_any_llama_is_a_minicpm_of_any_constants(
    emb: float, depth: float, base: int, tied: bool
) -> None:
    plain = fold(read_checkpoint(GOLDEN / "minicpm_2b_like"))
    if tied:
        raw = plain.raw | {"tie_word_embeddings": True}
        names = [name for name in plain.tensors if name != "lm_head.weight"]
        plain = Checkpoint(raw=raw, tensors={name: plain.tensors[name] for name in names})
    found = unfold(plain, Scales(scale_emb=emb, scale_depth=depth, dim_model_base=base))
    expected = logits(plain)
    limit = 1e-4 * max(1, abs(expected).max())
    np.testing.assert_allclose(logits(found), expected, atol=limit)


def test_a_packed_checkpoint_keeps_its_codes(tmp_path: Path) -> None:
    packed = cast(rounded(Quantization(bits=4, group_size=32), tmp_path), mx.float32)
    for folded in (fold_tied(packed), fold(packed)):
        for name, tensor in packed.tensors.items():
            if tensor.dtype == mx.uint32:
                assert mx.array_equal(folded.tensors[name].load(), tensor.load())
        np.testing.assert_allclose(logits(folded), logits(packed), atol=1e-4)
    assert_same(unfold(folded, SCALES), packed, rtol=3e-7)
    head, embedding = "lm_head", "model.embed_tokens"  # tied before, two of the same codes now
    arrays = {name: tensor.load() for name, tensor in folded.tensors.items()}
    assert mx.array_equal(arrays[f"{head}.weight"], arrays[f"{embedding}.weight"])
    ratio = arrays[f"{embedding}.scales"] / arrays[f"{head}.scales"]
    assert mx.allclose(ratio, mx.array(12 * 128 / 32), rtol=1e-6)


@pytest.mark.slow
def test_the_demo_goes_to_the_llama_format_and_back(demo_folder: Path) -> None:
    source = read_checkpoint(demo_folder)
    folded = fold(source)
    eight = {"group_size": 32, "bits": 8}
    assert folded.raw["quantization"]["lm_head"] == eight
    again = unfold(folded, scales_of(source))
    assert again.config == source.config
    assert_same(again, source, rtol=3e-7)


@pytest.mark.parametrize("form", [fold, fold_tied])
def test_scales_that_are_powers_of_two_are_refused_and_can_be_unpacked(
    tmp_path: Path, form: Any
) -> None:
    four = Quantization(bits=4, group_size=32, mode="mxfp4")
    source = rounded(four, tmp_path)
    with pytest.raises(WeightsError, match=r"packed as mxfp4.*--dequantize"):
        form(source)
    plain = dense(source)
    assert plain.config.quantization is None
    np.testing.assert_allclose(logits(plain), logits(source), atol=2e-2)  # bfloat16 weights
    np.testing.assert_allclose(logits(form(cast(plain, mx.float32))), logits(plain), atol=1e-4)


@pytest.mark.parametrize(
    ("case", "form", "reason"),
    [
        ("minicpm_moe_like", fold, "mixture of 8 experts"),
        ("minicpm_moe_like", fold_tied, "mixture of 8 experts"),
        ("minicpm_s_like", fold, "activation fatrelu"),
        ("minicpm_s_like", fold_tied, "activation fatrelu"),
        ("minicpm4_longctx_like", fold, "long factors for short texts"),
        ("minicpm4_like", fold_tied, "short factors for short texts"),
        ("minicpm3_like", fold, "latent attention"),
        ("minicpm3_like", fold_tied, "values are 24 wide"),
    ],
)
def test_what_a_llama_cannot_express_is_refused(case: str, form: Any, reason: str) -> None:
    with pytest.raises(InvalidArgumentError, match=reason):
        form(read_checkpoint(GOLDEN / case))


@pytest.mark.parametrize("name", ["scale_emb", "scale_depth", "dim_model_base"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "12"])
def test_constants_must_be_above_zero(name: str, value: Any) -> None:
    good: dict[str, Any] = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}
    with pytest.raises(InvalidArgumentError, match=name):
        Scales(**{**good, name: value})


def test_products_are_rounded_once_and_in_float32() -> None:
    source = cast(read_checkpoint(GOLDEN / "minicpm_2b_like"), mx.float16)
    there_and_back = cast(unfold(cast(fold(source), mx.bfloat16), SCALES, tie=True), mx.float16)
    assert_same(there_and_back, source, rtol=1e-3)  # bfloat16 in between would cost 4e-3


def test_what_float16_cannot_hold_is_refused() -> None:
    source = read_checkpoint(GOLDEN / "minicpm_2b_like")
    for factor in (1e6, 1e-6):
        scales = Scales(scale_emb=1 / factor, scale_depth=1.4, dim_model_base=32)
        far = cast(unfold(fold(source), scales), mx.float16)
        with pytest.raises(WeightsError, match=r"embed_tokens.weight: .* float16.*bfloat16"):
            far.tensors["model.embed_tokens.weight"].load()


def test_biases_of_projections_are_multiplied_as_well(tmp_path: Path) -> None:
    source = read_checkpoint(GOLDEN / "minicpm_2b_like")
    name = "model.layers.{}.self_attn.{}_proj.bias"
    biases = {
        name.format(layer, part): mx.random.normal((128,), key=mx.random.key(layer)) * 0.1
        for layer in range(3)
        for part in "qkvo"
    }
    shutil.copyfile(GOLDEN / "minicpm_2b_like" / "model.safetensors", tmp_path / "a.safetensors")
    arrays = dict(mx.load(str(tmp_path / "a.safetensors")))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), arrays | biases)
    (tmp_path / "config.json").write_text(json.dumps(source.raw | {"attention_bias": True}))
    biased = read_checkpoint(tmp_path)
    for form in (fold, fold_tied):
        np.testing.assert_allclose(logits(form(biased)), logits(biased), atol=1e-4)
    assert_same(unfold(fold(biased), SCALES), biased, rtol=3e-7)
