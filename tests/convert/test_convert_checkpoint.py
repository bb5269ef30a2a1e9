"""Conversions as their readers see them: ours, mlx-lm's and transformers'; whole or not at all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import minicpm_mlx as mm
from minicpm_mlx.convert.checkpoint import FORMATS, convert
from minicpm_mlx.errors import InvalidArgumentError, MiniCPMError, WeightsError
from minicpm_mlx.model.config import Config
from minicpm_mlx.model.transformer import Model
from minicpm_mlx.model_cards import Card
from minicpm_mlx.weights.checkpoint import read_checkpoint
from minicpm_mlx.weights.llama_format import Scales
from support.data import CASES, GOLDEN, need_shared, write_tokenizer

CASE = GOLDEN / "minicpm_2b_like"
IDS = mx.array([[1, 7, 300, 45, 6, 7, 511, 0]])
SCALES = Scales(scale_emb=12, scale_depth=1.4, dim_model_base=32)
TEXT = "The capital of France is"


def golden(case: str) -> dict[str, mx.array]:
    return dict(mx.load(str(GOLDEN / case / "golden.safetensors")))


def texts_of(case: str) -> list[tuple[mx.array, Any]]:
    """Token ids and the reference's logits, of the long text as well where there is one."""
    found = golden(case)
    long = [""] + (["long_"] if "long_logits" in found else [])
    return [(found[f"{kind}input_ids"], np.array(found[f"{kind}logits"])) for kind in long]


def expressible(case: str, format: str) -> bool:
    refused = {
        "mup": ("minicpm5",),
        "llama": ("moe", "_s_", "longctx", "minicpm3"),
        "mlx": ("moe", "_s_", "minicpm4_like", "minicpm3"),
    }
    return not any(word in case for word in refused.get(format, ()))


def converted(case: str, format: str, folder: Path, **options: Any) -> Path:
    if case.endswith("llama_format") and format == "mup":
        options["scales"] = SCALES
    convert(GOLDEN / case, folder, format=format, **options)
    return folder


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("model*.safetensors"))


def mlx_lm_model(folder: Path) -> Any:
    from mlx_lm.utils import load_model

    return load_model(folder)[0]


def greedy(model: Any, ids: mx.array, count: int) -> list[int]:
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    found: list[int] = []
    for _ in range(count):
        ids = model(ids, cache=cache)[:, -1:].argmax(axis=-1)
        found.append(int(ids.item()))
    return found


@pytest.mark.parametrize("format", ["mup", "llama", "mlx"])
@pytest.mark.parametrize("case", CASES)
def test_a_converted_folder_computes_what_the_reference_does_here_and_in_mlx_lm(
    tmp_path: Path, case: str, format: str
) -> None:
    if not expressible(case, format):
        with pytest.raises(InvalidArgumentError, match=f"format {format}: this (model|is a Llama)"):
            converted(case, format, tmp_path / "out")
        assert not list(tmp_path.iterdir())
        return
    folder = converted(case, format, tmp_path / "out", shard=250_000)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    models = [mm.load_model(folder, dtype="float32", fuse=True)]
    mlx_lm_refuses = {
        "mup": ("moe", "_s_", "minicpm4_like", "minicpm3"),
        "llama": ("minicpm4_like",),
    }
    if not any(word in case for word in mlx_lm_refuses.get(format, ())):
        models.append(mlx_lm_model(folder))
    for model in models:
        for ids, expected in texts_of(case):
            np.testing.assert_allclose(np.array(model(ids)), expected, atol=1e-3)
    expected = golden(case)
    for model in models[1:]:
        assert greedy(model, expected["input_ids"], expected["greedy_ids"].size) == (
            expected["greedy_ids"].flatten().tolist()
        )
        if "cross_greedy_cached_ids" in expected:  # over the threshold of the rotation
            steps = expected["cross_greedy_cached_ids"].flatten().tolist()
            assert greedy(model, expected["cross_input_ids"], len(steps)) == steps


