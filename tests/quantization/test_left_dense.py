"""Matrices whose rows divide into no groups: they stay dense, and the report says so."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import minicpm_mlx as mm
from minicpm_mlx.errors import InvalidArgumentError
from minicpm_mlx.model_cards import resolve
from minicpm_mlx.quantization.recipe import METHODS, Recipe, packing
from minicpm_mlx.quantization.report import model_card, summary
from minicpm_mlx.quantization.write import Text, write_quantized
from minicpm_mlx.weights.checkpoint import read_checkpoint, write_checkpoint
from minicpm_mlx.weights.gguf import convert_gguf, write_gguf
from support.data import write_tokenizer
from support.gguf_files import with_tokenizer
from support.random_models import IDS, TINY, checkpoint_of, random_model

DOWN: dict[str, Any] = {"intermediate_size": 104}
"""down_proj is 104 wide."""
HIDDEN: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 128, "dim_model_base": 12}
"""All others are 48 wide."""
SMALL = {"samples": 2, "length": 32}


def source(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    raw = TINY | changes
    write_checkpoint(checkpoint_of(random_model(**changes), raw), folder)
    write_tokenizer(folder)
    return folder


def quantized(source: Path, folder: Path, recipe: Recipe) -> dict[str, Any]:
    folder.mkdir()
    text = Text("noise", "".join(map(chr, range(33, 500))))
    return write_quantized(source, folder, recipe, resolve(str(source)), calibration=text)


def recipe(method: str, bits: int = 6) -> Recipe:
    return Recipe(method=method, packing=packing(bits, 32), **({} if method == "rtn" else SMALL))


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"exact"}))
@pytest.mark.parametrize(
    ("changes", "dense"),
    [
        (DOWN, {"mlp.down_proj": 2}),
        (
            HIDDEN,
            {
                "model.embed_tokens": 1,
                **{f"self_attn.{name}_proj": 2 for name in "qkvo"},
                **{f"mlp.{name}_proj": 2 for name in ("gate", "up")},
            },
        ),
    ],
    ids=["down_proj", "all others"],
)
def test_what_divides_into_no_groups_stays_dense_in_every_method(
    method: str, changes: dict[str, Any], dense: dict[str, int], tmp_path: Path
) -> None:
    from mlx_lm.utils import load_model

    base, out = source(tmp_path / "base", **changes), tmp_path / "out"
    report = quantized(base, out, recipe(method))
    assert report["dense"]["matrices"] == dense
    words = summary(report)["left dense"]
    assert all(f"{count} {name}" in words for name, count in dense.items())
    assert "divide into no groups of 32" in words
    assert f"Left dense: {words}." in model_card(report)
    ours = mm.load_model(out, "float32", fuse=True)
    expected = mm.load_model(base, "float32")(IDS)
    assert mx.square(ours(IDS) - expected).mean().item() < 0.1 * mx.square(expected).mean().item()
    theirs, _ = load_model(out)
    theirs.set_dtype(mx.float32)
    np.testing.assert_allclose(np.array(theirs(IDS)), np.array(ours(IDS)), atol=1e-3)


def test_a_model_that_divides_is_said_to_have_none_dense(tmp_path: Path) -> None:
    report = quantized(source(tmp_path / "base"), tmp_path / "out", recipe("rtn"))
    assert "dense" not in report
    assert "left dense" not in summary(report)


@pytest.mark.parametrize("method", ["rtn", "mixed", "awq"])
def test_nothing_to_pack_is_an_error_that_names_the_widths(method: str, tmp_path: Path) -> None:
    base = source(tmp_path / "base", **HIDDEN | {"intermediate_size": 80})
    with pytest.raises(InvalidArgumentError, match="48, 80"):
        quantized(base, tmp_path / "out", recipe(method))


def test_bits_per_weight_are_those_of_what_is_packed(tmp_path: Path) -> None:
    base = source(tmp_path / "base", **DOWN)
    how = Recipe(bits_per_weight=4.5, **SMALL)
    report = quantized(base, tmp_path / "out", how)
    packings = read_checkpoint(tmp_path / "out").packings
    assert max(found.bits_per_weight for found in packings.values()) >= 4
    assert report["target_bits_per_weight"] == 4.5 < report["bits_per_weight"]


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_a_gguf_file_holds_them_in_16_bits(kind: str, tmp_path: Path) -> None:
    plain, packed = source(tmp_path / "plain", **DOWN), tmp_path / "packed"
    quantized(plain, packed, recipe("rtn", 4))
    for folder in (plain, packed):
        base, back = with_tokenizer(folder, tmp_path / f"{folder.name}-2"), tmp_path / "back"
        report = write_gguf(read_checkpoint(base), base, tmp_path / "m.gguf", kind)
        assert report.left_dense == 2
        back.mkdir()
        convert_gguf(tmp_path / "m.gguf", back)
        found, expected = (mm.load_model(f, "float32")(IDS) for f in (back, base))
        assert mx.square(found - expected).mean() < 0.1 * mx.square(expected).mean()
        shutil.rmtree(back)
