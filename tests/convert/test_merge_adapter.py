"""Merged weights do what the adapter on top does, in every form, or are not written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import minicpm_mlx as mm
from minicpm_mlx.convert import merge_adapter
from minicpm_mlx.convert.merge_adapter import MergeCheck, fuse_adapter, merged
from minicpm_mlx.engine.scoring.perplexity import score
from minicpm_mlx.errors import ConfigError, InvalidArgumentError, WeightsError
from minicpm_mlx.model.adapters import Adapter, apply_adapter
from minicpm_mlx.model.config_sections import PACKINGS, Quantization
from minicpm_mlx.model.packing import quantize, unpack
from minicpm_mlx.quantization.repack import repack
from minicpm_mlx.weights import config_file, load_model
from minicpm_mlx.weights.adapters import read_adapter
from minicpm_mlx.weights.checkpoint import read_checkpoint, write_checkpoint
from minicpm_mlx.weights.companion_files import copy_companion_files
from minicpm_mlx.weights.load import parameters
from support.adapters import CAN_DORA, LORA, close, random_adapter, saved
from support.random_models import IDS, MOE, TINY, random_model

NAN = float("nan")
ONE = "model.layers.0.self_attn.q_proj"
FOUR = Quantization(bits=4, group_size=32)
SOME = [
    Quantization(bits=bits, group_size=groups[0], mode=mode)
    for mode, (widths, groups) in PACKINGS.items()
    for bits in widths
]


def options_of(packing: Quantization) -> dict[str, Any]:
    return {"bits": packing.bits, "group_size": packing.group_size, "mode": packing.mode}


def pack(weight: mx.array, packing: Quantization) -> dict[str, mx.array]:
    arrays = mx.quantize(weight, **options_of(packing))
    return dict(zip(("weight", "scales", "biases"), arrays, strict=False))


def checkpoint(
    folder: Path, packing: Quantization | None = None, dtype: mx.Dtype = mx.float32, **changes: Any
) -> Path:
    """A random model's folder, in the bits of `packing`."""
    folder.mkdir()
    model = random_model(**changes)
    raw = {**TINY, **changes}
    if packing is not None:
        quantize(model, packing)
        raw["quantization"] = options_of(packing)
    arrays = {
        name: a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a
        for name, a in parameters(model).items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def written(source: Path, adapter: Adapter, folder: Path, **how: Any) -> Path:
    folder.mkdir()
    write_checkpoint(merged(read_checkpoint(source), adapter, **how), folder)
    return folder


def on_top(source: Path, adapter: Adapter) -> mx.array:
    model = load_model(source)
    apply_adapter(model, adapter)
    return model(IDS)


@CAN_DORA
@pytest.mark.parametrize(
    ("changes", "layout"),
    [
        ({"attention_bias": True}, "mlx"),
        ({"tie_word_embeddings": False, "num_key_value_heads": 2}, "peft"),
        (MOE, "mlx"),
    ],
    ids=["bias", "grouped, own head", "experts"],
)
def test_a_dense_base_does_what_it_did_with_the_adapter_on_top(
    changes: dict[str, Any], layout: str, dora: bool, tmp_path: Path
) -> None:
    source = checkpoint(tmp_path / "base", **changes)
    made = random_adapter(random_model(**changes), dora=dora)
    adapter = read_adapter(saved(tmp_path / "adapter", made, layout))
    out = written(source, adapter, tmp_path / "out")
    expected = on_top(source, adapter)
    assert not close(expected, load_model(source)(IDS))
    assert close(load_model(out)(IDS), expected)
    before, after = read_checkpoint(source), read_checkpoint(out)
    assert config_file.written(before.raw) == after.raw
    assert {n: t.dtype for n, t in before.tensors.items()} == {
        n: t.dtype for n, t in after.tensors.items()
    }
    for name, tensor in before.tensors.items():
        same = mx.array_equal(tensor.load(), after.tensors[name].load()).item()
        assert same == (name.rpartition(".")[0] not in adapter.deltas or name.endswith("bias"))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_sixteen_bits_stay_and_are_rounded_once(dtype: mx.Dtype, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "base", dtype=dtype)
    adapter = random_adapter(random_model())
    tensors = merged(read_checkpoint(source), adapter).tensors
    delta = adapter.deltas[ONE]
    weight = read_checkpoint(source).tensors[f"{ONE}.weight"].load().astype(mx.float32)
    expected = (weight + (delta.a @ delta.b).T).astype(dtype)
    assert tensors[f"{ONE}.weight"].dtype == dtype
    assert mx.array_equal(tensors[f"{ONE}.weight"].load(), expected)


@pytest.mark.parametrize("strength", [0, 1e-4, 0.3])
@pytest.mark.parametrize("packing", SOME, ids=str)
def test_repacking_errs_no_more_than_keeping_the_old_or_packing_anew(
    packing: Quantization, strength: float
) -> None:
    parts = pack(mx.random.normal((24, 256), key=mx.random.key(1)), packing)
    old = unpack(parts, packing)
    wanted = old + strength * mx.random.normal(old.shape, key=mx.random.key(2))
    anew = pack(wanted, packing)

    def errors(dense: mx.array) -> np.ndarray:
        groups = ((dense - wanted) ** 2).reshape(-1, packing.group_size)
        return np.array(groups.sum(axis=-1))

    again = repack(wanted, parts, packing)
    for part, array in again.items():
        assert (array.shape, array.dtype) == (parts[part].shape, parts[part].dtype)
    found = errors(unpack(again, packing))
    assert (found <= errors(old) * (1 + 1e-5) + 1e-11).all()
    assert found.sum() <= errors(unpack(anew, packing)).sum() * 1.001 + 1e-11


@CAN_DORA
@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_base_stays_packed(bits: int, dora: bool, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "base", Quantization(bits=bits, group_size=32))
    adapter = random_adapter(random_model(), dora=dora)
    out = written(source, adapter, tmp_path / "out")
    before, after = read_checkpoint(source), read_checkpoint(out)
    assert config_file.written(before.raw) == after.raw
    shapes = [{n: (t.shape, t.dtype) for n, t in c.tensors.items()} for c in (before, after)]
    assert shapes[0] == shapes[1]
    expected = on_top(source, adapter)
    gaps = [mx.abs(load_model(f)(IDS) - expected).mean().item() for f in (out, source)]
    assert gaps[0] < 0.35 * gaps[1]


def test_each_packed_matrix_is_computed_once_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint(tmp_path / "base", FOUR)
    adapter = random_adapter(random_model())
    calls: list[int] = []
    monkeypatch.setattr(merge_adapter, "repack", lambda *a: calls.append(1) or repack(*a))
    tensors = merged(read_checkpoint(source), adapter).tensors
    assert not calls
    for tensor in tensors.values():
        tensor.load()
    assert len(calls) == len(adapter.deltas)
    tensors[f"{ONE}.scales"].load()
    assert len(calls) == len(adapter.deltas) + 1


@pytest.mark.parametrize(
    "packing", [FOUR, Quantization(bits=4, group_size=32, mode="mxfp4")], ids=["affine", "mxfp4"]
)
def test_dequantized_matrices_are_dense_and_the_rest_stays_packed(
    packing: Quantization, tmp_path: Path
) -> None:
    source = checkpoint(tmp_path / "base", packing)
    raw = json.loads((source / "config.json").read_text())
    raw["quantization"][ONE] = dict(raw["quantization"])
    (source / "config.json").write_text(json.dumps(raw))
    adapter = random_adapter(random_model())
    out = written(source, adapter, tmp_path / "out", dequantize=True)
    stated = json.loads((out / "config.json").read_text())["quantization"]
    assert ONE not in stated
    assert stated["bits"] == 4
    packed = {n.removesuffix(".scales") for n in read_checkpoint(out).tensors if "scales" in n}
    assert packed
    assert not packed & adapter.deltas.keys()
    assert mx.allclose(load_model(out)(IDS), on_top(source, adapter), rtol=0.05, atol=0.05)


def test_a_model_of_which_nothing_stays_packed_says_so_no_more(tmp_path: Path) -> None:
    source = read_checkpoint(checkpoint(tmp_path / "base", FOUR))
    norm = "model.norm.weight"
    assert "quantization" not in merge_adapter._raw(source, {norm: source.tensors[norm]})


def test_mlx_lm_reads_a_folder_dense_in_parts(tmp_path: Path) -> None:
    from mlx_lm.utils import load_model as theirs

    llama = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "tie_word_embeddings": False,
        "scale_emb": None,
        "scale_depth": None,
        "dim_model_base": None,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 4,
    }
    source = checkpoint(tmp_path / "base", FOUR, **llama)
    adapter = random_adapter(random_model(**llama))
    out = written(source, adapter, tmp_path / "out", dequantize=True)
    model, _ = theirs(out)
    assert mx.allclose(model(IDS), load_model(out)(IDS), rtol=1e-3, atol=1e-3)