Computes = Callable[[mx.array], Any]


@pytest.fixture(scope="module")
def transformers_model() -> Callable[[Path], Computes]:
    """Loads a folder with transformers."""
    torch = pytest.importorskip("torch", reason="transformers' Llama runs on torch")
    transformers = pytest.importorskip("transformers", reason="has the Llama to compare with")

    def load(folder: Path) -> Computes:
        model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)

        def logits(ids: mx.array) -> Any:
            with torch.no_grad():
                return model(torch.tensor(np.array(ids), dtype=torch.long)).logits.numpy()

        return logits

    return load


@pytest.mark.parametrize("format", ["llama", "mlx"])
@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_what_the_reference_does(
    transformers_model: Callable[[Path], Computes], tmp_path: Path, case: str, format: str
) -> None:
    if not expressible(case, format) or "longctx" in case:
        pytest.skip("refused, or for mlx-lm alone")
    folder = converted(case, format, tmp_path / "out")
    model = transformers_model(folder)
    for ids, expected in texts_of(case):
        np.testing.assert_allclose(model(ids), expected, atol=1e-3)


@pytest.mark.parametrize("format", ["llama", "mlx"])
def test_transformers_reads_the_demo_as_we_do(
    transformers_model: Callable[[Path], Computes],
    tmp_path: Path,
    demo: mm.LM,
    demo_folder: Path,
    format: str,
) -> None:
    convert(demo_folder, tmp_path / "out", format=format, dequantize=True)
    ids = mx.array([demo.tokenizer.encode(TEXT)])
    found = transformers_model(tmp_path / "out")(ids)
    np.testing.assert_allclose(found, np.array(demo.model(ids)), atol=1e-3)


@pytest.mark.parametrize(
    ("format", "dequantize"),
    [
        ("mlx", False),
        pytest.param("mlx", True, marks=pytest.mark.slow),
        pytest.param("llama", False, marks=pytest.mark.slow),
    ],
)
def test_mlx_lm_reads_the_demo_as_we_do(
    tmp_path: Path, demo: mm.LM, demo_folder: Path, format: str, dequantize: bool
) -> None:
    import mlx_lm

    folder = tmp_path / "out"
    convert(demo_folder, folder, format=format, dequantize=dequantize)
    model, tokenizer = mlx_lm.load(str(folder))[:2]
    ids = demo.tokenizer.encode(TEXT)
    assert tokenizer.encode(TEXT) == ids
    if not dequantize:  # mlx is as small as the source, which is tied
        growth = size_of(folder) - size_of(demo_folder)
        assert abs(growth) < 10_000 if format == "mlx" else growth > size_of(demo_folder) * 0.2
    found, expected = np.array(model(mx.array([ids]))), np.array(demo.model(mx.array([ids])))
    np.testing.assert_allclose(found, expected, atol=1e-3)
    said = mlx_lm.generate(model, tokenizer, TEXT, max_tokens=6)
    ours = demo.generate(TEXT, max_tokens=6, sampling=mm.Sampling(temperature=0)).text
    assert said.strip() == ours.strip()
    assert tokenizer.eos_token_ids == set(demo.tokenizer.eos_ids)
    messages = [{"role": "user", "content": "Hello"}]
    wanted = demo.tokenizer.chat_ids(messages)
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True) == wanted


def test_a_llama_folder_becomes_a_small_one_where_its_constants_are_given(tmp_path: Path) -> None:
    llama = converted("minicpm_2b_like", "llama", tmp_path / "llama")
    convert(llama, tmp_path / "untied")
    convert(llama, tmp_path / "tied", scales=SCALES)
    assert size_of(tmp_path / "untied") > size_of(CASE) + 512 * 128 * 4 - 1000
    assert abs(size_of(tmp_path / "tied") - size_of(CASE)) < 1000
    model = mlx_lm_model(tmp_path / "tied")
    expected = np.array(mm.load_model(CASE, dtype="float32")(IDS))
    np.testing.assert_allclose(np.array(model(IDS)), expected, atol=1e-3)


