"""GGUF files read: every value survives, and what cannot be run rightly is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import minicpm_mlx as mm
from minicpm_mlx.errors import (
    ConfigError,
    FileError,
    MiniCPMError,
    MissingPackageError,
    WeightsError,
)
from minicpm_mlx.loading import demo as demo_model
from minicpm_mlx.loading import store
from minicpm_mlx.model_cards import resolve
from minicpm_mlx.weights.checkpoint import read_checkpoint
from minicpm_mlx.weights.gguf import convert_gguf, read_gguf, write_gguf
from minicpm_mlx.weights.gguf.header import GgufTensor, read_header
from minicpm_mlx.weights.gguf.quant_blocks import parts_of
from minicpm_mlx.weights.lazy_tensor import LazyTensor
from support.data import GOLDEN
from support.gguf_files import (
    HEADS,
    KV_HEADS,
    MODULES,
    SHAPES,
    SIZES,
    Type,
    byte_vocabulary,
    converted,
    gguf,
    permuted,
    quants,
    tensors,
    with_tokenizer,
    write,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def loaded(path: Path) -> dict[str, mx.array]:
    return {name: tensor.load() for name, tensor in read_gguf(path).tensors.items()}


def refusal(path: Path, kind: type[Exception] = WeightsError) -> str:
    with pytest.raises(kind) as caught:
        read_gguf(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    return message


PACKED = [(Type.Q4_0, 4), (Type.Q4_1, 4), (Type.Q5_0, 5), (Type.Q5_1, 5), (Type.Q8_0, 8)]


@pytest.mark.parametrize(("kind", "bits"), PACKED)
def test_packed_blocks_keep_every_value(path: Path, kind: Type, bits: int) -> None:
    content = tensors()
    write(path, converted(content), kind)
    checkpoint, arrays = read_gguf(path), loaded(path)
    assert checkpoint.raw["quantization"] == {"group_size": 32, "bits": bits}
    for name, array in content.items():
        module = MODULES[name]
        if array.ndim == 1:
            assert np.array_equal(np.array(arrays[f"{module}.weight"]), array)
            continue
        parts = [arrays[f"{module}.{part}"] for part in ("weight", "scales", "biases")]
        assert [part.dtype for part in parts] == [mx.uint32, mx.float16, mx.float16]
        wide = [part.astype(mx.float32) for part in parts[1:]]
        found = mx.dequantize(parts[0], *wide, group_size=32, bits=bits)
        # A row's blocks do not depend on the order of rows, so neither does its rounding.
        expected = quants.dequantize(quants.quantize(array, kind), kind)
        np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=2e-6)


def random_blocks(kind: Type) -> tuple[dict[str, LazyTensor], np.ndarray]:
    """Two rows of blocks of 256, which no library writes in Python: any bytes are some weights."""
    _, block = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(3).integers(0, 256, (2, block * 2), np.uint8)
    for at in range(0, block * 2, block):  # scale and minimum: finite, and of either sign
        raw[:, at + 1 : at + 4 : 2] &= 0xBF
    stored = GgufTensor(name="x", kind=kind.name, shape=(2, 512), raw=raw)
    with np.errstate(all="ignore"):
        expected = quants.dequantize(raw, kind)[[1, 0]]
    return parts_of(stored, "x", "weight", lambda rows: np.roll(rows, 1, 0)), expected


@pytest.mark.parametrize(("kind", "bits"), [(Type.Q4_K, 4), (Type.Q5_K, 5)])
def test_k_quants_of_groups_of_32_keep_their_codes(kind: Type, bits: int) -> None:
    tensors, expected = random_blocks(kind)
    parts = {name.removeprefix("x."): tensor.load() for name, tensor in tensors.items()}
    for name, part in parts.items():
        assert (tensors[f"x.{name}"].shape, tensors[f"x.{name}"].dtype) == (part.shape, part.dtype)
    wide = [parts[name].astype(mx.float32) for name in ("scales", "biases")]
    found = np.array(mx.dequantize(parts["weight"], *wide, group_size=32, bits=bits))
    # Scales and minimums are rounded to float16, so a weight moves by 2^-11 of its two terms.
    spread = (np.abs(np.array(wide[0])) * 2**bits + np.abs(np.array(wide[1])))[..., None]
    error = np.abs(found - expected).reshape(2, -1, 32)
    assert (error <= spread * 2**-11 + 2**-24 * 2**bits).all()
    assert error.max() > 0


@pytest.mark.parametrize("kind", [Type.Q2_K, Type.Q3_K, Type.Q6_K, Type.TQ1_0, Type.TQ2_0])
def test_kinds_that_mlx_does_not_pack_become_float16(kind: Type) -> None:
    tensors, expected = random_blocks(kind)
    (tensor,) = tensors.values()
    with np.errstate(all="ignore"):
        expected = expected.astype(np.float16)
    assert (tensor.shape, tensor.dtype) == ((2, 512), mx.float16)
    assert np.array_equal(np.array(tensor.load()), expected, equal_nan=True)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_unpacked_tensors_are_read_as_they_are(path: Path, dtype: str) -> None:
    content = {name: mx.array(array) for name, array in converted(tensors()).items()}
    if dtype == "bfloat16":
        stored = {n: np.array(a.astype(mx.bfloat16).view(mx.uint16)) for n, a in content.items()}
        writer = {n: a.view(np.uint8) for n, a in stored.items()}
        write(path, writer, Type.BF16)
    else:
        write(path, {name: np.array(a).astype(dtype) for name, a in content.items()})
    checkpoint, arrays = read_gguf(path), loaded(path)
    assert "quantization" not in checkpoint.raw
    assert {f"{MODULES[name]}.weight" for name in content} == set(arrays)
    for name, array in tensors().items():
        wanted = mx.array(array).astype(getattr(mx, dtype))
        found = arrays[f"{MODULES[name]}.weight"]
        assert found.dtype == wanted.dtype
        assert mx.array_equal(found, wanted)


def test_mixed_packings_are_stated_by_module(path: Path) -> None:
    from support.gguf_files import SIZES, add, byte_vocabulary

    writer = gguf.GGUFWriter(path, "llama")
    for key, value in ({f"llama.{k}": v for k, v in SIZES.items()} | byte_vocabulary()).items():
        add(writer, key, value)
    for name, array in tensors().items():
        kind = Type.Q8_0 if name == "token_embd" else Type.Q4_0 if "ffn" in name else Type.F16
        if array.ndim == 1:
            writer.add_tensor(f"{name}.weight", array)
        else:
            writer.add_tensor(f"{name}.weight", quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    embedding = {"group_size": 32, "bits": 8}
    expected = {"group_size": 32, "bits": 4, "model.embed_tokens": embedding}
    assert read_gguf(path).raw["quantization"] == expected
    convert_gguf(path, path.parent)
    assert mm.load_model(path.parent)(mx.array([[1, 2, 3]])).shape == (1, 3, 270)


def test_the_config_of_a_llama(path: Path) -> None:
    raw = read_gguf(write(path, tensors())).raw
    assert json.loads(json.dumps(raw, allow_nan=False)) == raw
    config = mm.Config.from_dict(raw)
    assert raw["architectures"] == ["LlamaForCausalLM"]
    assert (config.scale_emb, config.residual_scale, config.logit_divisor) == (1, 1, 1)
    assert (config.rms_norm_eps, config.rope_theta, config.tie_word_embeddings) == (1e-5, 1e4, True)
    assert (config.bos_token_id, config.eos_token_ids, config.vocab_size) == (1, (2,), 270)
    assert (config.num_key_value_heads, config.head_dim, config.context_length) == (2, 16, 256)


def test_the_constants_of_a_minicpm_are_those_it_was_converted_from(path: Path) -> None:
    keys = {
        "minicpm.block_count": 1,
        "minicpm.embedding_scale": 12.0,
        "minicpm.residual_scale": 1.4 / math.sqrt(1),
        "minicpm.logit_scale": 64 / 16,
    }
    raw = read_gguf(write(path, tensors(), architecture="minicpm", keys=keys)).raw
    assert raw["architectures"] == ["MiniCPMForCausalLM"]
    found = raw["scale_emb"], raw["scale_depth"], raw["dim_model_base"]
    assert found == (12, 1.4, 16)


@pytest.mark.parametrize("layers", [1, 24, 30, 40, 52, 61])
def test_scale_depth_comes_back_from_its_quotient(layers: int) -> None:
    from minicpm_mlx.weights.gguf.architecture import _undone, shortest

    for depth in (1.4, 1.0, 0.3, 2.125):
        quotient = shortest(float(np.float32(depth / math.sqrt(layers))))
        assert _undone(quotient, math.sqrt(layers)) == depth


def test_an_older_minicpm_has_the_constants_of_the_2b(path: Path) -> None:
    raw = read_gguf(write(path, tensors(), architecture="minicpm")).raw
    assert (raw["scale_emb"], raw["scale_depth"], raw["dim_model_base"]) == (12, 1.4, 256)


def test_a_head_of_its_own_and_linear_rotation(path: Path) -> None:
    content = tensors() | {"output": tensors()["token_embd"]}
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    checkpoint = read_gguf(write(path, content, keys=keys))
    assert checkpoint.config.tie_word_embeddings is False
    assert checkpoint.config.rope_scaling is not None
    assert checkpoint.config.rope_scaling.factor == 4
    assert "lm_head.weight" in checkpoint.tensors


def test_longrope_reads_its_factors_from_tensors(path: Path) -> None:
    factors = {
        f"rope_factors_{name}": np.linspace(1, most, 8).astype(np.float32)
        for name, most in (("short", 2), ("long", 5))
    }
    keys = {"minicpm.rope.scaling.type": "longrope"}
    checkpoint = read_gguf(write(path, tensors() | factors, architecture="minicpm", keys=keys))
    scaling = checkpoint.config.rope_scaling
    assert scaling is not None
    assert (scaling.kind, scaling.original_max_position_embeddings) == ("longrope", 256)
    assert np.allclose(scaling.long_factor, factors["rope_factors_long"])
    assert np.allclose(scaling.short_factor, factors["rope_factors_short"])


def test_biases_of_q_and_k_are_ordered_as_their_rows(path: Path) -> None:
    sizes = {"attn_q": HEADS * 16, "attn_k": KV_HEADS * 16, "attn_v": KV_HEADS * 16}
    biases = {
        f"blk.0.{name}.bias": np.arange(size, dtype=np.float32)
        for name, size in (sizes | {"attn_output": 64}).items()
    }
    stored = dict(biases)
    for name, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
        stored[f"blk.0.{name}.bias"] = permuted(biases[f"blk.0.{name}.bias"], heads)
    arrays = loaded(write(path, converted(tensors()) | stored))
    found = arrays["model.layers.0.self_attn.k_proj.bias"]
    assert np.array_equal(np.array(found), biases["blk.0.attn_k.bias"])
    assert read_gguf(path).config.attention_bias


def test_without_key_heads_there_are_as_many_as_query_heads(path: Path) -> None:
    content = tensors()
    content |= dict.fromkeys(["blk.0.attn_k", "blk.0.attn_v"], content["blk.0.attn_q"])
    keys = {"llama.attention.head_count_kv": None}
    stored = content | {"blk.0.attn_k": permuted(content["blk.0.attn_k"], HEADS)}
    arrays = loaded(write(path, stored, keys=keys))
    found = np.array(arrays["model.layers.0.self_attn.k_proj.weight"])
    assert np.array_equal(found, content["blk.0.attn_q"])


# What is refused


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"llama.expert_count": 8}, "a mixture of experts"),
        ({"llama.rope.scaling.type": "yarn"}, "is yarn; expected none, linear or longrope"),
        ({"llama.rope.scaling.type": "longrope"}, "rope_factors_short.weight"),
        ({"llama.rope.dimension_count": 8}, "rotated in part"),
        ({"llama.block_count": None}, "block_count must be a whole number above 0, got nothing"),
        ({"llama.embedding_length": 0}, "embedding_length must be a whole number"),
        ({"llama.attention.head_count": [4]}, "head_count must be a whole number"),
        ({"llama.rope.freq_base": -1.0}, "freq_base must be a number above 0"),
        ({"llama.attention.layer_norm_rms_epsilon": math.nan}, "epsilon must be a number"),
    ],
)
def test_what_is_not_run_is_named(path: Path, keys: dict[str, Any], message: str) -> None:
    assert message in refusal(write(path, tensors(), keys=keys), ConfigError)


@pytest.fixture(scope="module")
def minicpm3(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a MiniCPM3 with some of its keys changed; None leaves one out."""
    folder = tmp_path_factory.mktemp("minicpm3")
    model = with_tokenizer(GOLDEN / "minicpm3_like", folder / "model")
    write_gguf(read_checkpoint(model), model, folder / "m.gguf", "F32")
    file = read_header(folder / "m.gguf")
    content = {
        name.removesuffix(".weight"): np.array(tensor.raw.view("<f4").reshape(tensor.shape))
        for name, tensor in file.tensors.items()
    }
    keys = {k: v for k, v in file.metadata.items() if not k.startswith("general.")}
    unset = {f"minicpm3.{key}": None for key in SIZES} | dict.fromkeys(byte_vocabulary())

    def made(path: Path, **changes: Any) -> Path:
        return write(path, content, architecture="minicpm3", keys=unset | keys | changes)

    return made


