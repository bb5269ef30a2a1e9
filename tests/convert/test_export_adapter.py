"""Adapters written for other programs do there what they do here."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import minicpm_mlx as mm
from minicpm_mlx.convert.checkpoint import convert
from minicpm_mlx.convert.export_adapter import export_adapter
from minicpm_mlx.errors import ConfigError, InvalidArgumentError, StorageError, WeightsError
from minicpm_mlx.loading import demo as demo_model
from minicpm_mlx.model.adapters import Adapter, LoRADelta, apply_adapter, find_projections
from minicpm_mlx.model.fused import fuse
from minicpm_mlx.model_cards import resolve
from minicpm_mlx.weights.adapters import read_adapter
from minicpm_mlx.weights.gguf import convert_gguf
from minicpm_mlx.weights.load import parameters
from support.adapters import CAN_DORA, close, random_adapter, saved
from support.random_models import IDS, MOE, TINY, random_model

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def base(folder: Path, **config: Any) -> Path:
    """A checkpoint of random weights; only what export reads of one, its config, if not `config`'s
    own model."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**TINY, **config}))
    return folder


def save_deltas(folder: Path, deltas: dict[str, LoRADelta], layout: str, **config: Any) -> Path:
    return saved(folder, Adapter(folder=folder, deltas=deltas, digest=""), layout, **config)


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return config