# Number formats


@pytest.mark.parametrize(
    ("case", "format", "dtype"),
    [
        ("_bin", "llama", "float32"),
        ("_bin_fp16", "mlx", "float16"),
        ("_bin_sharded", "mup", "bfloat16"),
    ],
)
def test_torch_files_become_safetensors_of_any_format(
    tmp_path: Path, case: str, format: str, dtype: str
) -> None:
    source = GOLDEN / f"minicpm_2b_like{case}"
    convert(source, tmp_path / "out", format=format, dtype=dtype)
    assert not list((tmp_path / "out").glob("*.bin"))
    checkpoint = read_checkpoint(tmp_path / "out")
    assert checkpoint.raw["torch_dtype"] == dtype
    assert {str(t.dtype) for t in checkpoint.tensors.values()} == {f"mlx.core.{dtype}"}
    found = mm.load_model(tmp_path / "out", dtype="float32", fuse=True)(IDS)
    expected = mm.load_model(source, dtype="float32", fuse=True)(IDS)
    limit = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 0.2}[dtype]
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=limit)


@pytest.mark.slow
def test_a_float16_folder_stays_finite_in_mlx_lm(tmp_path: Path, demo_folder: Path) -> None:
    convert(demo_folder, tmp_path / "out", dtype="float16")
    kinds = {str(t.dtype) for t in read_checkpoint(tmp_path / "out").tensors.values()}
    assert kinds == {"mlx.core.float16", "mlx.core.uint32"}
    logits = mlx_lm_model(tmp_path / "out")(mx.array([[1, 504, 3575]]))
    assert logits.dtype == mx.float16
    assert mx.isfinite(logits).all()