SPEAKS = {"vocab_size": 49152, "tie_word_embeddings": False}
"""Of a random model that the demo's tokenizer fits."""

TEXT = "The quick brown fox jumps over the lazy dog. 敏捷的棕色狐狸。"


@pytest.fixture
def base(tmp_path: Path, demo_folder: Path) -> Path:
    """A random model in 4 bits, with a tokenizer."""
    return talking(tmp_path, demo_folder, FOUR)


def talking(tmp_path: Path, demo_folder: Path, packing: Quantization | None, **more: Any) -> Path:
    source = checkpoint(tmp_path / "base", packing, **SPEAKS, **more)
    copy_companion_files(demo_folder, source)
    return source


def adapter_of(folder: Path, factor: float, **more: Any) -> Path:
    """A random adapter's folder, `factor` times as strong as the others here."""
    made = random_adapter(random_model(**SPEAKS, **more))
    deltas = {m: replace(d, b=d.b * factor) for m, d in made.deltas.items()}
    return saved(folder, Adapter(folder=folder, deltas=deltas, digest=""), "mlx")


@pytest.mark.slow
def test_a_strong_change_outlives_four_bits_and_a_tiny_one_is_refused(
    base: Path, tmp_path: Path
) -> None:
    strong, tiny = adapter_of(tmp_path / "strong", 1), adapter_of(tmp_path / "tiny", 0.05)
    found = fuse_adapter(base, tmp_path / "out", strong)  # on the built-in text
    assert found.kl < 0.25 * found.kl_base
    assert found.tokens > 100
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InvalidArgumentError) as refused:
        fuse_adapter(base, tmp_path / "new", tiny, text=TEXT)
    for part in ("was lost in rounding", "--dequantize", "--force", "base of more bits"):
        assert part in str(refused.value)
    assert sorted(tmp_path.iterdir()) == before
    forced = fuse_adapter(base, tmp_path / "forced", tiny, text=TEXT, force=True)
    assert forced.lost
    assert f"{forced.kl:.6f}" in str(refused.value)
    assert f"{forced.kl_base:.6f}" in str(refused.value)
    dense = fuse_adapter(base, tmp_path / "dense", tiny, text=TEXT, dequantize=True)
    assert not dense.lost
    assert dense.kl_base == pytest.approx(forced.kl_base, rel=1e-3)