def same(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters change every matrix alike."""
    return one.deltas.keys() == other.deltas.keys() and all(
        close(one.deltas[m].a @ one.deltas[m].b, d.a @ d.b)
        and (one.deltas[m].magnitude is None) == (d.magnitude is None)
        and (d.magnitude is None or close(one.deltas[m].magnitude, d.magnitude))
        for m, d in other.deltas.items()
    )


@CAN_DORA
@pytest.mark.parametrize("source", ["mlx", "peft", "rslora"])
@pytest.mark.parametrize("layout", ["mlx", "peft"])
def test_an_adapter_is_the_same_in_every_layout(
    source: str, layout: str, dora: bool, tmp_path: Path
) -> None:
    model = base(tmp_path / "base", tie_word_embeddings=False)
    adapter = random_adapter(random_model(tie_word_embeddings=False), dora=dora)
    how = {"use_rslora": True} if source == "rslora" else {}
    written = saved(tmp_path / "adapter", adapter, "mlx" if source == "mlx" else "peft", **how)
    export_adapter(written, tmp_path / "out", layout, model=model)
    assert same(read_adapter(tmp_path / "out"), adapter)


def test_ranks_that_differ_are_stated_or_filled_up(tmp_path: Path) -> None:
    model = base(tmp_path / "base")
    deltas = dict(random_adapter(random_model()).deltas)
    odd = "model.layers.1.self_attn.q_proj"
    deltas[odd] = LoRADelta(a=mx.random.normal((64, 5)), b=mx.random.normal((5, 64)))
    written = save_deltas(tmp_path / "adapter", deltas, "peft")
    for layout in ("peft", "mlx"):
        export_adapter(written, tmp_path / layout, layout, model=model)
        expected = Adapter(folder=tmp_path, deltas=deltas, digest="")
        assert same(read_adapter(tmp_path / layout), expected)
    stated = config_of(tmp_path / "peft")
    assert (stated["r"], stated["rank_pattern"]) == (3, {odd: 5})
    assert config_of(tmp_path / "mlx")["num_layers"] == 2


def test_targets_name_the_modules_that_are_meant_and_no_others(tmp_path: Path) -> None:
    model = base(tmp_path / "base")
    some = random_adapter(random_model()).deltas
    last = {m: d for m, d in some.items() if m.startswith("model.layers.1.")}
    names = ["down_proj", "gate_proj", "o_proj", "q_proj", "v_proj"]
    for folder, deltas, targets in (("all", some, names), ("last", last, sorted(last))):
        written = save_deltas(tmp_path / f"adapter-{folder}", deltas, "mlx")
        export_adapter(written, tmp_path / folder, "peft", model=model)
        assert config_of(tmp_path / folder)["target_modules"] == targets
    export_adapter(written, tmp_path / "mlx", "mlx", model=model)
    assert config_of(tmp_path / "mlx")["num_layers"] == 1


@CAN_DORA
def test_mlx_lm_s_own_loader_reads_it(dora: bool, tmp_path: Path) -> None:
    from mlx_lm.tuner.utils import load_adapters

    model = base(tmp_path / "base")
    adapter = random_adapter(random_model(), dora=dora)
    last = {m: d for m, d in adapter.deltas.items() if m.startswith("model.layers.1.")}
    adapter = Adapter(folder=tmp_path, deltas=last, digest="")
    written = saved(tmp_path / "adapter", adapter, "peft")
    export_adapter(written, tmp_path / "out", "mlx", model=model)
    theirs: Any = load_adapters(random_model(), str(tmp_path / "out"))
    theirs.eval()
    ours = fuse(random_model())
    plain = ours(IDS)
    apply_adapter(ours, adapter)
    assert not close(plain, ours(IDS))
    assert close(theirs(IDS), ours(IDS))


@pytest.mark.filterwarnings("ignore")  # transformers deprecates what PEFT calls
@CAN_DORA
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
def test_peft_makes_the_same_logits_of_it(dora: bool, rslora: bool, tmp_path: Path) -> None:
    reason = "the check against PEFT needs torch, transformers and peft"
    names = ("torch", "transformers", "peft")
    torch, transformers, peft = (pytest.importorskip(name, reason=reason) for name in names)
    folder = base(tmp_path / "base", **LLAMA)
    model = random_model(**LLAMA)
    mx.save_safetensors(str(folder / "model.safetensors"), parameters(model), {"format": "pt"})
    deltas = dict(random_adapter(model, dora=dora).deltas)
    odd = "model.layers.1.self_attn.q_proj"
    deltas[odd] = replace(deltas[odd], a=mx.random.normal((64, 5)), b=mx.random.normal((5, 64)))
    written = save_deltas(tmp_path / "adapter", deltas, "peft", use_rslora=rslora)
    export_adapter(written, tmp_path / "out", "peft", model=folder)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor(np.array(IDS))
    with torch.no_grad():
        plain = theirs(ids).logits.numpy()
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "out").eval()
        expected = theirs(ids).logits.numpy()
    np.testing.assert_allclose(np.array(random_model(**LLAMA)(IDS)), plain, atol=1e-4)
    assert np.abs(expected - plain).max() > 0.1
    ours = fuse(random_model(**LLAMA))
    apply_adapter(ours, read_adapter(written))
    np.testing.assert_allclose(np.array(ours(IDS)), expected, atol=1e-4)


def greedy_by_llama_cpp(
    folder: Path, model: Path, ids: list[int], count: int, lora: Path | None, program: Path
) -> list[int]:
    """What llama.cpp continues `ids` with, by the program that node-llama-cpp makes possible."""
    program.write_text(LLAMA_CPP)
    arguments = [str(folder), str(model), json.dumps(ids), str(count), str(lora or "")]
    done = subprocess.run(["node", str(program), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: list[int] = json.loads(done.stdout.splitlines()[-1])
    return found


LLAMA_CPP = """
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";
const [folder, path, ids, count, lora] = process.argv.slice(2);
const found = createRequire(folder + "/package.json").resolve("node-llama-cpp");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(found));
const llama = await getLlama({gpu: false, logLevel: LlamaLogLevel.error, build: "never"});
const model = await llama.loadModel({modelPath: path});
const context = await model.createContext({contextSize: 512, threads: 1, ...(lora ? {lora} : {})});
const made = [];
for await (const token of context.getSequence().evaluate(JSON.parse(ids), {temperature: 0})) {
  made.push(token);
  if (made.length == +count) break;
}
console.log(JSON.stringify(made));
process.exit(0);
"""


@pytest.fixture(scope="session")
def llama_cpp() -> Path:
    """A folder where `npm install node-llama-cpp@3.22.1` was run."""
    folder = os.environ.get("MINICPM_LLAMA_CPP")
    if not folder:
        pytest.skip("MINICPM_LLAMA_CPP names no folder where node-llama-cpp is installed")
    return Path(folder)


@pytest.mark.parametrize("strength", [0.15, 0.25])  # that changes what the demo says, surely
def test_llama_cpp_says_the_same_with_it(
    llama_cpp: Path, demo_folder: Path, tmp_path: Path, strength: float
) -> None:
    gguf = demo_model.source(resolve("demo"))
    folder = tmp_path / "llama"
    folder.mkdir()
    convert_gguf(gguf, folder)
    lm = mm.load(folder)
    mx.random.seed(3)
    deltas = {}
    for name, place in find_projections(lm.model).items():
        out = place.outputs
        a = mx.random.normal((place.inputs, 4)) / place.inputs**0.5
        deltas[name] = LoRADelta(a=a, b=mx.random.normal((4, out)) * strength)
    adapter = save_deltas(tmp_path / "adapter", deltas, "mlx")
    export_adapter(adapter, tmp_path / "lora.gguf", "gguf", model=folder)
    ids = lm.encode([{"role": "user", "content": "Count from one to twenty."}])
    lm.use_adapter(adapter)
    ours = list(lm.generate(ids, max_tokens=16, sampling=mm.Sampling()).token_ids)

    def theirs(lora: Path | None) -> list[int]:
        return greedy_by_llama_cpp(llama_cpp, gguf, ids, len(ours), lora, tmp_path / "greedy.mjs")

    assert theirs(tmp_path / "lora.gguf") == ours
    assert theirs(None) != ours


@pytest.mark.slow
@pytest.mark.parametrize("form", ["llama", "mlx"])
def test_llama_cpp_says_the_same_on_a_converted_base(
    llama_cpp: Path, demo: mm.LM, tmp_path: Path, form: str
) -> None:
    assert demo.folder is not None
    convert(demo.folder, tmp_path / form, format=form)
    convert(tmp_path / form, tmp_path / "base.gguf", format="gguf", gguf_type="F32")
    mx.random.seed(3)
    deltas = {}
    for name, place in find_projections(demo.model).items():
        out, strong = place.rows.stop - place.rows.start, name.endswith(("o_proj", "down_proj"))
        a = mx.random.normal((place.inputs, 4)) / place.inputs**0.5
        deltas[name] = LoRADelta(a=a, b=mx.random.normal((4, out)) * (1.0 if strong else 0.25))
    adapter = save_deltas(tmp_path / "adapter", deltas, "mlx", model="demo")
    lora = tmp_path / "lora.gguf"
    export_adapter(adapter, lora, "gguf", model="demo", base_format=form)
    ids = demo.encode([{"role": "user", "content": "Count from one to twenty."}])
    demo.use_adapter(adapter)
    ours = list(demo.generate(ids, max_tokens=16, sampling=mm.Sampling()).token_ids)
    demo.use_adapter(None)
    program = tmp_path / "greedy.mjs"
    assert greedy_by_llama_cpp(llama_cpp, tmp_path / "base.gguf", ids, 16, lora, program) == ours


def test_a_gguf_adapter_has_the_base_file_s_names_and_rows(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model = base(tmp_path / "base", num_key_value_heads=2)
    deltas = dict(random_adapter(random_model(num_key_value_heads=2)).deltas)
    odd = "model.layers.1.mlp.down_proj"
    deltas[odd] = LoRADelta(a=mx.random.normal((96, 5)), b=mx.random.normal((5, 64)))
    written = save_deltas(tmp_path / "adapter", deltas, "peft")
    export_adapter(written, tmp_path / "lora.gguf", "gguf", model=model)
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "minicpm"
    assert fields["adapter.type"] == "lora"
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    alpha = fields["adapter.lora.alpha"]
    halves = np.arange(64).reshape(4, 2, 8)  # of each head's rows
    interleaved = halves.swapaxes(1, 2).reshape(-1)
    assert len(tensors) == 2 * len(deltas)
    for module, name, rows in (
        ("model.layers.0.self_attn.q_proj", "blk.0.attn_q", interleaved),
        ("model.layers.0.self_attn.v_proj", "blk.0.attn_v", slice(None)),
        (odd, "blk.1.ffn_down", slice(None)),
    ):
        a, b = tensors[f"{name}.weight.lora_a"], tensors[f"{name}.weight.lora_b"]
        assert a.shape == deltas[module].a.T.shape
        expected = np.array((deltas[module].a @ deltas[module].b).T)[rows]
        np.testing.assert_allclose(b @ a * alpha / len(a), expected, rtol=1e-4, atol=1e-5)


HEAD = Adapter(
    folder=Path("adapter"),
    deltas={"lm_head": LoRADelta(a=mx.ones((64, 2)), b=mx.ones((2, 512)))},
    digest="",
)
LORA_ADAPTER, DORA_ADAPTER = (random_adapter(random_model(), dora=dora) for dora in (False, True))
FIRST = min(LORA_ADAPTER.deltas)
HALF_DORA = replace(LORA_ADAPTER, deltas={**DORA_ADAPTER.deltas, FIRST: LORA_ADAPTER.deltas[FIRST]})


@pytest.mark.parametrize(
    ("adapter", "layout", "config", "message"),
    [
        (DORA_ADAPTER, "gguf", {}, "which a GGUF adapter cannot say"),
        (HEAD, "gguf", {"tie_word_embeddings": False}, "inside layers only"),
        (random_adapter(random_model(**MOE)), "gguf", MOE, "mixture of 4 experts"),
        (HEAD, "peft", {}, "changes lm_head, which is no matrix of this model"),
        (HEAD, "onnx", {}, "format must be one of peft, mlx, gguf, got 'onnx'"),
        (LORA_ADAPTER, "peft", {"hidden_size": 128}, "is it another model's"),
        (HALF_DORA, "peft", {}, "says DoRA, and .*down_proj has no magnitudes"),
    ],
)
def test_what_a_layout_cannot_say_is_refused_and_nothing_written(
    adapter: Adapter, layout: str, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = base(tmp_path / "base", **config)
    written = saved(tmp_path / "adapter", adapter, "mlx")
    before = sorted(tmp_path.iterdir())
    with pytest.raises((ConfigError, InvalidArgumentError, WeightsError), match=message):
        export_adapter(written, tmp_path / "out", layout, model=model)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("layout", ["peft", "mlx", "gguf"])
def test_what_exists_is_left_alone(layout: str, tmp_path: Path) -> None:
    model = base(tmp_path / "base")
    written = saved(tmp_path / "adapter", random_adapter(random_model()), "mlx")
    out = tmp_path / "out"
    out.write_text("mine")
    with pytest.raises(InvalidArgumentError, match="exists; give a name that does not"):
        export_adapter(written, out, layout, model=model)
    with pytest.raises(StorageError, match="cannot be written"):
        export_adapter(written, out / "inside", layout, model=model)
    assert out.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "out"}


def test_the_command(
    tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = base(tmp_path / "base"), tmp_path / "out"
    written = saved(tmp_path / "adapter", random_adapter(random_model()), "mlx")
    arguments = (written, out, "--format", "peft", "--model", model)
    assert command("export-adapter", *map(str, arguments)) == 0
    assert capsys.readouterr().out == (
        f"{out}: written for peft\nfor a base in muP form, rms_norm_eps 1e-06\n"
    )
    assert (out / "adapter_model.safetensors").is_file()
    assert config_of(out)["base_model_name_or_path"] == str(model)
