"""Folders that this library writes, read by mlx-lm, whose defaults are others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import minicpm_mlx as mm
from minicpm_mlx.convert.checkpoint import convert
from minicpm_mlx.convert.merge_adapter import fuse_adapter
from minicpm_mlx.model.transformer import Model
from minicpm_mlx.model_cards import resolve
from minicpm_mlx.quantization.recipe import Recipe, packing
from minicpm_mlx.quantization.write import Text, write_quantized
from minicpm_mlx.weights.config_file import written
from minicpm_mlx.weights.load import parameters
from support.adapters import random_adapter, saved
from support.data import GOLDEN, need_shared, write_tokenizer

IDS = mx.array([[1, 7, 300, 45, 6, 7, 511, 0]])
ABSENT = ("model_type", "rope_theta", "tie_word_embeddings")
"""What the published 2B config does not state."""


def published(case: str, folder: Path) -> Path:
    """A golden model whose config is like the published one's; MiniCPM3's values are as wide."""
    shutil.copytree(GOLDEN / case, folder)
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    if case == "minicpm3_like":
        del raw["v_head_dim"]
        random: Any = Model(mm.Config.from_dict(raw))
        mx.save_safetensors(str(folder / "model.safetensors"), parameters(random))
    absent = ABSENT if "2b_like" in case else ABSENT[:1]
    path.write_text(json.dumps({key: raw[key] for key in raw if key not in absent}))
    write_tokenizer(folder)
    return folder


def quantized(source: Path, folder: Path, evaluation: Text | None = None, **recipe: Any) -> Path:
    folder.mkdir()
    text = Text("noise", "".join(map(chr, range(33, 500))))
    how = Recipe(packing=packing(8, 32), samples=2, length=32, **recipe)
    card = resolve(str(source))
    write_quantized(source, folder, how, card, calibration=text, evaluation=evaluation)
    return folder


def fused(source: Path, folder: Path) -> Path:
    adapter = saved(folder.parent / "adapter", random_adapter(mm.load_model(source)), "mlx")
    fuse_adapter(source, folder, adapter, force=True)
    return folder


def converted(source: Path, folder: Path) -> Path:
    config = mm.Config.load(source)
    convert(source, folder, format="mlx" if config.mla or config.dim_model_base is None else "mup")
    return folder


WRITERS: dict[str, Callable[[Path, Path], Path]] = {
    "quantize": lambda source, folder: quantized(source, folder, method="mixed"),
    "quantize, to nearest": lambda source, folder: quantized(source, folder, method="rtn"),
    "convert": converted,
    "fuse": fused,
    "fuse of a quantized base": lambda source, folder: fused(
        quantized(source, folder.with_name("packed"), method="rtn"), folder
    ),
}


@pytest.mark.parametrize(
    ("case", "writer"),
    [
        *[("minicpm_2b_like", writer) for writer in WRITERS],
        *[("minicpm_1b_like", writer) for writer in ("convert", "quantize, to nearest")],
        *[("minicpm_2b_128k_like", writer) for writer in ("convert", "quantize, to nearest")],
        *[("minicpm_linear_rope", writer) for writer in ("convert", "quantize, to nearest")],
        *[("minicpm4_longctx_like", writer) for writer in ("convert", "quantize, to nearest")],
        *[("minicpm_2b_like_llama_format", writer) for writer in ("fuse", "quantize, to nearest")],
        ("minicpm5_like", "quantize, to nearest"),
        *[("minicpm3_like", writer) for writer in ("convert", "fuse", "quantize, to nearest")],
    ],
)
def test_mlx_lm_computes_what_we_do_with_every_folder_that_is_written(
    case: str, writer: str, tmp_path: Path
) -> None:
    from mlx_lm.utils import load_model

    folder = WRITERS[writer](published(case, tmp_path / "source"), tmp_path / "out")
    theirs, _ = load_model(folder)
    theirs.set_dtype(mx.float32)
    ours = mm.load_model(folder, "float32")
    np.testing.assert_allclose(np.array(theirs(IDS)), np.array(ours(IDS)), atol=1e-3)
    raw = json.loads((folder / "config.json").read_text())
    assert all(key in raw for key in ABSENT)


def test_mlx_lm_chats_with_a_quantized_folder_as_we_do(tmp_path: Path) -> None:
    """With the one bos that it does not add itself."""
    import mlx_lm

    source = published("minicpm_2b_like", tmp_path / "source")
    for path in need_shared("tokenizers", "minicpm-2b").glob("*token*"):
        shutil.copy(path, source)
    path = source / "config.json"
    small = {"vocab_size": 122753, "hidden_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    path.write_text(json.dumps(json.loads(path.read_text()) | small))
    random: Any = Model(mm.Config.load(source))
    mx.save_safetensors(str(source / "model.safetensors"), parameters(random))
    folder = quantized(source, tmp_path / "out", method="rtn", evaluation=Text("a", "Hello there"))
    model, tokenizer = mlx_lm.load(str(folder))[:2]
    ours = mm.load(folder, dtype="float32")
    messages = [{"role": "user", "content": "你好 Hello"}]
    wanted = ours.tokenizer.chat_ids(messages)
    assert wanted == mm.load_tokenizer(source).chat_ids(messages)
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True) == wanted
    assert tokenizer.eos_token_ids == set(ours.tokenizer.eos_ids)
    ids = mx.array([wanted])
    assert mx.allclose(model(ids).astype(mx.float32), ours.model(ids), atol=0.1)


@pytest.mark.parametrize("tie", [True, False, None])
@pytest.mark.parametrize("family", ["MiniCPMForCausalLM", "LlamaForCausalLM"])
def test_a_config_reads_the_same_once_it_is_written(family: str, tie: bool | None) -> None:
    raw: dict[str, Any] = json.loads((GOLDEN / "minicpm_1b_like" / "config.json").read_text())
    raw |= {"architectures": [family], "tie_word_embeddings": tie, "dtype": "bfloat16"}
    raw |= {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    for key in ("rope_theta", "rope_scaling", "torch_dtype", "model_type"):
        raw.pop(key, None)
    if tie is None:  # the architecture is told by its other name
        del raw["architectures"]
        raw["model_type"] = family.removesuffix("ForCausalLM").lower()
    again = written(raw)
    assert mm.Config.from_dict(again) == mm.Config.from_dict(raw)
    assert written(again) == again
    assert again | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}} == again
    assert (again["torch_dtype"], "dtype" in again) == ("bfloat16", False)


@pytest.mark.parametrize("case", ["minicpm_s_like", "minicpm_moe_like", "minicpm4_like"])
def test_mlx_lm_refuses_what_it_would_compute_otherwise(case: str, tmp_path: Path) -> None:
    from mlx_lm.utils import load_model

    convert(GOLDEN / case, tmp_path / "out", format="mup")
    with pytest.raises(ValueError, match="minicpm_mlx not supported"):
        load_model(tmp_path / "out")
    expected = mm.load_model(GOLDEN / case, "float32")(IDS)
    assert mx.allclose(mm.load_model(tmp_path / "out", "float32")(IDS), expected, atol=1e-4)
