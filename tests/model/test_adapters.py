"""Adapters: on the twin, the fused form and packed weights they do what merged weights would."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

import minicpm_mlx as mm
from minicpm_mlx.errors import ConfigError, WeightsError
from minicpm_mlx.model.adapters import (
    AdaptedLinear,
    Adapter,
    apply_adapter,
    dense,
    find_projections,
)
from minicpm_mlx.model.config_sections import Quantization
from minicpm_mlx.model.fused import fuse
from minicpm_mlx.model.modules import replace_module
from minicpm_mlx.model.packing import quantize
from minicpm_mlx.model.transformer import Model
from minicpm_mlx.weights import adapters
from minicpm_mlx.weights.adapters import read_adapter
from support.adapters import LORA, close, random_adapter
from support.random_models import IDS, MLA, MOE, random_model

ALPHA = ("alpha_pattern", "lora_alpha")


def merged(model: Model, adapter: Adapter) -> Model:
    """The adapter in the weights, which are dense."""
    for name, module in list(model.named_modules()):
        if name in adapter.deltas:
            delta = adapter.deltas[name]
            weight = dense(module) + (delta.a @ delta.b).T
            if delta.magnitude is not None:
                lengths = mx.linalg.norm(weight, axis=1)
                weight = weight * (delta.magnitude / lengths)[:, None]
            plain = nn.Linear(1, 1, bias=False)
            plain.weight = weight
            if "bias" in module:
                plain.bias = module.bias
            replace_module(model, name, plain)
    return model


def packed(model: Model) -> Model:
    quantize(model, Quantization(bits=4, group_size=32))
    return model


def untouched(model: Model) -> Model:
    return model


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("form", [untouched, packed], ids=["dense", "4-bit"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": True},
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 2},
        MOE,
        MLA,
    ],
    ids=["tied", "bias", "head", "grouped", "experts", "latent"],
)
def test_an_adapter_does_what_merged_weights_do(
    changes: dict[str, Any], form: Callable[[Model], Model], dora: bool
) -> None:
    def base() -> Model:
        return form(random_model(**changes))

    adapter = random_adapter(base(), dora=dora)
    expected = merged(base(), adapter)(IDS)
    plain = base()(IDS)
    assert not close(expected, plain)
    for model in (base(), fuse(base())):
        before = model(IDS)
        if model.config.num_experts and not isinstance(model, Model):
            names = {n for n in adapter.deltas if "experts" not in n and "mlp" not in n}
            assert names == adapter.deltas.keys()
        apply_adapter(model, adapter)
        assert close(model(IDS), expected)
        apply_adapter(model, random_adapter(base(), seed=6))  # in its place, not on top of it
        apply_adapter(model, adapter)
        assert close(model(IDS), expected)
        apply_adapter(model, None)
        assert mx.array_equal(model(IDS), before)
        assert not any(type(module) is AdaptedLinear for _, module in model.named_modules())


@pytest.mark.parametrize("kind", ["LoRALinear", "DoRALinear"])
def test_mlx_lm_s_own_layers_agree(kind: str, tmp_path: Path) -> None:
    """The files that mlx-lm's trainer would write, against the layers it writes them from."""
    from mlx_lm.tuner import dora, lora

    layer = {"LoRALinear": lora.LoRALinear, "DoRALinear": dora.DoRALinear}[kind]
    theirs, tensors = random_model(), {}
    for name, module in list(theirs.named_modules()):
        if name.endswith(("q_proj", "o_proj", "up_proj")):
            adapted = layer.from_base(module, r=4, scale=3.0, dropout=0.0)
            adapted.lora_b = mx.random.normal(adapted.lora_b.shape) * 0.01
            replace_module(theirs, name, adapted)
            parts = [p for p in ("lora_a", "lora_b", "m") if p in adapted]
            tensors |= {f"{name}.{part}": adapted[part] for part in parts}
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), tensors)
    config = {"fine_tune_type": "dora" if "m" in parts else "lora", "num_layers": 2}
    config["lora_parameters"] = {"rank": 4, "scale": 3.0, "dropout": 0.0}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    expected = theirs(IDS)
    assert not close(expected, random_model()(IDS))
    for mine in (random_model(), fuse(random_model())):
        apply_adapter(mine, read_adapter(tmp_path))
        assert close(mine(IDS), expected)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_peft_s_layout_is_read(tmp_path: Path, rslora: bool, dora: bool) -> None:
    adapter = random_adapter(random_model(), dora=dora)
    half = 0.5 if not rslora else 0.5 * 3**0.5  # lora_alpha 1.5 over rank 3, or over its root
    tensors = {}
    for name, delta in adapter.deltas.items():
        stem = f"base_model.model.{name}"
        scale = 2 * half if name.endswith("v_proj") else half
        tensors[f"{stem}.lora_A.weight"] = mx.contiguous(delta.a.T)
        tensors[f"{stem}.lora_B.weight"] = mx.contiguous(delta.b.T) / scale
        if delta.magnitude is not None:
            tensors[f"{stem}.lora_magnitude_vector"] = delta.magnitude
    mx.save_safetensors(str(tmp_path / "adapter_model.safetensors"), tensors)
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 1.5, "alpha_pattern": {"v_proj": 3.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": rslora}))
    expected = merged(random_model(), adapter)(IDS)
    model = fuse(random_model())
    apply_adapter(model, read_adapter(tmp_path))
    assert close(model(IDS), expected)


def written(folder: Path, tensors: dict[str, mx.array] | None = None, **config: Any) -> Path:
    """An adapter's folder, mlx-lm's layout, one projection of the tiny model."""
    name = "model.layers.0.self_attn.q_proj"
    good = {f"{name}.lora_a": mx.ones((64, 3)), f"{name}.lora_b": mx.ones((3, 64))}
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors or good)
    (folder / "adapter_config.json").write_text(json.dumps(LORA | config))
    return folder


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (None, {"fine_tune_type": "full"}, "expected a LoRA or DoRA adapter, got full"),
        (None, {"lora_parameters": {"scale": "big"}}, "scale must be a number, got 'big'"),
        (None, {"lora_parameters": {"scale": float("nan")}}, "must be a number, got nan"),
        (None, {"lora_parameters": {"scale": 10**400}}, "scale must be a number, got 1000"),
        (None, {"lora_parameters": {"scale": True}}, "must be a number, got True"),
        (None, {"lora_parameters": 3}, "must be a number, got None"),
        (None, {"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({f"{Q}.lora_a": mx.ones((64, 3))}, {}, "lacks its lora_b"),
        ({f"{Q}.weight": mx.ones((64, 3))}, {}, "no part of a LoRA"),
        ({f"{Q}.lora_a": mx.ones(3), f"{Q}.lora_b": mx.ones((3, 64))}, {}, "two matrices"),
        (
            {f"{Q}.lora_a": mx.ones((64, 3)), f"{Q}.lora_b": mx.ones((3, 64), mx.int32)},
            {},
            "matrices of floats",
        ),
        ({f"{Q}.lora_a": mx.ones((64, 3)), f"{Q}.lora_b": mx.ones((4, 64))}, {}, "rank 3 and"),
        ({f"{Q}.lora_a": mx.ones((9, 3)), f"{Q}.lora_b": mx.ones((3, 64))}, {}, "another model's"),
        ({"x.lora_a": mx.ones((64, 3)), "x.lora_b": mx.ones((3, 64))}, {}, "changes x, which"),
    ],
)
def test_what_is_no_adapter_for_this_model_is_refused(
    tmp_path: Path, tensors: dict[str, mx.array] | None, config: dict[str, Any], message: str
) -> None:
    model = fuse(random_model())
    before = model(IDS)
    folder = written(tmp_path, tensors, **config)
    with pytest.raises((ConfigError, WeightsError), match=message):
        apply_adapter(model, read_adapter(folder))
    assert mx.array_equal(model(IDS), before)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_alpha": 10**400}, "lora_alpha must be a number, got 1000"),
        ({"lora_alpha": 1, "init_lora_weights": "pissa_niter_4"}, "changes the base model"),
        ({"lora_alpha": 1, "alpha_pattern": {"q_proj": 10**400}}, "must be a number, got 1000"),
        ({"lora_alpha": float("-inf")}, "must be a number, got -inf"),
        ({}, "must be a number, got None"),
        ({"lora_alpha": 1, "init_lora_weights": "lora_ga"}, "lora_ga, which changes the base"),
        ({"lora_alpha": 1, "init_lora_weights": "new"}, "changes the base model as well, or may"),
        ({"lora_alpha": 1, "alora_invocation_tokens": [5]}, "alora_invocation_tokens is .5., wh"),
        ({"lora_alpha": 1, "layer_replication": [[0, 2], [1, 3]]}, "layer_replication is .*not su"),
        ({"lora_alpha": 1, "use_qalora": True}, "use_qalora is True, which is not supported"),
        ({"lora_alpha": 1, "modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"lora_alpha": 1, "bias": "all"}, "bias is 'all', which is not supported"),
        ({"lora_alpha": 1, "r": 8}, "r is 8 for .*q_proj, whose matrices have rank 3"),
        ({"lora_alpha": 1, "r": 3, "rank_pattern": {"q_proj": 4}}, "r is 4 for .*have rank 3"),
        ({"lora_alpha": 1, "use_dora": True}, "says DoRA, and .*q_proj has no magnitudes"),
        ({"lora_alpha": 1, "use_rslora": "false"}, "use_rslora must be true or false, got 'false'"),
    ],
)
def test_peft_s_settings_are_checked(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    parts = {f"{Q}.lora_A.weight": mx.ones((3, 64)), f"{Q}.lora_B.weight": mx.ones((64, 3))}
    mx.save_safetensors(str(tmp_path / "adapter_model.safetensors"), parts)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    with pytest.raises(ConfigError, match=message):
        read_adapter(tmp_path)


@pytest.mark.parametrize("config", [{"lora_alpha": 1, "use_dora": False}, LORA])
def test_magnitudes_of_what_is_said_to_be_no_dora_are_refused(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    """PEFT and mlx-lm would leave them out, so the model would be another than theirs."""
    a, b, file = (
        ("A.weight", "B.weight", "adapter_model") if "lora_alpha" in config else (*"ab", "adapters")
    )
    parts = {f"{Q}.lora_{a}": mx.ones((3, 64)), f"{Q}.lora_{b}": mx.ones((64, 3))}
    parts[f"{Q}.lora_magnitude_vector"] = mx.ones(64)
    mx.save_safetensors(str(tmp_path / f"{file}.safetensors"), parts)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"says no DoRA, and .*q_proj has magnitudes"):
        read_adapter(tmp_path)


def test_peft_s_settings_that_change_nothing_are_taken(tmp_path: Path) -> None:
    parts = {f"{Q}.lora_A.weight": mx.ones((3, 64)), f"{Q}.lora_B.weight": mx.ones((64, 3))}
    mx.save_safetensors(str(tmp_path / "adapter_model.safetensors"), parts)
    config = {"lora_alpha": 6, "r": 8, "rank_pattern": {"q_proj": 3}, "bias": "none"}
    config |= {"init_lora_weights": "eva", "use_dora": False, "layer_replication": None}
    config |= {"modules_to_save": [], "alora_invocation_tokens": None, "qalora_group_size": 16}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert mx.array_equal(read_adapter(tmp_path).deltas[Q].b, 2 * mx.ones((3, 64)))


def test_peft_s_names_may_hold_the_adapter_s_own(tmp_path: Path) -> None:
    parts = {"lora_A": mx.ones((3, 64)), "lora_B": mx.ones((64, 3))}
    parts["lora_magnitude_vector"] = mx.ones(64)
    for ending in (".weight", ".default.weight"):
        named = {f"base_model.model.{Q}.{part}{ending}": array for part, array in parts.items()}
        mx.save_safetensors(str(tmp_path / "adapter_model.safetensors"), named)
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6}))
        (delta,) = read_adapter(tmp_path).deltas.items()
        assert delta[0] == Q
        assert mx.array_equal(delta[1].b, 2 * mx.ones((3, 64)))
        assert delta[1].magnitude is not None