LATENT = {
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "head_count", "key_length"), "attention."),
    **dict.fromkeys(("block_count", "context_length", "embedding_length"), ""),
    **{"feed_forward_length": "", "rope.dimension_count": ""},
}


@pytest.mark.parametrize("key", LATENT)
def test_each_key_of_a_minicpm3_that_is_missing_or_wrong_is_named(
    minicpm3: Callable[..., Path], path: Path, key: str
) -> None:
    name = f"minicpm3.{LATENT[key]}{key}"
    for value in (None, "x", True, 0, 2.5, [1]):
        message = refusal(minicpm3(path, **{name: value}), ConfigError)
        assert f"{name} must be a whole number above 0, got" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention.layer_norm_rms_epsilon": None}, "epsilon must be a number above 0, got nothi"),
        ({"attention.layer_norm_rms_epsilon": True}, "epsilon must be a number above 0, got True"),
        ({"attention.value_length": 32}, r"(kv_b_proj|o_proj).weight has shape"),
        ({"attention.value_length": None}, r"(kv_b_proj|o_proj).weight has shape"),
        ({"attention.value_length": "24"}, "value_length must be a whole number above 0"),
        ({"attention.head_count_kv": 3}, "must be a multiple of num_key_value_heads"),
        ({"attention.head_count_kv": "4"}, "head_count_kv must be a whole number above 0"),
        ({"attention.head_count": 8, "attention.head_count_kv": 8}, r"q_b_proj.weight has shape"),
        ({"attention.q_lora_rank": 40}, r"q_a_proj.weight has shape"),
        ({"rope.dimension_count": 15}, "qk_rope_head_dim must be even, got 15"),
        ({"rope.dimension_count": 32}, "dimension_count must be below attention.key_length"),
        ({"rope.dimension_count": 14}, "must hold qk_rope_head_dim / 2 = 7 numbers, got 8"),
        ({"rope.freq_base": "x"}, "freq_base must be a number above 0"),
        ({"vocab_size": "x", "attention.kv_lora_rank": 2**31 - 1}, "kv_a_proj_with_mqa"),
    ],
)
def test_a_minicpm3_that_does_not_fit_its_keys_is_refused_in_a_line(
    minicpm3: Callable[..., Path], path: Path, changes: dict[str, Any], message: str
) -> None:
    minicpm3(path, **{f"minicpm3.{key}": value for key, value in changes.items()})
    assert re.search(message, refusal(path, FileError))


