"""Folders and files given as a model that hold something else, or the model one step further in."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import minicpm_mlx as mm
from minicpm_mlx.convert.export_adapter import export_adapter
from minicpm_mlx.errors import MiniCPMError
from minicpm_mlx.model_cards import resolve
from minicpm_mlx.weights.adapters import read_adapter
from minicpm_mlx.weights.checkpoint import read_checkpoint
from minicpm_mlx.weights.gguf import write_gguf
from support.adapters import random_adapter, saved
from support.data import GOLDEN
from support.gguf_files import with_tokenizer
from support.tiny_model import write_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1024\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(MiniCPMError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_with_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    base = with_tokenizer(GOLDEN / "minicpm_2b_like", tmp_path / "base")
    folder = tmp_path / "model-GGUF"
    write_gguf(read_checkpoint(base), base, folder / "tiny-Q8_0.gguf", "Q8_0")
    card = resolve(str(folder))
    assert (card.name, card.path) == ("tiny-Q8_0", folder / "tiny-Q8_0.gguf")
    shutil.copy(base / "config.json", folder)  # as some repositories have it
    assert mm.load(folder).generate("Hi", max_tokens=1).token_ids
    (folder / "tiny-Q4_0.gguf").touch()
    message = refusal(lambda: mm.load(folder))
    assert "holds 2 .gguf files; give one of them: tiny-Q4_0.gguf, tiny-Q8_0.gguf" in message
    shutil.copy(base / "model.safetensors", folder)
    assert resolve(str(folder)).path == folder  # the weights that other files go with


@pytest.mark.parametrize("layout", ["mlx", "peft"])
def test_an_adapter_s_folder_is_told_from_a_model_and_a_model_from_an_adapter(
    layout: str, model: Path, tmp_path: Path
) -> None:
    adapter = saved(tmp_path / "adapter", random_adapter(mm.load_model(model)), layout)
    message = refusal(lambda: mm.load(adapter))
    assert "is an adapter, not a model; give it as --adapter" in message
    assert "it is a model: give it as --model" in refusal(lambda: read_adapter(model))
    for path in adapter.iterdir():  # beside its base, it is none of the weights
        shutil.copy(path, model)
    assert mm.load(model).generate("Hi", max_tokens=1).token_ids


def test_a_lora_in_gguf_is_named_as_a_model_and_as_an_adapter(model: Path, tmp_path: Path) -> None:
    adapter = saved(tmp_path / "adapter", random_adapter(mm.load_model(model)), "mlx")
    export_adapter(adapter, tmp_path / "lora.gguf", "gguf", model=model)
    message = refusal(lambda: mm.load(tmp_path / "lora.gguf"))
    assert "expected a model, found adapter (general.type); llama.cpp puts it on" in message
    assert "a GGUF file, which llama.cpp reads" in refusal(
        lambda: read_adapter(tmp_path / "lora.gguf")
    )


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "generation_config.json", "special_tokens_map.json"),
        *("tokenizer.model", "model.safetensors.index.json", "pytorch_model.bin", "model.gguf"),
    ],
)
def test_a_git_lfs_pointer_is_named_in_place_of_every_file(name: str, model: Path) -> None:
    if name == "tokenizer.model":
        (model / "tokenizer.json").unlink()
    if name in ("model.safetensors.index.json", "pytorch_model.bin", "model.gguf"):
        (model / "model.safetensors").unlink()
    (model / name).write_text(POINTER)
    message = refusal(lambda: mm.load(model))
    assert re.search(rf"{name}\b.*a Git LFS pointer.*git lfs pull", message)


def test_a_git_lfs_pointer_that_is_not_needed_does_no_harm(model: Path) -> None:
    for name in ("tokenizer.model", "pytorch_model.bin", "model.safetensors.index.json"):
        (model / name).write_text(POINTER)
    assert mm.load(model).generate("Hi", max_tokens=1).token_ids


def test_a_folder_of_the_hub_s_cache_is_its_snapshot(model: Path, tmp_path: Path) -> None:
    root = tmp_path / "models--openbmb--MiniCPM-2B-dpo-bf16"
    (root / "refs").mkdir(parents=True)
    (root / "snapshots").mkdir()
    message = refusal(lambda: mm.load(root))
    assert "its download broke off: `minicpm-mlx pull openbmb/MiniCPM-2B-dpo-bf16`" in message
    for commit in ("new", "old"):
        shutil.copytree(model, root / "snapshots" / commit)
    (root / "refs" / "main").write_text("old\n")
    for named in (root, root / "snapshots"):
        card = resolve(str(named))
        assert card.path == root / "snapshots" / "old"
        assert card.name == "openbmb/MiniCPM-2B-dpo-bf16"
        assert card.template == resolve(card.name).template  # of the card of that repository
    assert mm.load(root).generate("Hi", max_tokens=1).token_ids
    other = root.rename(tmp_path / "models--someone--thing")
    assert resolve(str(other)).name == "someone/thing"
    assert mm.load(other).generate("Hi", max_tokens=1).token_ids


def test_a_folder_around_models_names_them(model: Path) -> None:
    """As full fine-tuning writes one, whose checkpoints are beside it."""
    assert "give the one inside it: model" in refusal(lambda: mm.load(model.parent))