def test_folders_that_hold_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no adapter; expected adapters\.safetensors"):
        read_adapter(tmp_path)
    written(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(ConfigError, match="expected an adapter's config"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ConfigError, match="expected a JSON object"):
        read_adapter(tmp_path)
    (tmp_path / "adapters.safetensors").write_bytes(b"\0" * 64)
    (tmp_path / "adapter_config.json").write_text(json.dumps(LORA))
    with pytest.raises(WeightsError, match="sound safetensors"):
        read_adapter(tmp_path)


def test_a_conversation_goes_on_with_another_adapter_as_if_anew(
    tiny: mm.LM, tiny_adapter: Path
) -> None:
    greedy = mm.Sampling()
    question, more = "Name an animal.", "And another one?"

    def answers(chat: mm.Chat) -> list[str]:
        return ["".join(p.text for p in chat.reply(q)) for q in (question, more)]

    try:
        plain = answers(mm.Chat(tiny, sampling=greedy, max_tokens=8))
        chat = mm.Chat(tiny, sampling=greedy, max_tokens=8)
        list(chat.reply(question))
        tiny.use_adapter(tiny_adapter)
        *_, last = chat.reply(more)
        assert last.stats
        assert last.stats.cached_tokens == 0
        fresh = mm.Chat(tiny, sampling=greedy, max_tokens=8, messages=chat.messages[:2])
        list(fresh.reply(more))
        assert fresh.messages == chat.messages
        adapted = answers(mm.Chat(tiny, sampling=greedy, max_tokens=8))
        assert adapted != plain
        tiny.use_adapter(None)
        assert answers(mm.Chat(tiny, sampling=greedy, max_tokens=8)) == plain
    finally:
        tiny.use_adapter(None)


def test_a_session_brings_its_adapter_along(
    demo: mm.LM, demo_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minicpm_mlx.lm import session_cache, sessions
    from minicpm_mlx.lm.fingerprint import fingerprint

    monkeypatch.setenv("MINICPM_MLX_HOME", str(tmp_path))
    try:
        chat = mm.Chat(demo, max_tokens=4)
        bare = fingerprint(demo)
        demo.use_adapter(demo_adapter)
        list(chat.reply("Hello"))
        sessions.save(chat, "a")
        session_cache.save_cache(chat, "a")
        saved = sessions.load("a")
        assert saved.adapter == str(demo_adapter)
        assert saved.identity == fingerprint(demo) != bare
        assert session_cache.restore_cache(sessions.restore(saved, demo), "a") is None
        demo.use_adapter(None)
        reason = session_cache.restore_cache(sessions.restore(saved, demo), "a")
        assert reason is not None
        assert "adapter" in reason
    finally:
        demo.use_adapter(None)


def test_names_are_the_checkpoint_s() -> None:
    model = random_model(tie_word_embeddings=False)
    arrays: Any = tree_flatten(model.parameters())
    matrices = {n.removesuffix(".weight") for n, a in arrays if a.ndim == 2 and "embed" not in n}
    assert find_projections(model).keys() == matrices == find_projections(fuse(model)).keys()


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("v_proj", True),
        (r"layers\.[0-9]+\.self_attn\.v_proj", True),
        ("^model.layers.0.self_attn.v_proj", True),
        ("self_attn", False),
        ("proj", False),
        ("q_proj|k_proj", False),
    ],
)
def test_a_pattern_of_alpha_is_matched_as_peft_does(pattern: str, matches: bool) -> None:
    config = {"lora_alpha": 16, "alpha_pattern": {pattern: 36, ".*": 16}}
    module = "model.layers.0.self_attn.v_proj"
    assert adapters._by_module(config, Path("c"), module, *ALPHA) == (36 if matches else 16)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_alpha": 1, "alpha_pattern": {"(": 2}}, "is no regular expression"),
        ({"lora_alpha": 1, "alpha_pattern": 3}, "must be an object"),
    ],
)
def test_patterns_that_are_none_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapters._by_module(config, Path("c"), "model.layers.0.self_attn.v_proj", *ALPHA)