@pytest.mark.parametrize("changes", [{}, MOE], ids=["dense", "experts"])
def test_the_folder_needs_no_adapter_and_says_what_the_adapter_on_top_says(
    changes: dict[str, Any], tmp_path: Path, demo_folder: Path
) -> None:
    source = talking(tmp_path, demo_folder, None, **changes)
    adapter = adapter_of(tmp_path / "adapter", 1, **changes)
    found = fuse_adapter(source, tmp_path / "out", adapter, text=TEXT)
    assert found.kl < 1e-5 < found.kl_base
    lm, on_top = mm.load(tmp_path / "out"), mm.load(source, adapter=adapter)
    greedy = mm.Sampling()
    ids = lm.encode([{"role": "user", "content": "Hello"}])
    assert ids == on_top.encode([{"role": "user", "content": "Hello"}])
    expected = on_top.generate(ids, max_tokens=8, sampling=greedy).token_ids
    assert lm.generate(ids, max_tokens=8, sampling=greedy).token_ids == expected
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_what_is_measured_is_the_divergence_of_the_models_that_are_there(
    base: Path, tmp_path: Path
) -> None:
    adapter = adapter_of(tmp_path / "adapter", 1)
    found = fuse_adapter(base, tmp_path / "out", adapter, text=TEXT)
    reference = mm.load(base, adapter=adapter)
    ids = reference.tokenizer.encode(TEXT)
    for folder, kl in ((tmp_path / "out", found.kl), (base, found.kl_base)):
        slow = score(mm.load(folder).model, ids, context=len(ids), reference=reference.model)
        assert kl == pytest.approx(slow.kl, rel=1e-4)
        assert found.tokens == slow.tokens


def test_an_adapter_that_changes_nothing_loses_nothing(base: Path, tmp_path: Path) -> None:
    found = fuse_adapter(base, tmp_path / "out", adapter_of(tmp_path / "adapter", 0), text=TEXT)
    assert max(abs(found.kl), abs(found.kl_base)) < 1e-6
    assert not found.lost
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    for name, tensor in before.tensors.items():
        assert mx.array_equal(tensor.load(), after.tensors[name].load())


@pytest.mark.parametrize(
    ("kl", "kl_base", "lost"),
    [
        (0.4, 1.0, False),
        (0.6, 1.0, True),
        (1e-6, 1e-7, False),
        (0, 0, False),
        (NAN, 1.0, True),
        (0.1, NAN, True),
    ],
)
def test_lost_is_half_of_what_the_adapter_does(kl: float, kl_base: float, lost: bool) -> None:
    assert MergeCheck(tokens=9, kl=kl, kl_base=kl_base).lost == lost


@pytest.mark.parametrize("when", ["the adapter on the base", "merging", "file 1 of 1", "checking"])
def test_an_interrupted_merge_leaves_nothing(when: str, base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "adapter", 1)
    before = sorted(tmp_path.iterdir())

    def interrupt(what: str) -> None:
        if what == when:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fuse_adapter(base, tmp_path / "out", adapter, text=TEXT, progress=interrupt)
    assert sorted(tmp_path.iterdir()) == before


