"""Layouts of the inference form compute what the plain one does."""

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from minicpm_mlx import device
from minicpm_mlx.bench.kernel_count import count
from minicpm_mlx.engine import KVCache
from minicpm_mlx.model.adapters import apply_adapter
from minicpm_mlx.model.config_sections import Quantization
from minicpm_mlx.model.fused import FusedModel, fuse
from minicpm_mlx.model.kernels import qmv_rule
from minicpm_mlx.model.layout import Layout, apply_layout, can_regroup, can_widen
from minicpm_mlx.model.packing import quantize
from support.adapters import CAN_DORA, random_adapter
from support.random_models import IDS, MLA, MOE, random_model

FORMS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied, head rows not in eights": {"tie_word_embeddings": False, "vocab_size": 517},
    "grouped, biased": {"num_key_value_heads": 2, "attention_bias": True},
    "large eps": {"rms_norm_eps": 10.0},
    "fatrelu": {"hidden_act": "fatrelu", "hidden_act_param": 0.1},
}


def packed(bits: int = 4, group_size: int = 32, **changes: Any) -> FusedModel:
    model = random_model(**changes)
    quantize(model, Quantization(bits=bits, group_size=group_size))
    return fuse(model)


def gap(a: nn.Module, b: nn.Module) -> float:
    x, y = a(IDS), b(IDS)
    assert x.shape == y.shape
    return float((mx.abs(x - y).max() / mx.abs(x).max()).item())


@pytest.mark.parametrize("form", FORMS)
def test_zero_columns_and_smaller_groups_leave_the_logits(form: str) -> None:
    plain, wide = packed(**FORMS[form]), packed(**FORMS[form])
    assert can_widen(wide, "all")
    apply_layout(wide, Layout(wide="all"))
    shapes = {
        name: layer.weight.shape[1] * 8 for name, layer in wide.layers[0].mlp.children().items()
    }
    assert shapes == {"gate_up_proj": 512, "down_proj": 512}
    assert wide.hidden(IDS).shape[-1] == 512
    assert gap(plain, wide) < 1e-5
    inner = packed(**FORMS[form])
    apply_layout(inner, Layout(wide="inner"))
    assert inner.hidden(IDS).shape[-1] == 64
    assert inner.layers[1].mlp.down_proj.weight.shape[1] * 8 == 512
    assert gap(plain, inner) < 1e-5
    regrouped = packed(group_size=64, **{**FORMS[form], "intermediate_size": 128})
    again = packed(group_size=64, **{**FORMS[form], "intermediate_size": 128})
    assert can_regroup(again, 32)
    assert not can_regroup(again, 64)
    apply_layout(again, Layout(group_size=32))
    assert gap(regrouped, again) < 1e-5


@CAN_DORA
def test_an_adapter_fits_a_wide_model(dora: bool) -> None:
    plain, wide = packed(tie_word_embeddings=False), packed(tie_word_embeddings=False)
    apply_layout(wide, Layout(wide="all"))
    adapter = random_adapter(random_model(tie_word_embeddings=False), dora=dora)
    before = wide(IDS)
    for model in (plain, wide):
        apply_adapter(model, adapter)
    assert gap(plain, wide) < 1e-4
    apply_adapter(wide, None)
    assert mx.array_equal(wide(IDS), before)


@pytest.mark.parametrize("changes", [MLA, MOE], ids=["latent attention", "experts"])
def test_other_kinds_stay_as_they_are(changes: dict[str, Any]) -> None:
    plain, same = packed(**changes), packed(**changes)
    apply_layout(same, Layout(wide="all"))
    assert not can_widen(same, "all")
    assert gap(plain, same) == 0


def test_down_proj_of_latent_attention_widens() -> None:
    plain, wide = packed(**MLA), packed(**MLA)
    apply_layout(wide, Layout(wide="inner"))
    assert wide.layers[0].mlp.down_proj.weight.shape[1] * 8 == 512
    assert gap(plain, wide) < 1e-5


