"""Config: the reference's defaults for what is absent, a one-line refusal of what is wrong."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minicpm_mlx.errors import ConfigError
from minicpm_mlx.model.config import Config
from minicpm_mlx.model.config_sections import Quantization
from support.data import GOLDEN, need_shared

TINY: dict[str, Any] = {
    "architectures": ["MiniCPMForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 100,
}
LLAMA = {**TINY, "architectures": ["LlamaForCausalLM"]}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 64,
}


def tiny(**changes: Any) -> Config:
    return Config.from_dict({**TINY, **changes})


def refusal(raw: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(raw)
    message = str(caught.value)
    assert message.startswith("config.json: ")
    assert message.isprintable()
    return message


def written(folder: Path, content: bytes) -> str:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        Config.load(folder)
    assert str(caught.value).startswith(f"{folder / 'config.json'}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_published_2b_config_gets_what_it_does_not_state() -> None:
    config = Config.load(need_shared("tokenizers", "minicpm-2b"))
    assert config.rope_theta == 10000.0
    assert config.tie_word_embeddings
    assert config.head_dim == 64
    assert config.logit_divisor == 9.0
    assert config.residual_scale == pytest.approx(1.4 / math.sqrt(40))
    assert config.scale_emb == 12
    assert (config.rope_scaling, config.rotation_threshold) == (None, None)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))


def test_a_2b_style_config_without_model_type_is_read() -> None:
    config = Config.load(GOLDEN / "minicpm_2b_like_bin")
    assert (config.rope_theta, config.tie_word_embeddings) == (10000.0, True)


def test_absent_keys_take_the_defaults_of_the_reference() -> None:
    config = tiny()
    assert config.num_key_value_heads == 4
    assert config.head_dim == 16
    assert config.max_position_embeddings == 2048
    assert config.rms_norm_eps == 1e-6
    assert config.hidden_act == "silu"
    assert not config.attention_bias
    assert config.num_experts == 0
    assert config.scale_emb == 1
    assert config.residual_scale == pytest.approx(1 / math.sqrt(2))  # the reference's scale_depth 1
    assert config.logit_divisor == 64  # and its dim_model_base 1


def test_null_means_absent() -> None:
    nulls = dict.fromkeys(("rope_theta", "head_dim", "tie_word_embeddings", "rope_scaling"))
    assert tiny(**nulls) == tiny()


def test_a_llama_has_no_mup_scales_and_a_head_of_its_own() -> None:
    config = Config.from_dict({**LLAMA, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16})
    assert (config.scale_emb, config.residual_scale, config.logit_divisor) == (1, 1, 1)
    assert not config.tie_word_embeddings
    assert Config.from_dict({**LLAMA, "tie_word_embeddings": True}).tie_word_embeddings


def test_model_type_decides_where_architectures_are_absent() -> None:
    raw = {key: value for key, value in TINY.items() if key != "architectures"}
    assert Config.from_dict({**raw, "model_type": "llama"}).logit_divisor == 1
    assert Config.from_dict({**raw, "model_type": "minicpm"}).logit_divisor == 64


def test_rope_parameters_of_transformers_5_are_read() -> None:
    assert tiny(rope_parameters={"rope_type": "default", "rope_theta": 5e6}).rope_theta == 5e6
    config = tiny(rope_parameters={**LONGROPE, "rope_theta": 2e4}, rope_theta=1.0)
    assert config.rope_theta == 2e4
    assert config.rope_scaling is not None
    assert config.rope_scaling.long_factor == (2.0,) * 8


def test_several_eos_tokens_all_count() -> None:
    assert tiny(eos_token_id=[2, 73440]).eos_token_ids == (2, 73440)


def test_dynamic_ntk_stretches_the_context() -> None:
    config = tiny(rope_scaling={"type": "dynamic", "factor": 4.0}, max_position_embeddings=64)
    assert (config.context_length, config.rotation_threshold) == (256, 64)


@pytest.mark.parametrize(("positions", "threshold"), [(32, 64), (64, 64), (65, 0)])
def test_longrope_knows_short_texts_only_in_a_short_context(positions: int, threshold: int) -> None:
    config = tiny(rope_scaling=LONGROPE, max_position_embeddings=positions)
    assert config.rotation_threshold == threshold


def test_quantization_is_read_layer_by_layer() -> None:
    default = {"group_size": 64, "bits": 4}
    layers = {"model.embed_tokens": {"bits": 8}, "model.layers.0.mlp.up_proj": False}
    config = tiny(quantization={**default, **layers}, quantization_config=default)
    assert config.quantization == Quantization(group_size=64, bits=4)
    embedding = Quantization(group_size=64, bits=8)
    assert config.layer_quantization == (("model.embed_tokens", embedding),)


def test_a_layer_that_names_no_mode_is_affine() -> None:
    layer = {"group_size": 64, "bits": 8}
    config = tiny(quantization={"group_size": 32, "bits": 4, "mode": "mxfp4", "lm_head": layer})
    assert config.quantization == Quantization(group_size=32, bits=4, mode="mxfp4")
    assert config.layer_quantization == (("lm_head", Quantization(group_size=64, bits=8)),)


INTEGERS = [
    "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "dim_model_base"
]  # fmt: skip
FLOATS = ["rms_norm_eps", "rope_theta", "scale_emb", "scale_depth"]


@pytest.mark.parametrize("key", INTEGERS)
@pytest.mark.parametrize("value", ["64", True, 64.5, math.nan, [64], {}, 0, -64, 10**400])
def test_a_size_is_a_whole_number_above_zero(key: str, value: object) -> None:
    assert key in refusal({**TINY, key: value})


@pytest.mark.parametrize("key", FLOATS)
@pytest.mark.parametrize("value", ["1", True, math.nan, math.inf, [1.0], 0, -1.0, 10**400])
def test_a_constant_is_a_finite_number_above_zero(key: str, value: object) -> None:
    assert key in refusal({**TINY, key: value})


@pytest.mark.parametrize("key", ["tie_word_embeddings", "attention_bias"])
def test_a_switch_is_true_or_false(key: str) -> None:
    assert key in refusal({**TINY, key: "false"})
    assert key in refusal({**TINY, key: 1})


@pytest.mark.parametrize("key", [key for key in TINY if key != "architectures"])
def test_a_missing_size_is_named(key: str) -> None:
    raw = {name: value for name, value in TINY.items() if name != key}
    assert f"{key} is missing" in refusal(raw)


QUANTIZED = {"group_size": 64, "bits": 4}

WRONG = [
    ({"num_attention_heads": 5}, "num_attention_heads"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"head_dim": 15}, "head_dim"),
    ({"num_attention_heads": 64}, "head_dim"),  # 1 each
    ({"num_attention_heads": 2**20, "head_dim": 2**12}, "head_dim"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"num_experts": 10**9}, "num_experts"),
    ({"vocab_size": 2**31}, "vocab_size"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"hidden_act": 1}, "hidden_act"),
    ({"hidden_act_param": math.inf}, "hidden_act_param"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"num_experts": -1}, "num_experts"),
    ({"num_experts": 1}, "num_experts_per_tok"),  # the default sends a token to 2
    ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok"),
    ({"num_experts": 4, "num_experts_per_tok": 0}, "num_experts_per_tok"),
    ({"eos_token_id": "</s>"}, "eos_token_id"),
    ({"eos_token_id": [2, None]}, "eos_token_id"),
    ({"bos_token_id": [1]}, "bos_token_id"),
    ({"architectures": ["MiniCPM9ForCausalLM"]}, "MiniCPM9ForCausalLM"),
    ({"architectures": None}, "architectures"),
    ({"architectures": None, "model_type": "minicpm9"}, "minicpm9"),
    ({"architectures": None, "model_type": ["llama"]}, "model_type"),
    ({"rope_scaling": "dynamic"}, "rope_scaling"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
    ({"rope_scaling": {"type": 7}}, "rope_scaling"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor"),
    ({"rope_scaling": {"type": "linear", "factor": math.nan}}, "rope_scaling.factor"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2}, "head_dim"),
    ({"rope_scaling": {**LONGROPE, "short_factor": [1.0] * 7}}, "short_factor"),
    ({"rope_scaling": {**LONGROPE, "long_factor": [1.0] * 9}}, "long_factor"),
    ({"rope_scaling": {**LONGROPE, "long_factor": None}}, "long_factor"),
    ({"rope_scaling": {**LONGROPE, "long_factor": "1"}}, "long_factor"),
    ({"rope_scaling": {**LONGROPE, "long_factor": [0.0] * 8}}, "factor"),
    ({"rope_scaling": {**LONGROPE, "long_factor": ["1"] * 8}}, "long_factor"),
    (
        {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 1}},
        "original_max_position_embeddings",
    ),
    ({"quantization": 4}, "quantization"),
    ({"quantization": {"bits": 4}}, "group_size"),
    ({"quantization": {**QUANTIZED, "bits": 7}}, "bits"),
    ({"quantization": {**QUANTIZED, "bits": "4"}}, "quantization.bits"),
    ({"quantization": {**QUANTIZED, "group_size": 16}}, "groups"),
    ({"quantization": {**QUANTIZED, "mode": "fp4"}}, "fp4"),
    ({"quantization": {**QUANTIZED, "mode": ["affine"]}}, "quantization.mode"),
    ({"quantization": {**QUANTIZED, "mode": "mxfp4"}}, "groups"),  # which are of 32
    ({"quantization": {**QUANTIZED, "lm_head": {"bits": 9}}}, "bits"),
    ({"quantization": {**QUANTIZED, "lm_head": {"global_scale": True}}}, "global_scale"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
]


@pytest.mark.parametrize(("changes", "named"), WRONG)
def test_a_wrong_value_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    assert named in refusal({**TINY, **changes})


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "an Eagle head"),
        ({"draft_vocab_size": 32000}, "an Eagle head"),
        ({"architectures": ["MiniCPM5DSparkModel"]}, "a DSpark head"),
        ({"architectures": ["MiniCPMSALAForCausalLM"]}, "MiniCPM-SALA"),
        ({"architectures": None, "model_type": "minicpmv4_6"}, "a vision model"),
        ({"architectures": ["MiniCPMO"], "vision_config": {}}, "a vision model"),
        ({"architectures": ["MiniCPMForSequenceClassification"]}, "a reranker"),
        ({"architectures": ["MiniCPM"]}, "an embedding model"),
        ({"is_causal": False}, "an embedding model"),
        (
            {
                "architectures": None,
                "auto_map": {"AutoModel": "m.MiniCPMForSequenceClassification"},
            },
            "a reranker",
        ),
    ],
)
def test_another_kind_of_model_is_named(changes: dict[str, Any], kind: str) -> None:
    assert f"this is {kind}" in refusal({**TINY, **changes})


def test_a_text_model_may_name_a_class_for_every_task() -> None:
    raw = json.loads((need_shared("tokenizers", "minicpm3-4b") / "config.json").read_text())
    del raw["architectures"]
    config = Config.from_dict(raw | {"model_type": "minicpm3"})
    assert (config.rope_theta, config.tie_word_embeddings) == (10000.0, True)  # it states neither


@pytest.mark.parametrize("raw", [[], "x", 3, None])
def test_a_config_is_an_object(raw: object) -> None:
    assert "expected an object" in refusal(raw)


def test_a_long_value_is_cut_short_in_the_message() -> None:
    assert len(refusal({**TINY, "hidden_act_param": "x" * 10_000})) <= 300


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not valid JSON"),
        (b'{"hidden_size": ', "not valid JSON"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 200_000, "cannot be read"),
        (b'{"hidden_size": ' + b"1" * 5000 + b"}", "hidden_size|not valid JSON"),
        (b"[1]", "expected an object"),
    ],
    ids=["empty", "cut", "not-utf8", "nested", "huge-number", "list"],
)
def test_a_malformed_file_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    message = written(tmp_path, content)
    assert any(part in message for part in expected.split("|"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: not found"):
        Config.load(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        Config.load(tmp_path)


KEYS = [
    *INTEGERS, *FLOATS, "architectures", "model_type", "rope_scaling", "rope_parameters",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act", "hidden_act_param",
    "num_experts", "num_experts_per_tok", "bos_token_id", "eos_token_id", "eos_token_ids",
    "quantization", "quantization_config", "layer_quantization"
]  # fmt: skip
INNER = [*LONGROPE, "type", "factor", "rope_theta", "bits", "group_size", "mode", "lm_head"]
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["linear", "dynamic", "longrope", "affine", "mxfp4", "silu", "minicpm"])
)
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=9)
        | st.dictionaries(st.sampled_from(INNER) | st.text(max_size=3), inner, max_size=5)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4))
@example({"rope_scaling": {"type": "dynamic", "factor": 10**400}})
@example({"rope_scaling": {"type": "dynamic", "factor": 1.7e308}})
@example({"quantization": {"group_size": 64, "bits": 4, "lm_head": {"mode": []}}})
def test_any_json_gives_a_config_or_a_config_error(changes: dict[str, Any]) -> None:
    raw = json.loads(json.dumps({**TINY, **changes}))
    try:
        config = Config.from_dict(raw)
    except ConfigError as error:
        message = str(error)
    else:
        message = f"{config.context_length} {config.logit_divisor} {config.residual_scale}"
    assert message.isprintable()


def test_whole_numbers_may_be_written_with_a_point() -> None:
    def floats(value: Any) -> Any:
        if isinstance(value, list):
            return [floats(item) for item in value]
        return float(value) if type(value) is int else value

    raw = {**TINY, "eos_token_id": [2, 5], "head_dim": 16, "num_key_value_heads": 2}
    raw |= {"quantization": {"bits": 4, "group_size": 32}}
    written = {key: floats(value) for key, value in raw.items()}
    written["quantization"] = {"bits": 4.0, "group_size": 32.0}
    assert Config.from_dict(written) == Config.from_dict(raw)
    assert type(Config.from_dict(written).vocab_size) is int
    assert refusal({**TINY, "vocab_size": 512.5}) == (
        "config.json: vocab_size must be a whole number, got 512.5"
    )