def hostile(folder: Path, **parts: mx.array) -> Path:
    folder.mkdir()
    tensors = {"lora_a": mx.ones((64, 2)), "lora_b": mx.ones((2, 64)), **parts}
    named = {f"{ONE}.{part}": array for part, array in tensors.items()}
    mx.save_safetensors(str(folder / "adapters.safetensors"), named)
    kind = {"fine_tune_type": "dora" if "m" in parts else "lora"}
    (folder / "adapter_config.json").write_text(json.dumps(LORA | kind))
    return folder


@pytest.mark.parametrize(
    "form",
    [None, FOUR, Quantization(bits=4, group_size=32, mode="mxfp4")],
    ids=["dense", "affine", "mxfp4"],
)
@pytest.mark.parametrize(
    "parts",
    [
        {"lora_a": mx.full((64, 2), 1e30), "lora_b": mx.full((2, 64), 1e30)},
        {"m": mx.full((64,), float("inf"))},
    ],
    ids=["overflow", "infinite magnitude"],
)
def test_a_merge_that_is_not_finite_is_refused(
    parts: dict[str, mx.array], form: Quantization | None, tmp_path: Path
) -> None:
    source = checkpoint(tmp_path / "base", form)
    adapter = read_adapter(hostile(tmp_path / "adapter", **parts))
    for how in ({}, {"dequantize": True}):
        tensors = merged(read_checkpoint(source), adapter, **how).tensors
        with pytest.raises(WeightsError, match=rf"{ONE}: merged, its numbers are infinite or NaN"):
            tensors[f"{ONE}.weight"].load()


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "base", dtype=mx.float16)
    adapter = read_adapter(hostile(tmp_path / "adapter", lora_b=mx.full((2, 64), 5e4)))
    with pytest.raises(WeightsError, match="whose change fits float16"):
        merged(read_checkpoint(source), adapter).tensors[f"{ONE}.weight"].load()


def test_an_adapter_of_another_model_is_refused_as_by_the_adapter_option(
    base: Path, tmp_path: Path
) -> None:
    adapter = hostile(tmp_path / "adapter", lora_a=mx.ones((9, 2)))
    with pytest.raises(WeightsError) as expected:
        mm.load(base, adapter=adapter)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(WeightsError) as found:
        fuse_adapter(base, tmp_path / "out", adapter)
    assert str(found.value) == str(expected.value)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match="expected an adapter's config"):
        fuse_adapter(base, tmp_path / "out", adapter)
    with pytest.raises(InvalidArgumentError, match="exists; give a folder that does not"):
        fuse_adapter(base, base, adapter)
    assert sorted(tmp_path.iterdir()) == before


def test_the_command(
    base: Path, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    text, strong, tiny = tmp_path / "text", tmp_path / "strong", tmp_path / "tiny"
    text.write_text(TEXT)

    def fuse_command(name: str, adapter: Path, *options: str) -> tuple[int, str, str]:
        arguments = (base, tmp_path / name, "--adapter", adapter, "--text", text, *options)
        status = command("fuse", *map(str, arguments))
        return status, *capsys.readouterr()

    status, out, err = fuse_command("one", adapter_of(strong, 1), "--json")
    found = json.loads(out)
    assert (status, found["folder"]) == (0, str(tmp_path / "one"))
    assert found["kl"] < found["kl_base"]
    status, out, err = fuse_command("two", adapter_of(tiny, 0.05))
    assert (status, out) == (1, "")
    assert "was lost in rounding" in err
    assert not (tmp_path / "two").exists()
    status, out, err = fuse_command("two", tiny, "--dequantize")
    assert status == 0
    assert "of the base without it" in out


@pytest.mark.slow
def test_on_the_demo_a_change_of_what_it_says_survives(demo_adapter: Path, tmp_path: Path) -> None:
    found = fuse_adapter("demo", tmp_path / "out", demo_adapter)
    assert found.kl < 0.5 * found.kl_base
    weak = json.loads((demo_adapter / "adapter_config.json").read_text())
    weak["lora_parameters"]["scale"] *= 0.02
    (tmp_path / "weak").mkdir()
    (tmp_path / "weak" / "adapter_config.json").write_text(json.dumps(weak))
    file = "adapters.safetensors"
    (tmp_path / "weak" / file).write_bytes((demo_adapter / file).read_bytes())
    with pytest.raises(InvalidArgumentError, match="lost in rounding"):
        fuse_adapter("demo", tmp_path / "new", tmp_path / "weak")
    assert not (tmp_path / "new").exists()