def test_widths_that_fit_stay() -> None:
    assert not can_widen(packed(hidden_size=512, intermediate_size=1024), "all")
    assert not can_widen(fuse(random_model()), "all")  # nothing is packed


def test_zero_columns_add_no_kernel() -> None:
    def kernels(model: FusedModel) -> int:
        return count(lambda: [model(IDS[:1, :1], [KVCache() for _ in model.layers])]).total()

    wide = packed()
    apply_layout(wide, Layout(wide="all"))
    assert kernels(wide) == kernels(packed())


@pytest.mark.parametrize(("width", "rows"), [(512, 520), (64 * 3, 517)])
def test_a_head_gets_rows_where_they_make_its_kernel_fast(
    monkeypatch: pytest.MonkeyPatch, width: int, rows: int
) -> None:
    monkeypatch.setattr(device, "on_metal", lambda: True)
    shape = {"vocab_size": 517, "hidden_size": width, "num_hidden_layers": 1}
    plain, fitted = packed(**shape), packed(**shape)
    apply_layout(fitted, Layout())
    assert fitted.embed_tokens.weight.shape[0] == rows
    assert fitted(IDS).shape[-1] == 517
    assert gap(plain, fitted) < 1e-6


@pytest.mark.parametrize(
    ("outputs", "inputs", "bits", "mlx", "kernel"),
    [
        (2304, 2304, 4, "0.32.4", qmv_rule.GENERIC),  # MiniCPM-2B
        (6144, 2048, 4, "0.32.4", qmv_rule.FAST),  # MiniCPM5-2B
        (1536, 3840, 8, "0.32.4", qmv_rule.FAST),  # steps of 256
        (1536, 3840, 8, "0.32.0", qmv_rule.GENERIC),
        (122753, 2560, 4, "0.32.4", qmv_rule.GUARDED),
        (122753, 2560, 4, "0.32.3", qmv_rule.GENERIC),
        (122760, 2560, 4, "0.32.3", qmv_rule.FAST),
        (4096, 128, 4, "0.32.4", qmv_rule.QUAD),
        (4096, 128, 6, "0.32.4", qmv_rule.GENERIC),
    ],
)
def test_the_kernel_of_a_product(
    outputs: int, inputs: int, bits: int, mlx: str, kernel: str
) -> None:
    assert qmv_rule.choose(outputs, inputs, bits, mlx) == kernel


def test_stacked_experts_have_no_guarded_rows() -> None:
    assert qmv_rule.choose(517, 512, 4, "0.32.4", stacked=True) == qmv_rule.GENERIC


@pytest.mark.parametrize(
    ("mlx", "warns"),
    [("0.32.4", False), ("0.31.0", False), ("0.32.5", True), ("0.33.0.dev1", True), ("", True)],
)
def test_an_mlx_whose_rule_was_not_read_is_said(mlx: str, warns: bool) -> None:
    assert (qmv_rule.warning(mlx) is not None) is warns


def test_the_installed_kernel_has_the_step_of_the_rule() -> None:
    """The header that MLX compiles its kernels from says how much one takes at a time."""
    header = Path(mx.__file__).parent / "include/mlx/backend/metal/kernels/quantized.h"
    if not header.is_file():
        pytest.skip("this MLX comes without the sources of its kernels")
    body = header.read_text().partition("void qmv_fast_impl(")[2].partition("\n}\n")[0]
    assert re.search(r"packs_per_thread =\s+bits (<=|==) 2 \? 1 : 2;", body)
    assert "values_per_thread = pack_factor * packs_per_thread;" in body
    assert "block_size = values_per_thread * SIMD_SIZE;" in body
    guarded = qmv_rule.choose(517, 512, 4, device.mlx_version()) == qmv_rule.GUARDED
    assert ("partial_rows" in body) is guarded