def test_a_logit_scale_of_no_base_width_is_refused(path: Path) -> None:
    keys = {"minicpm.logit_scale": 3.3}
    message = refusal(write(path, tensors(), architecture="minicpm", keys=keys), ConfigError)
    assert "logit_scale must be hidden_size (64) over a whole number, got 3.3" in message


@pytest.mark.parametrize(
    "name", ["rope_freqs", "blk.0.ffn_gate_exps", "blk.x.ffn_up", "blk.00.ffn_up", "ffn\n_up"]
)
def test_a_tensor_of_no_llama_is_named(path: Path, name: str) -> None:
    message = refusal(write(path, tensors() | {name: np.zeros(32, np.float32)}))
    assert name.replace("\n", " ") in message


@pytest.mark.parametrize("architecture", ["qwen2", "minicpm9"])
def test_another_architecture_is_refused(path: Path, architecture: str) -> None:
    message = refusal(write(path, tensors(), architecture=architecture), ConfigError)
    assert f"general.architecture is {architecture}; expected llama or minicpm" in message


def test_tensors_missing_or_of_unknown_type_and_files_in_parts_are_named(path: Path) -> None:
    content = tensors() | {"blk.0.ffn_up": np.zeros((96, 64), np.int8)}
    message = refusal(write(path, content))
    assert "blk.0.ffn_up.weight is I8; expected one of F32" in message
    del content["blk.0.ffn_up"]
    assert "model.layers.0.mlp.up_proj.weight is missing" in refusal(write(path, content))
    message = refusal(write(path, tensors(), keys={"llama.block_count": 9999}))
    assert "holds tensors of 1 layers, and its metadata calls for 9999" in message
    assert "one of 3 parts" in refusal(write(path, tensors(), keys={"split.count": 3}))