def test_scales_that_float16_cannot_hold_are_refused_and_leave_nothing(
    tmp_path: Path, demo_folder: Path
) -> None:
    faint = tmp_path / "faint"
    shutil.copytree(demo_folder, faint)
    arrays = dict(mx.load(str(faint / "model.safetensors")))
    for part in ("scales", "biases"):
        arrays[f"model.embed_tokens.{part}"] *= 1e-5
    mx.save_safetensors(str(tmp_path / "other"), arrays)
    (tmp_path / "other.safetensors").replace(faint / "model.safetensors")
    with pytest.raises(WeightsError, match=r"embed_tokens\.(scales|biases): .*do not fit float16"):
        convert(faint, tmp_path / "out", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["faint"]
    convert(faint, tmp_path / "out", dtype="bfloat16")


# What goes along


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    shutil.copytree(CASE, folder)
    write_tokenizer(folder)
    return folder


def test_tokenizer_papers_and_sampling_go_along(tmp_path: Path, source: Path) -> None:
    for name in ("README.md", "LICENSE", "generation_config.json", "modeling_minicpm.py"):
        (source / name).write_text("{}")
    (source / "LICENSE.big").write_text("x" * (1 << 21))
    (source / "notes.txt").write_text("private")
    along = {"README.md", "LICENSE", "generation_config.json", "tokenizer.json"}
    files = {"config.json", "model.safetensors"}
    for format, more in {
        "mup": {"modeling_minicpm.py", "tokenizer_config.json"},
        "llama": {"tokenizer_config.json"},
        "mlx": {"tokenizer_config.json"},
    }.items():
        convert(source, tmp_path / format, format=format)
        assert {path.name for path in (tmp_path / format).iterdir()} == along | files | more


def tiny(tokenizer: str, folder: Path) -> Path:
    """A model of one small layer with a published tokenizer."""
    shutil.copytree(need_shared("tokenizers", tokenizer), folder)
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    raw |= {"num_attention_heads": 2, "num_key_value_heads": 2, "rope_scaling": None}
    raw |= {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(raw))
    parameters: Any = tree_flatten(Model(Config.from_dict(raw)).parameters())
    mx.save_safetensors(str(folder / "model.safetensors"), dict(parameters))
    return folder


@pytest.mark.parametrize(
    "own", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["template", "none"]
)
@pytest.mark.parametrize("tokenizer", ["minicpm-2b", "minicpm4"])
def test_mlx_lm_chats_with_exactly_one_bos(tmp_path: Path, tokenizer: str, own: bool) -> None:
    from mlx_lm.utils import load_tokenizer

    source = tiny(tokenizer, tmp_path / "source")
    path = source / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    if not own:
        settings.pop("chat_template", None)
        path.write_text(json.dumps(settings))
    ours = mm.load_tokenizer(source)
    for format in ("llama", "mlx"):
        convert(source, tmp_path / format, format=format)
        again = mm.load_tokenizer(tmp_path / format)
        theirs = load_tokenizer(tmp_path / format)
        spaced = [" a", "  你好", "a <s> b"] if format == "mlx" else []
        for text in ("<用户>Hello<AI>", "山东省最高的山\n\n\tis 123 m 🎉", *spaced):
            assert again.encode(text) == theirs.encode(text) == ours.encode(text)
        messages = [{"role": "user", "content": "你好 Hello"}]
        wanted = ours.chat_ids(messages)
        assert again.chat_ids(messages) == wanted
        found = theirs.apply_chat_template(messages, add_generation_prompt=True)
        assert found == (wanted if format == "mlx" else wanted[1:])  # OpenBMB's own has no bos


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_the_card_s_template_end_tokens_and_sampling_go_along(
    tmp_path: Path, source: Path, temperature: float
) -> None:
    card = Card(
        name="x",
        path=source,
        template="chatml",
        eos=(5, 9),
        temperature=temperature,
        repetition_penalty=1.1,
    )
    (source / "generation_config.json").write_text('{"do_sample": true, "min_p": 0.1, "top_k": 9}')
    convert(source, tmp_path / "out", card=card)
    stated = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert stated["do_sample"] is (temperature > 0)
    lm = mm.load(tmp_path / "out")
    assert lm.sampling == mm.Sampling(**card.sampling)
    assert lm.model.config.eos_token_ids == (5, 9)
    text = lm.tokenizer.chat_text([{"role": "user", "content": "Hi"}])
    assert "<|im_start|>user\nHi<|im_end|>" in text


def test_a_mup_config_is_kept_and_a_llama_s_leaves_nothing_to_its_reader(tmp_path: Path) -> None:
    converted("minicpm_2b_128k_like", "mup", tmp_path / "mup")
    converted("minicpm_2b_like", "mlx", tmp_path / "out")  # which states no rope_theta
    before, after, raw = (
        json.loads((folder / "config.json").read_text())
        for folder in (GOLDEN / "minicpm_2b_128k_like", tmp_path / "mup", tmp_path / "out")
    )
    assert after | before | {"model_type": "granite"} == after
    stated = {"model_type": "llama", "rope_theta": 10000.0, "head_dim": 32, "eos_token_id": 2}
    assert raw | stated == raw
    assert raw["tie_word_embeddings"] is True
    assert raw["rms_norm_eps"] == pytest.approx(1e-5 / 144)
    assert not raw.keys() & {"auto_map", "scale_emb", "scale_depth", "dim_model_base"}


# Whole or not at all


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, WeightsError, MemoryError])
@pytest.mark.parametrize("format", ["llama", "mlx"])
def test_an_interrupted_conversion_leaves_nothing(
    tmp_path: Path, format: str, error: type[BaseException]
) -> None:
    told: list[str] = []

    def progress(what: str) -> None:
        told.append(what)
        if len(told) == 2:
            raise error("stop")

    with pytest.raises((error, MiniCPMError)):
        converted("minicpm_2b_like", format, tmp_path / "out", shard=500_000, progress=progress)
    assert told[1].startswith("file 2 of")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        ("", {"format": "onnx"}, "format must be one of mup, llama, mlx, gguf, got 'onnx'"),
        ("", {"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ("", {"gguf_type": "F16"}, "--type is for format gguf, got format 'mlx'"),
        ("", {"format": "gguf", "dtype": "float16"}, "--type says how its matrices are held"),
        ("", {"format": "gguf", "gguf_type": "Q2_K"}, "type must be one of .*got 'Q2_K'"),
        ("", {"scales": SCALES}, "config.json states its own"),
        ("_llama_format", {"format": "mup"}, r"--scale-emb 12 --scale-depth 1\.4"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(
    tmp_path: Path, case: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        convert(f"{CASE}{case}", tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", FORMATS)
def test_a_destination_that_exists_is_left_alone(tmp_path: Path, format: str) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InvalidArgumentError, match="exists; give a folder that does not"):
        convert(CASE, tmp_path, format=format)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_command_converts_and_says_how_large_it_is(
    tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    llama, back = tmp_path / "llama", tmp_path / "back"
    constants = ["--scale-emb", "12", "--scale-depth", "1.4", "--dim-model-base", "32"]
    for words in (
        [str(CASE), str(llama), "--format", "llama", "--dtype", "bfloat16"],
        [str(llama), str(back), "--format", "mup", *constants],
    ):
        assert command("convert", *words) == 0
        out, err = capsys.readouterr()
        assert (out.replace("\n", ""), err) == (f"{words[1]}: 0.00 GB", "")
    assert read_checkpoint(back).config == read_checkpoint(CASE).config
    for format in ("llama", "mlx"):  # which recorded what they folded in
        there, again = tmp_path / f"to-{format}", tmp_path / f"from-{format}"
        assert command("convert", str(CASE), str(there), "--format", format) == 0
        assert command("convert", str(there), str(again), "--format", "mup") == 0
        assert read_checkpoint(again).config == read_checkpoint(CASE).config
        capsys.readouterr()
    assert command("convert", str(llama), str(tmp_path / "out"), *constants[:2]) == 1
    assert "go together" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.gguf", "folder"])
def test_a_gguf_file_is_written_alone_or_in_a_folder(tmp_path: Path, name: str) -> None:
    pytest.importorskip("gguf", reason="writes the file's header")
    source = tiny("minicpm-2b", tmp_path / "source")
    convert(source, tmp_path / name, format="gguf", gguf_type="Q8_0")
    file = tmp_path / name if name.endswith(".gguf") else tmp_path / name / "folder-Q8_0.gguf"
    assert file.read_bytes()[:4] == b"GGUF"


# Memory

MEASURE = """
import resource, sys
from minicpm_mlx.convert.checkpoint import convert
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(sys.argv[1], sys.argv[2], format=sys.argv[3], shard=int(sys.argv[4]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("format", ["mup", "llama", "mlx"])
def test_memory_stays_near_one_shard(tmp_path: Path, format: str) -> None:
    from minicpm_mlx.weights.checkpoint import Checkpoint, write_checkpoint
    from minicpm_mlx.weights.lazy_tensor import LazyTensor

    shard, source = 150 << 20, tmp_path / "source"
    raw = json.loads((CASE / "config.json").read_text())
    raw |= {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 8}
    raw |= {"num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 32000}
    parameters: Any = tree_flatten(Model(Config.from_dict(raw)).parameters())
    tensors = {
        name: LazyTensor(
            array.shape,
            mx.bfloat16,
            lambda shape=array.shape: mx.random.normal(shape).astype(mx.bfloat16),
        )
        for name, array in parameters
    }
    source.mkdir()
    write_checkpoint(Checkpoint(raw=raw, tensors=tensors), source, shard=shard)
    assert size_of(source) > 3 * shard
    words = [sys.executable, "-c", MEASURE, source, tmp_path / "out", format, str(shard)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024  # what getrusage counts in
    layer = 2 * (4 * 1536**2 + 3 * 1536 * 4096)
    assert int(done.stdout) * unit < 1.5 * shard + layer
