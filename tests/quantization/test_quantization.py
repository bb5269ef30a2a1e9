"""Making a model smaller: where bits go, what rounding costs, jobs that go on, receipts."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minicpm_mlx as mm
from minicpm_mlx.errors import InvalidArgumentError
from minicpm_mlx.model.config_sections import Quantization
from minicpm_mlx.model.fused import fuse
from minicpm_mlx.model.packing import dequantize, quantize
from minicpm_mlx.model_cards import resolve
from minicpm_mlx.quantization import job as jobs
from minicpm_mlx.quantization.bit_allocation import (
    CHOICES,
    allocate,
    quantization_section,
    sizes,
    uniform,
    unit,
)
from minicpm_mlx.quantization.job import Job
from minicpm_mlx.quantization.layerwise import LayerReader
from minicpm_mlx.quantization.recipe import METHODS, Recipe, bundled_text, packing, split_text
from minicpm_mlx.quantization.report import model_card, quality, read_report, summary
from minicpm_mlx.quantization.sensitivity import costs
from minicpm_mlx.quantization.write import Text, write_quantized
from minicpm_mlx.weights.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from minicpm_mlx.weights.lazy_tensor import LazyTensor
from minicpm_mlx.weights.load import assemble, parameters
from support.data import GOLDEN
from support.random_models import MLA, MOE, TINY, checkpoint_of, random_model

RANDOM = np.random.default_rng(0)
ROOT = Path(__file__).parents[2]
CASE = GOLDEN / "minicpm_2b_like"
SMALL = {"samples": 4, "length": 32}
"""Of calibration, for tiny models."""


@pytest.fixture(autouse=True)
def alike() -> None:
    """Each test draws the same whatever ran before it."""
    RANDOM.bit_generator.state = np.random.default_rng(0).bit_generator.state


def texts(vocabulary: int = 512, count: int = 4, length: int = 32) -> list[list[int]]:
    found: list[list[int]] = RANDOM.integers(0, vocabulary, (count, length)).tolist()
    return found


def logits(checkpoint: Checkpoint, ids: mx.array) -> mx.array:
    model = assemble(checkpoint.config, dict(checkpoint.tensors), mx.float32)
    dequantize(model, mx.float32)
    return model(ids)


# Pieces


@pytest.mark.parametrize("case", ["minicpm_2b_like", "minicpm_moe_like", "minicpm_1b_like"])
def test_pieces_in_a_row_are_the_model(case: str) -> None:
    checkpoint = read_checkpoint(GOLDEN / case)
    found, ids = LayerReader(checkpoint), texts(length=16)[:1]
    (x,), run = found.start(ids), found.runner(16)
    for number in range(found.config.num_hidden_layers):
        x = run(found.layer(number), x)
    computed = found.finish(x) @ found[found.head_name].T
    wanted = mm.load_model(GOLDEN / case)(mx.array(ids))
    assert mx.abs(computed - wanted).max().item() < 1e-4


# Where bits go


def test_what_becomes_one_matrix_is_one_unit() -> None:
    assert unit("model.layers.3.self_attn.q_proj") == unit("model.layers.3.self_attn.v_proj")
    assert unit("model.layers.3.mlp.gate_proj") == unit("model.layers.3.mlp.up_proj")
    assert unit("model.layers.3.mlp.up_proj") != unit("model.layers.3.mlp.down_proj")
    assert unit("model.layers.3.self_attn.q_proj") != unit("model.layers.4.self_attn.q_proj")
    assert unit("model.layers.0.mlp.experts.0.w1") == unit("model.layers.0.mlp.experts.7.w3")
    assert unit("lm_head") != unit("model.embed_tokens")


COSTS = st.dictionaries(
    st.sampled_from([f"model.layers.{n}.self_attn.{p}_proj" for n in range(4) for p in "qkvo"]),
    st.lists(st.floats(0, 10), min_size=len(CHOICES), max_size=len(CHOICES)),
    min_size=1,
)


@settings(deadline=None)
@given(found=COSTS, target=st.floats(2, 9))
def test_an_allocation_fits_and_keeps_units_alike(
    found: dict[str, list[float]], target: float
) -> None:
    by_path = {path: dict(zip(CHOICES, values, strict=True)) for path, values in found.items()}
    shapes = dict.fromkeys(by_path, (8, 128))
    if target < min(how.bits_per_weight for how in CHOICES):
        with pytest.raises(InvalidArgumentError, match=r"bits per weight or more, got"):
            allocate(by_path, shapes, target)
        return
    plan = allocate(by_path, shapes, target)
    assert plan.keys() == by_path.keys()
    assert sum(how.bits_per_weight for how in plan.values()) <= target * len(plan) + 1e-6
    for path, how in plan.items():
        assert all(plan[other] == how for other in plan if unit(other) == unit(path))


def test_more_room_never_costs_more() -> None:
    by_path = {
        f"model.layers.{n}.mlp.down_proj": {
            how: float(2.0 ** (n - 2 * how.bits) * how.group_size) for how in CHOICES
        }
        for n in range(8)
    }
    shapes = dict.fromkeys(by_path, (8, 128))
    spent = [
        sum(by_path[path][how] for path, how in allocate(by_path, shapes, target).items())
        for target in (3.5, 4.0, 4.5, 5.0, 6.0, 8.0, 9.0)
    ]
    assert spent == sorted(spent, reverse=True)
    assert len(set(spent)) == len(spent)


def test_matrices_that_do_not_divide_into_groups_are_left_and_all_of_them_refused() -> None:
    checkpoint = read_checkpoint(CASE)
    assert "model.embed_tokens" in uniform(checkpoint, packing(4, 64))
    router = read_checkpoint(GOLDEN / "minicpm_moe_like")
    assert not [path for path in sizes(router) if path.endswith("mlp.gate")]
    with pytest.raises(
        InvalidArgumentError, match=r"divide the rows of 0%.*32 divide those of 100%"
    ):
        uniform(checkpoint_of(random_model(), TINY), packing(4, 128))


def test_config_states_the_commonest_packing_and_what_differs() -> None:
    four, eight = Quantization(bits=4, group_size=64), Quantization(bits=8, group_size=32)
    found = quantization_section({"a": four, "b": eight, "c": four})
    assert (found["bits"], found["group_size"]) == (4, 64)
    assert found["b"] == {"bits": 8, "group_size": 32, "mode": "affine"}
    assert "a" not in found


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, MOE])
def test_costs_foretell_the_divergence(changes: dict[str, Any]) -> None:
    """Of one matrix rounded, to the order of magnitude, summed over many draws of tokens."""
    raw = json.loads((CASE / "config.json").read_text())
    model: Any = random_model(**changes)
    raw |= {key: getattr(model.config, key) for key in TINY | changes if hasattr(model.config, key)}
    source = checkpoint_of(model, raw)
    seen = texts(model.config.vocab_size, 16, 48)
    found, _ = costs(LayerReader(source), seen, seed=1)
    assert found.keys() == sizes(source).keys()
    how = Quantization(bits=3, group_size=32)
    for path in ("model.layers.1.self_attn.v_proj", "model.layers.0.self_attn.o_proj"):
        tensors = dict(source.tensors)
        weight = tensors[f"{path}.weight"].load()
        codes = mx.quantize(weight, group_size=32, bits=3)
        rounded = mx.dequantize(*codes, group_size=32, bits=3)
        tensors[f"{path}.weight"] = LazyTensor.of(rounded)
        ids = [token for text in seen for token in text]
        changed = quality(source, Checkpoint(raw=raw, tensors=tensors), ids, 48)
        assert changed.kl is not None
        assert 0.1 < found[path][how] / changed.kl < 3  # its own grids are better than MLX's


# Jobs


def with_latent_attention() -> Checkpoint:
    return checkpoint_of(random_model(**MLA), {**TINY, **MLA})


@pytest.mark.parametrize("made", [lambda: read_checkpoint(CASE), with_latent_attention])
@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"exact"}))
def test_every_method_makes_a_model_that_is_near_its_source(
    method: str, made: Callable[[], Checkpoint], tmp_path: Path
) -> None:
    source = made()
    recipe = Recipe(method=method, packing=packing(6 if method == "dwq" else 8, 32), **SMALL)
    smaller = Job(source, recipe, texts() if recipe.calibrated else [], tmp_path).run()
    ids = mx.array(texts(length=24))
    wanted, found = logits(source, ids), logits(smaller, ids)
    limit = 0.05 if method == "dwq" else 0.01  # 6 bits and 8
    assert 1e-7 < mx.square(found - wanted).mean().item() / mx.square(wanted).mean().item() < limit
    used = sum(math.prod(t.shape) * t.dtype.size for t in smaller.tensors.values())
    weights = sum(math.prod(t.shape) for t in source.tensors.values())
    assert used * 8 / weights < 9.1
    whole = tmp_path / "whole"
    whole.mkdir()
    write_checkpoint(smaller, whole)
    fused = fuse(assemble(smaller.config, dict(read_checkpoint(whole).tensors), mx.float32))
    assert mx.abs(fused(ids) - found).max().item() < 1e-3


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_float_modes_are_rounded_as_mlx_does(mode: str, tmp_path: Path) -> None:
    source = read_checkpoint(CASE)
    smaller = Job(source, Recipe(method="rtn", packing=packing(None, None, mode)), [], tmp_path)
    found = smaller.run()
    model = mm.load_model(CASE, "float32")
    quantize(model, packing(None, None, mode))
    dequantize(model, mx.float32)
    mine = assemble(found.config, dict(found.tensors), mx.float32)
    dequantize(mine, mx.float32)
    wanted = parameters(model)
    for name, array in parameters(mine).items():
        if array.ndim == 1:  # a norm, kept in 16 bits
            assert mx.allclose(array, wanted[name], rtol=2**-10)
        else:
            assert mx.array_equal(array, wanted[name])


def test_rounding_to_the_nearest_is_mlx_s_own(tmp_path: Path) -> None:
    source, how = read_checkpoint(CASE), packing(4, 64)
    found = Job(source, Recipe(method="rtn", packing=how), [], tmp_path).run().tensors
    model: Any = mm.load_model(CASE, "float32")
    quantize(model, how)
    for name, array in parameters(model).items():
        if name.endswith(".weight") and f"{name[:-7]}.scales" in found:
            assert mx.array_equal(found[name].load(), array), name


@pytest.mark.parametrize(
    ("method", "fails_at"), [("rtn", 1), ("rtn", 2), ("gptq", 2), ("mixed", 4)]
)
def test_a_job_that_was_interrupted_goes_on_and_ends_alike(
    method: str, fails_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = read_checkpoint(CASE)
    recipe = Recipe(method=method, packing=packing(4, 32), **SMALL)
    seen = texts() if recipe.calibrated else []
    folders = [tmp_path / name for name in ("once", "twice")]
    for folder in folders:
        folder.mkdir()
    whole = Job(source, recipe, seen, folders[0]).run()
    write, calls = jobs.write_whole, [0]

    def failing(path: Path, make: Callable[[Path], object]) -> None:
        calls[0] += 1
        if calls[0] == fails_at:
            raise KeyboardInterrupt
        write(path, make)

    monkeypatch.setattr(jobs, "write_whole", failing)
    with pytest.raises(KeyboardInterrupt):
        Job(source, recipe, seen, folders[1]).run()
    done = len(list(folders[1].iterdir()))
    assert done >= fails_at - 1
    told: list[str] = []
    again = Job(source, recipe, seen, folders[1], told.append).run()
    assert again.raw == whole.raw
    for name, tensor in whole.tensors.items():
        assert mx.array_equal(tensor.load(), again.tensors[name].load()), name


@pytest.mark.slow
def test_the_demo_with_more_bits_where_they_count(demo_folder: Path, tmp_path: Path) -> None:
    """On text it was not calibrated on, a third as far from itself as rounded to the nearest."""
    source, tokenizer = read_checkpoint(demo_folder), mm.load_tokenizer(demo_folder)
    recipe = Recipe(samples=8, length=256)
    seen, rest = split_text(tokenizer.encode(bundled_text(), add_bos=False), recipe)
    mixed = Job(source, recipe, seen, tmp_path).run()
    nearest = tmp_path / "nearest"
    nearest.mkdir()
    rtn = Job(source, Recipe(method="rtn"), [], nearest).run()
    far = [quality(source, found, rest[:1024]).kl for found in (mixed, rtn)]
    assert far[0] < 0.4 * far[1]  # type: ignore[operator]


@pytest.mark.slow
def test_the_fused_form_in_float16_is_finite_and_as_near_as_bfloat16(demo_folder: Path) -> None:
    """The scales of o_proj and down_proj are folded into halves; nothing overflows or vanishes."""
    ids = mx.array([mm.load_tokenizer(demo_folder).encode("The capital of France is Paris.")])
    exact = mm.load_model(demo_folder, "float32", fuse=True)(ids)
    models = [mm.load_model(demo_folder, dtype, fuse=True) for dtype in ("float16", "bfloat16")]
    halves, brains = (model(ids).astype(mx.float32) for model in models)
    assert mx.isfinite(halves).all().item()
    assert mx.abs(halves - exact).mean().item() < mx.abs(brains - exact).mean().item()


# Recipes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, "method must be one of rtn, awq"),
        (
            {"method": "gptq", "packing": packing(None, None, "mxfp4")},
            "mxfp4 goes with",
        ),
        ({"method": "dwq", "packing": packing(8, 32)}, "dwq learns nothing in 8 bits"),
        (
            {"method": "rtn", "bits_per_weight": 4.5},
            "bits_per_weight goes with",
        ),
        ({"bits_per_weight": 1.0}, "between 2 and 16, got 1"),
        ({"bits_per_weight": math.nan}, "between 2 and 16"),
        ({"samples": 0}, "samples must be 1 or more"),
        ({"length": 1}, "length must be 2 or more"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Recipe(**changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((7, 64), "bits must be one of 2, 3, 4, 5, 6, 8 in mode affine, got 7"),
        ((4, 48), "group_size must be one of 32, 64, 128"),
        ((8, None, "mxfp4"), "bits must be one of 4 in mode mxfp4, got 8"),
        ((4, 64, "fp5"), "mode must be one of affine"),
    ],
)
def test_a_packing_that_mlx_has_not_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        packing(*arguments)


def test_pieces_are_the_same_for_the_same_seed_and_the_rest_is_measured_on() -> None:
    text = list(range(100))
    recipe = Recipe(samples=5, length=10, seed=1)
    drawn, rest = split_text(text, recipe)
    assert (drawn, rest) == split_text(text, recipe)
    assert drawn != split_text(text, Recipe(samples=5, length=10, seed=2))[0]
    assert all(piece == list(range(piece[0], piece[0] + 10)) for piece in drawn)
    assert sorted(rest + [token for piece in drawn for token in piece]) == text
    most, left = split_text(text, Recipe(samples=100, length=10))
    assert (len(most), len(left)) == (7, 30)  # a quarter at least is left
    assert split_text(text, Recipe(samples=100, length=10), whole=True)[1] == []
    with pytest.raises(InvalidArgumentError, match="has 100 tokens; expected 202"):
        split_text(text, Recipe(length=101))


def test_the_bundled_text_is_in_both_languages() -> None:
    text = bundled_text()
    chinese = sum("一" <= c <= "鿿" for c in text)
    assert len(text) > 40_000
    assert chinese > 8000


# The command


@pytest.mark.slow
def test_the_command_writes_a_folder_with_its_receipt(
    demo: mm.LM,
    demo_folder: Path,
    tmp_path: Path,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, text = tmp_path / "eight", tmp_path / "text.md"
    text.write_text((ROOT / "README.md").read_text(encoding="utf-8")[:1500], encoding="utf-8")
    how = ("--method", "rtn", "--bits", "8", "--evaluate", str(text), "--json")
    assert command("quantize", str(demo_folder), str(folder), *how) == 0
    receipt = json.loads(capsys.readouterr().out)
    assert receipt == read_report(folder)
    assert receipt["bits_per_weight"] == pytest.approx(8.51, abs=0.01)
    assert receipt["quality"]["kl_mean"] < 0.005
    assert receipt["quality"]["perplexity"] / receipt["quality"]["source_perplexity"] < 1.01
    assert receipt["source"]["files"].keys() == {"model.safetensors"}
    raw = json.loads((folder / "config.json").read_text())
    assert raw["quantization"] == {"bits": 8, "group_size": 64, "mode": "affine"}
    assert (folder / "README.md").read_text() == model_card(receipt)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~os.umask(os.umask(0o22))
    assert not list(tmp_path.glob(".*"))
    question = [{"role": "user", "content": "What is the capital of France?"}]
    said = [lm.generate(question, max_tokens=8).text for lm in (demo, mm.load(folder))]
    assert said[0] == said[1]
    assert command("show", str(folder)) == 0
    shown = capsys.readouterr().out
    assert "same likeliest token" in shown
    assert command("show", str(folder), "--json") == 0
    assert json.loads(capsys.readouterr().out)["receipt"] == receipt
    (folder / "receipt.json").write_text('{"quality": 3}')
    assert command("show", str(folder)) == 0
    assert summary({"quality": 3}) == {}
    (folder / "receipt.json").write_text("[")
    assert command("show", str(folder)) == 1
    assert "expected a report" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "{}/new", "--method", "magic"], "--method must be one of rtn"),
        (
            ["demo", "{}/new", "--bits", "7"],
            "--bits must be one of 2, 3, 4",
        ),
        (["demo", "{}/new", "--method", "rtn", "--seed", "3"], "--seed is for methods that"),
        (["demo", "{}/new", "--method", "rtn", "--calibration", __file__], "--calibration is for"),
        (["demo", "{}/new", "--method", "exact", "--bits", "2"], "--bits and --group-size go with"),
        (["demo", "{}/new", "--method", "exact", "--bpw", "4"], "--bpw goes with method mixed"),
        (["demo", "{}/new", "--method", "exact"], "--method exact is for ternary weights"),
        (["demo", "{}/new", "--bpw", "4.5", "--bits", "4"], "both set the size"),
        (["demo", "{}/new", "--method", "gptq", "--bpw", "4.5"], "--bpw goes with method mixed"),
        (["demo", "{}/new", "--bpw", "99"], "--bpw must be between 2 and 16, got 99"),
        (["demo", "{}/new", "--group-size", "7"], "--group-size must be one of 32"),
        (["demo", "{}/new", "--mode", "int4"], "--mode must be one of affine"),
        (["demo", "{}/new", "--mode", "mxfp4"], "--mode mxfp4 goes with method rtn"),
        (["demo", "{}/new", "--length", "1"], "--length must be 2 or more, got 1"),
        (["demo", "{}"], "exists; give a name that does not"),
        (["demo", "{}/no/new"], "is no folder; make it first"),
        (["nothing", "{}/new"], "no model named"),
        (["demo", "{}/new", "--calibration", "{}/none"], "No such file"),
        (["demo", "{}/new", "--calibration", "{}"], "expected .txt or .md files"),
    ],
)
def test_what_cannot_be_quantized_is_one_line_and_leaves_nothing(
    arguments: list[str],
    message: str,
    demo_folder: Path,
    tmp_path: Path,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command("quantize", *(a.format(tmp_path) for a in arguments)) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_interrupted_command_leaves_no_folder_and_the_next_goes_on(
    demo_folder: Path, tmp_path: Path
) -> None:
    code = "from minicpm_mlx.cli.main import main; main()"
    made = [sys.executable, "-c", code, "quantize", str(demo_folder)]
    (tmp_path / "text.md").write_text("It is a truth universally acknowledged. " * 5)
    made += [str(tmp_path / "four"), "--method", "rtn", "--evaluate", str(tmp_path / "text.md")]
    process = subprocess.Popen(made, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    work = tmp_path / ".four-partial" / "work"
    deadline = time.monotonic() + 120
    while len(list(work.glob("layer-*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.splitlines()[-1].endswith("interrupted")
    assert ".four-partial; the same command resumes it" in " ".join(err.split())
    assert not (tmp_path / "four").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in work.glob("layer-0*")}
    assert len(kept) >= 3
    again = subprocess.Popen(made, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while again.poll() is None and len(list(work.glob("layer-*"))) <= len(kept):
        time.sleep(0.01)
    now = {path.name: path.stat().st_mtime_ns for path in work.glob("layer-0*")}
    assert not kept.keys() & now.keys() or all(now[n] == kept[n] for n in kept.keys() & now.keys())
    again.communicate(timeout=300)
    assert again.returncode == 0
    assert (tmp_path / "four" / "receipt.json").is_file()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_what_another_job_left_does_not_get_into_this_one(
    demo_folder: Path, tmp_path: Path
) -> None:
    """Nor do files beside the weights that the same job had copied: they may have changed."""
    card = resolve(str(demo_folder))
    text = Text("words", "It is a truth universally acknowledged. " * 3)
    left = tmp_path / "generation_config.json"
    for recipe in (Recipe(method="rtn"), Recipe(method="rtn", packing=packing(8, 64))):
        left.write_text('{"do_sample": true, "temperature": 99}')
        (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"half")
        found = write_quantized(demo_folder, tmp_path, recipe, card, evaluation=text)
        assert not left.exists()
        assert {path.name for path in tmp_path.glob("*.safetensors")} == {"model.safetensors"}
        assert found["bits"] == recipe.packing.bits


def test_a_layer_that_was_cut_off_is_made_anew(tmp_path: Path) -> None:
    source, recipe = read_checkpoint(CASE), Recipe(method="rtn", packing=packing(4, 32))
    whole = {k: v.load() for k, v in Job(source, recipe, [], tmp_path).run().tensors.items()}
    mx.eval(whole)
    layer = tmp_path / "layer-0001.safetensors"
    layer.write_bytes(layer.read_bytes()[:-50])
    again = Job(source, recipe, [], tmp_path).run().tensors
    assert all(mx.array_equal(again[name].load(), array) for name, array in whole.items())