@pytest.mark.parametrize("heads", [3, 64])
def test_heads_that_do_not_fit_the_tensors_are_refused(path: Path, heads: int) -> None:
    keys = {"llama.attention.head_count": heads, "llama.attention.head_count_kv": heads}
    refusal(write(path, tensors(), keys=keys), MiniCPMError)


def test_weights_beyond_float16_are_refused(path: Path) -> None:
    content = tensors()
    content["blk.0.ffn_up"] *= 60000
    write(path, content, Type.Q8_0)
    with pytest.raises(WeightsError, match=r"ffn_up.weight has weights beyond float16"):
        loaded(path)


def test_without_the_package_the_pip_command_is_named(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, tensors())
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(MissingPackageError, match=r"pip install .minicpm-mlx\[gguf\]"):
        read_gguf(path)


# Loading


def test_a_gguf_file_is_converted_once_and_anew_when_it_changes(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINICPM_MLX_HOME", str(tmp_path / "home"))
    write(path, tensors(), Type.Q8_0)
    card = resolve(str(path))
    assert store.kept_folder(card) is None
    assert store.made_folders(card) == []
    folder = store.folder_of(card)
    assert store.kept_folder(card) == folder
    assert store.made_folders(card) == [folder]
    with monkeypatch.context() as patch:
        patch.setattr("minicpm_mlx.weights.gguf.convert_gguf", None)
        assert store.folder_of(card) == folder
    write(path, tensors(), Type.Q4_1)
    newer = store.folder_of(card)
    assert newer != folder
    assert store.made_folders(card) == [newer]
    assert mm.Config.load(newer).quantization.bits == 4  # type: ignore[union-attr]


def test_files_of_one_name_in_two_folders_are_kept_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINICPM_MLX_HOME", str(tmp_path / "home"))
    cards = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        cards.append(resolve(str(write(tmp_path / name / "m.gguf", tensors()))))
    folders = [store.folder_of(card) for card in cards]
    assert folders[0] != folders[1]
    assert [store.made_folders(card) for card in cards] == [[folder] for folder in folders]


def test_a_loaded_file_speaks(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINICPM_MLX_HOME", str(tmp_path / "home"))
    lm = mm.load(write(path, tensors(), architecture="minicpm"))
    assert lm.card.name == "model"
    assert lm.config.scale_emb == 12
    assert len(lm.generate("the", max_tokens=3).token_ids) <= 3
    assert lm.chat("hi", max_tokens=2)[0] is not None  # a MiniCPM has its template all the same


@pytest.mark.slow
def test_the_file_of_the_demo_says_what_the_demo_says(demo: Any) -> None:
    lm = mm.load(demo_model.source(resolve("demo")))
    assert lm.config.scale_emb == 1
    for question in ("What is the capital of France?", "Count from 1 to 10."):
        asked = [{"role": "user", "content": question}]
        options: Any = {"max_tokens": 24, "sampling": mm.Sampling()}
        reply, expected = lm.generate(asked, **options), demo.generate(asked, **options)
        assert reply.token_ids == expected.token_ids


def test_names_go_both_ways() -> None:
    from minicpm_mlx.weights.gguf.tensor_names import checkpoint_name, gguf_name

    for name in SHAPES:
        assert gguf_name(*checkpoint_name(f"{name}.weight")) == f"{name}.weight"
