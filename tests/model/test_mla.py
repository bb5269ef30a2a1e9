"""Latent attention: the inference form and what it caches, against the reference form."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from minicpm_mlx import load_model
from minicpm_mlx.engine import KVCache, Session, generate
from minicpm_mlx.errors import ConfigError
from minicpm_mlx.memory import cache_bytes, parameter_count
from minicpm_mlx.model.adapters import apply_adapter
from minicpm_mlx.model.config import Config
from minicpm_mlx.model.config_sections import Quantization
from minicpm_mlx.model.fused import fuse
from minicpm_mlx.model.mla import FusedLatentAttention, hide
from minicpm_mlx.model.packing import quantize
from minicpm_mlx.model.transformer import Model
from minicpm_mlx.weights.load import parameters
from support.adapters import CAN_DORA, random_adapter
from support.data import GOLDEN, need_shared

FOLDER = GOLDEN / "minicpm3_like"
IDS = mx.array([[5, 6, 7, 8, 9, 10, 11, 300, 301, 302] * 7])  # more than `few`


def loaded(*, bits: int | None = None) -> Model:
    model: Any = load_model(FOLDER, dtype="float32")
    if bits:
        quantize(model, Quantization(bits=bits, group_size=32))
    return model


def difference(a: mx.array, b: mx.array) -> float:
    return float(mx.abs(a - b).max().item())


@pytest.fixture(params=[False, True], ids=["latents", "expanded"])
def expanded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Attend to latents for any number of queries, or always compute keys and values."""
    return bool(request.param)


def attending(model: Any, expanded: bool) -> Any:
    for block in model.layers:
        assert isinstance(block.self_attn, FusedLatentAttention)
        block.self_attn.few = 0 if expanded else 10**6
    return model


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_both_ways_of_attending_equal_the_reference(bits: int | None, expanded: bool) -> None:
    expected = loaded(bits=bits)(IDS)
    fused = attending(fuse(loaded(bits=bits)), expanded)
    assert difference(fused(IDS), expected) < 2e-4


def test_float_packings_are_multiplied_by_their_rows(expanded: bool) -> None:
    packing = Quantization(bits=4, group_size=32, mode="mxfp4")
    model, other = loaded(), loaded()
    quantize(model, packing)
    quantize(other, packing)
    fused = attending(fuse(other), expanded)
    assert difference(fused(IDS), model(IDS)) < 2e-4


@CAN_DORA
@pytest.mark.parametrize("bits", [None, 4])
def test_an_adapter_changes_every_projection(bits: int | None, dora: bool, expanded: bool) -> None:
    model = loaded(bits=bits)
    targets = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    adapter = random_adapter(model, dora=dora, targets=targets)
    assert len(adapter.deltas) == 5 * len(model.layers)
    plain = model(IDS)
    apply_adapter(model, adapter)
    fused = attending(fuse(loaded(bits=bits)), expanded)
    apply_adapter(fused, adapter)
    assert difference(model(IDS), plain) > 0.1
    assert difference(fused(IDS), model(IDS)) < 5e-4
    apply_adapter(fused, None)
    assert difference(fused(IDS), plain) < 2e-4


def test_what_is_cached_of_a_token_is_its_latent_and_its_rotated_key() -> None:
    fused: Any = fuse(loaded())
    cache = [KVCache() for _ in fused.layers]
    fused(IDS, cache=cache)
    widths = [(layer.keys[0].shape, layer.values[0].shape) for layer in cache]
    room = cache[0].keys[0].shape[2]
    assert widths == [((1, 1, room, 16), (1, 1, room, 32))] * 4
    assert sum(layer.nbytes for layer in cache) / room == cache_bytes(fused.config, mx.float32)


def test_the_published_4b_caches_35_kib_a_token() -> None:
    config = Config.load(need_shared("tokenizers", "minicpm3-4b"))
    assert cache_bytes(config, mx.bfloat16) == (256 + 32) * 62 * 2
    assert cache_bytes(config, mx.bfloat16) / 1024 <= 36


@pytest.mark.parametrize("bits", [8, 4])
def test_a_cache_in_few_bits_holds_latents(bits: int) -> None:
    raw = json.loads((FOLDER / "config.json").read_text())
    raw |= {"qk_rope_head_dim": 32, "rope_scaling": None}
    config = Config.from_dict(raw)
    mx.random.seed(2)
    model = Model(config)
    fused: Any = fuse(model)
    exact, packed = Session(config), Session(config, bits)
    ids = IDS[0].tolist()
    for session in (exact, packed):
        list(generate(fused, ids, max_tokens=4, session=session))
    step = mx.array([[3]])
    found, wanted = (fused(step, cache=session.cache) for session in (packed, exact))
    assert 0 < difference(found, wanted) < (0.2 if bits == 8 else 4.0)
    assert packed.cache[0].values[0].shape[-1] == 32 * bits // 32


