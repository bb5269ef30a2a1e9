"""GPTQ: less error in what a matrix computes than rounding to the nearest, in MLX's own packing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from test_fuse import IDS, MOE, random_model

import minicpm_mlx as mm
from minicpm_mlx.calibrated import quantize_gptq
from minicpm_mlx.config_parts import Quantization
from minicpm_mlx.errors import InvalidArgumentError
from minicpm_mlx.fuse import fuse
from minicpm_mlx.gptq import gptq, packed
from minicpm_mlx.perplexity import score
from minicpm_mlx.quantize import dequantize, quantize
from minicpm_mlx.quantized import samples

RANDOM = np.random.default_rng(0)


def unpacked(found: Any, group: int) -> np.ndarray:
    out, width = found.codes.shape
    codes = found.codes.reshape(out, width // group, group).astype(np.float32)
    return (codes * found.scales[..., None] + found.biases[..., None]).reshape(out, width)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_the_packing_is_mlx_s(bits: int) -> None:
    weight = RANDOM.normal(size=(24, 128)).astype(np.float32)
    found = gptq(weight, np.eye(128, dtype=np.float32), bits, 64, mx.float32)
    scales, biases = mx.array(found.scales), mx.array(found.biases)
    theirs = mx.dequantize(packed(found, bits), scales, biases, group_size=64, bits=bits)
    np.testing.assert_allclose(np.array(theirs), unpacked(found, 64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_outputs_are_nearer_than_by_rounding_to_the_nearest(bits: int) -> None:
    weight = RANDOM.normal(size=(48, 128)).astype(np.float32)
    mixed = RANDOM.normal(size=(128, 128)) * RANDOM.uniform(0.1, 3, 128)
    x = (RANDOM.normal(size=(1000, 128)) @ mixed).astype(np.float32)
    found = unpacked(gptq(weight, x.T @ x, bits, 64, mx.float16), 64)
    codes, scales, biases = mx.quantize(mx.array(weight), group_size=64, bits=bits)
    nearest = np.array(mx.dequantize(codes, scales, biases, group_size=64, bits=bits))
    errors = [np.square(x @ (rounded - weight).T).mean() for rounded in (found, nearest)]
    assert errors[0] < 0.5 * errors[1]


def test_a_grid_that_is_there_already_is_found_again() -> None:
    codes = RANDOM.integers(3, 14, size=(16, 64))  # not all of a grid's levels are in use
    scale = RANDOM.uniform(0.5, 2, size=(16, 1))
    weight = (codes * scale - 4).astype(np.float32)
    x = RANDOM.normal(size=(200, 64)).astype(np.float32)
    found = unpacked(gptq(weight, x.T @ x, 4, 64, mx.float32), 64)
    np.testing.assert_allclose(found, weight, atol=1e-4)


def test_inputs_never_seen_do_no_harm() -> None:
    weight = RANDOM.normal(size=(8, 64)).astype(np.float32)
    found = gptq(weight, np.zeros((64, 64), np.float32), 4, 32, mx.float16)
    assert np.isfinite(unpacked(found, 32)).all()
    assert np.abs(unpacked(found, 32) - weight).max() < 0.5
    zero = gptq(np.zeros((8, 64), np.float32), np.eye(64, dtype=np.float32), 4, 32, mx.float16)
    assert (unpacked(zero, 32) == 0).all()


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False, "attention_bias": True}, MOE],
    ids=["tied", "head", "experts"],
)
def test_a_model_is_nearer_to_itself_than_rounded_to_the_nearest(changes: dict[str, Any]) -> None:
    def model() -> Any:
        return random_model(**changes)

    seen, unseen = (mx.array(RANDOM.integers(0, 500, size=(6, 64))) for _ in range(2))
    expected = model()(unseen)
    packing = Quantization(bits=3, group_size=32)
    nearest, by_inputs = model(), model()
    told: list[str] = []
    how = quantize_gptq(by_inputs, packing, seen.tolist(), told.append)  # type: ignore[arg-type]
    assert how.keys() == quantize(nearest, packing).keys()
    errors = [mx.square(m(unseen) - expected).mean().item() for m in (by_inputs, nearest)]
    assert errors[0] < errors[1]  # by little: the inputs of random weights are all alike
    assert told[0] == "layer 1 of 2"
    kinds = {type(module) for _, module in by_inputs.named_modules()}
    assert nn.QuantizedEmbedding in kinds
    fused = fuse(by_inputs)
    assert mx.isfinite(fused(IDS)).all().item()


@pytest.mark.slow
def test_the_demo_is_half_as_far_from_itself_as_rounded_to_the_nearest(demo_folder: Path) -> None:
    """Of text it was not calibrated on: this repository's README, calibrated on the tests."""
    root = Path(__file__).parents[1]
    tokenizer = mm.load_tokenizer(demo_folder)
    seen = tokenizer.encode(Path(__file__).read_text(), add_bos=False)
    unseen = tokenizer.encode((root / "README.md").read_text(), add_bos=False)[:1024]
    packing = Quantization(bits=4, group_size=64)
    reference: Any = mm.load_model(demo_folder)
    nearest, by_inputs = (mm.load_model(demo_folder) for _ in range(2))
    quantize(nearest, packing)
    quantize_gptq(by_inputs, packing, samples(seen, 8, 256))  # type: ignore[arg-type]
    for model in (nearest, by_inputs):
        dequantize(model, mx.float32)
    far = [score(m, unseen, context=512, reference=reference).kl for m in (by_inputs, nearest)]
    assert far[0] is not None
    assert far[1] is not None
    assert far[0] < 0.6 * far[1]


def test_samples_are_the_same_for_the_same_seed() -> None:
    text = list(range(100))
    drawn = samples(text, 5, 10, seed=1)
    assert drawn == samples(text, 5, 10, seed=1) != samples(text, 5, 10, seed=2)
    assert all(piece == list(range(piece[0], piece[0] + 10)) for piece in drawn)
    assert samples(text, 200, 100) == [text]
    with pytest.raises(InvalidArgumentError, match="has 100 tokens; expected 101"):
        samples(text, 1, 101)


def test_the_command_writes_a_folder_that_loads(
    demo: mm.LM,
    demo_folder: Path,
    tmp_path: Path,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "eight"
    assert command("quantize", str(demo_folder), str(folder), "--bits", "8") == 0
    assert "GB" in capsys.readouterr().out
    raw = json.loads((folder / "config.json").read_text())
    assert raw["quantization"] == {"bits": 8, "group_size": 64, "mode": "affine"}
    question = [{"role": "user", "content": "What is the capital of France?"}]
    said = [lm.generate(question, max_tokens=8).text for lm in (demo, mm.load(folder))]
    assert said[0] == said[1]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "{}/new", "--method", "magic"], "--method must be one of rtn, gptq"),
        (["demo", "{}/new", "--bits", "7"], "--bits must be 2 to 6 or 8"),
        (["demo", "{}/new", "--method", "gptq"], "go together"),
        (["demo", "{}/new", "--calibration", "x"], "go together"),
        (["demo", "{}"], "exists; give a folder that does not"),
        (["nothing", "{}/new"], "no model named"),
        (["demo", "{}/new", "--method", "gptq", "--calibration", "{}/none"], "No such file"),
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
