"""What this library writes as GGUF, run by llama.cpp itself. Needs $MINICPM_LLAMA_CPP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import minicpm_mlx as mm
from minicpm_mlx.loading import demo as demo_model
from minicpm_mlx.model_cards import resolve
from minicpm_mlx.weights.checkpoint import read_checkpoint
from minicpm_mlx.weights.gguf import read_gguf, write_gguf
from support.data import GOLDEN, need_shared
from support.gguf_files import TEXTS, llama_cpp, need_llama_cpp, with_tokenizer

CASES = [
    "minicpm_2b_like",
    "minicpm_1b_like",
    "minicpm_linear_rope",
    "minicpm_2b_like_llama_format",
    "minicpm3_like",
    "minicpm5_like",
]
"""Golden cases that llama.cpp can run."""

QUESTIONS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Count from 1 to 10.",
    "Why is the sky blue?",
    "Name three fruits.",
]


@pytest.fixture(scope="module", autouse=True)
def there() -> None:
    need_llama_cpp()  # before a file is written for it


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_says_what_the_reference_says(case: str, tmp_path: Path) -> None:
    folder = with_tokenizer(GOLDEN / case, tmp_path / "model")
    expected = mx.load(str(GOLDEN / case / "golden.safetensors"))
    prompt, wanted = expected["input_ids"][0].tolist(), expected["greedy_ids"][0].tolist()
    assert _run(folder, prompt, len(wanted), tmp_path) == wanted


def test_llama_cpp_rotates_by_the_short_factors_within_the_trained_context(tmp_path: Path) -> None:
    folder = with_tokenizer(GOLDEN / "minicpm4_like", tmp_path / "model")
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    raw["max_position_embeddings"] = 1024  # llama.cpp's contexts are no smaller than 256
    raw["rope_scaling"]["original_max_position_embeddings"] = 1024
    path.write_text(json.dumps(raw))
    prompt = list(range(300, 324))
    wanted = _greedy(mm.load_model(folder, dtype="float32"), prompt, 16)
    assert _run(folder, prompt, 16, tmp_path) == wanted


def _run(folder: Path, prompt: list[int], count: int, tmp_path: Path) -> list[int]:
    """What llama.cpp says, of a checkpoint in float32: its 16-bit products round activations."""
    path = tmp_path / "model.gguf"
    write_gguf(read_checkpoint(folder), folder, path, "F32")
    found = llama_cpp(path, prompts=[prompt], fresh=count, folder=tmp_path)
    reply: list[int] = found["replies"][0]
    return reply


def _greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    from minicpm_mlx.engine import generate

    return list(generate(model, prompt, max_tokens=count))


@pytest.mark.parametrize("name", ["minicpm-2b", "minicpm-1b", "minicpm3-4b", "minicpm4"])
def test_llama_cpp_splits_texts_as_the_model_s_own_tokenizer(name: str, tmp_path: Path) -> None:
    from support.gguf_files import written

    path = written(need_shared("tokenizers", name), tmp_path)
    found = llama_cpp(path, texts=TEXTS, folder=tmp_path)["tokens"]
    tokenizer = mm.load_tokenizer(need_shared("tokenizers", name))
    assert found == [tokenizer.encode(text, add_bos=False) for text in TEXTS]


def _prompts(demo: mm.LM) -> list[list[int]]:
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [demo.tokenizer.chat_ids(messages) for messages in asked]


def _replies(lm: mm.LM, prompts: list[list[int]]) -> list[list[int]]:
    made = [lm.generate(ids, max_tokens=48, sampling=mm.Sampling()) for ids in prompts]
    return [list(reply.token_ids) for reply in made]


def _written(demo_folder: Path, tmp_path: Path, kind: str) -> Path:
    path = tmp_path / f"demo-{kind}.gguf"
    write_gguf(read_checkpoint(demo_folder), demo_folder, path, kind)
    return path


@pytest.mark.slow
def test_llama_cpp_says_what_the_demo_says(demo: Any, demo_folder: Path, tmp_path: Path) -> None:
    path, prompts = _written(demo_folder, tmp_path, "F16"), _prompts(demo)
    found = llama_cpp(path, prompts=prompts, fresh=48, texts=TEXTS, folder=tmp_path)
    assert _cut(found["replies"]) == _cut(_replies(demo, prompts))
    assert found["tokens"] == [demo.tokenizer.encode(text, add_bos=False) for text in TEXTS]


@pytest.mark.slow
def test_llama_cpp_says_the_same_of_what_came_through_mlx(
    demo: Any, demo_folder: Path, tmp_path: Path
) -> None:
    """Q4_1 as it was published, to a checkpoint and back: codes and scales are the same."""
    source, path, prompts = demo_model.source(resolve("demo")), tmp_path / "m.gguf", _prompts(demo)
    write_gguf(read_gguf(source), demo_folder, path, "Q4_1")
    found, wanted = (
        llama_cpp(file, prompts=prompts, fresh=48, folder=tmp_path) for file in (path, source)
    )
    assert found["replies"] == wanted["replies"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_llama_cpp_says_much_the_same_of_a_packed_demo(
    kind: str, demo: Any, demo_folder: Path, tmp_path: Path
) -> None:
    """As our own model of the same file. llama.cpp rounds activations to 8 bits where weights are
    packed, which so small a model feels: it says other things of the published file as well."""
    path, prompts = _written(demo_folder, tmp_path, kind), _prompts(demo)
    replies = _replies(mm.load(path), prompts)
    found = llama_cpp(path, prompts=prompts, fresh=48, folder=tmp_path)
    same = [_agreed(a, b) for a, b in zip(found["replies"], replies, strict=True)]
    assert sorted(same)[-2] > 40, same
    # And that one says what the demo says, but where two words are as good as each other.
    whole = [a == b for a, b in zip(_cut(replies), _cut(_replies(demo, prompts)), strict=True)]
    assert sum(whole) >= 3, whole


def _agreed(a: list[int], b: list[int]) -> int:
    """Tokens up to the first that differs."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))


def _cut(replies: list[list[int]]) -> list[list[int]]:
    """Replies up to their end token, which only some runtimes report."""
    ends = [ids.index(2) if 2 in ids else len(ids) for ids in replies]
    return [ids[:end] for ids, end in zip(replies, ends, strict=True)]