def test_every_row_of_a_padded_batch_is_computed_as_if_alone(expanded: bool) -> None:
    from mlx_lm.models.cache import BatchKVCache

    fused = attending(fuse(loaded()), expanded)
    rows = [IDS[:, :20], IDS[:, 3:10]]
    padded = mx.concatenate([mx.zeros((1, 13), IDS.dtype), rows[1]], axis=1)
    cache = [BatchKVCache([0, 13]) for _ in fused.layers]
    for step in (mx.concatenate([rows[0], padded]), mx.array([[4], [9]])):
        last = fused(step, cache=cache)[:, -1]
    ends = ([4], [9])
    alone = [
        fused(mx.concatenate([row, mx.array([end])], axis=1))[:, -1]
        for row, end in zip(rows, ends, strict=True)
    ]
    assert difference(last, mx.concatenate(alone)) < 1e-3


def test_the_number_of_weights_is_known_from_the_config() -> None:
    model = loaded()
    assert parameter_count(model.config) == sum(a.size for a in parameters(model).values())
    biased = Model(replace(model.config, attention_bias=True))
    assert parameter_count(biased.config) == sum(a.size for a in parameters(biased).values())


SIZES = (
    *("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "vocab_size"),
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "dim_model_base"),
)
CONSTANTS = ("scale_emb", "scale_depth", "rms_norm_eps")
OPTIONAL = ("num_key_value_heads", "max_position_embeddings", "v_head_dim")


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(raw)
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize("source", ["tiny", "4b"])
def test_each_key_that_is_missing_or_wrong_is_named(source: str) -> None:
    folder = FOLDER if source == "tiny" else need_shared("tokenizers", "minicpm3-4b")
    good = json.loads((folder / "config.json").read_text())
    Config.from_dict(good)
    for key in (*SIZES, *CONSTANTS):
        assert f"{key} is missing" in refusal({k: v for k, v in good.items() if k != key})
        assert f"{key} is missing" in refusal(good | {key: None})
    for key in (*SIZES, *OPTIONAL, *CONSTANTS):
        odd: list[Any] = ["64", True, False, [64], {}, 0, -1, math.nan]
        for value in odd if key in CONSTANTS else [*odd, 64.5]:
            assert f"{key} must be " in refusal(good | {key: value})
    for key in good.keys() - {*SIZES, *OPTIONAL, *CONSTANTS}:
        for value in (None, "x", True, [1], {}, 0, 1.5):
            with suppress(ConfigError):
                Config.from_dict(good | {key: value})


WRONG = [
    ({"qk_rope_head_dim": 15}, "qk_rope_head_dim must be even"),
    ({"qk_rope_head_dim": 14}, r"short_factor must hold qk_rope_head_dim / 2 = 7 numbers"),
    ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
    ({"v_head_dim": None, "hidden_size": 129}, "v_head_dim is not given"),
]


@pytest.mark.parametrize(("changes", "named"), WRONG)
def test_widths_that_do_not_fit_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    raw = json.loads((FOLDER / "config.json").read_text()) | changes
    with pytest.raises(ConfigError, match=named):
        Config.from_dict(raw)


def test_a_value_width_that_does_not_fit_the_weights_is_refused(tmp_path: Path) -> None:
    from minicpm_mlx.errors import WeightsError

    raw = json.loads((FOLDER / "config.json").read_text()) | {"v_head_dim": 32}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").symlink_to(FOLDER / "model.safetensors")
    with pytest.raises(WeightsError, match=r"kv_b_proj|o_proj"):
        load_model(tmp_path)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_scores_of_a_row_that_sees_nothing_stay_finite(dtype: mx.Dtype) -> None:
    hidden = hide(mx.zeros((1, 1, 1, 3), dtype), mx.array([False]))
    weights = mx.softmax(hidden, axis=-1)
    assert mx.isfinite(weights).all().item()
    seen = hide(mx.zeros((1, 1, 1, 3), dtype), mx.array([True, False, False]))
    assert mx.softmax(seen, axis=-1).flatten().tolist() == [1, 0, 0]
