"""Models whose tokenizer has more tokens than their embedding has rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import minicpm_mlx as mm
from minicpm_mlx.convert.checkpoint import convert
from minicpm_mlx.errors import TokenizerError
from support.tiny_model import write_model

COUNT = {"max_tokens": 3, "sampling": mm.Sampling()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 512 tokens, with the tokens 512 and 513 of another's tokenizer."""
    folder = write_model(tmp_path_factory.mktemp("models") / "larger")
    (folder / "added_tokens.json").write_text(json.dumps({"<call>": 512, "<answer>": 513}))
    return folder


def test_it_loads_and_only_texts_with_such_tokens_are_refused(folder: Path) -> None:
    lm = mm.load(str(folder))
    assert lm.tokenizer.vocab_size == 512
    assert len(lm.generate("A fox", **COUNT).token_ids) == 3
    assert len(lm.generate_batch(["A", "B"], **COUNT)) == 2
    for prompt in ("A <call>", [{"role": "user", "content": "<answer>"}]):
        with pytest.raises(TokenizerError, match="which the model does not know: its number is 51"):
            lm.generate(prompt, **COUNT)


@pytest.mark.parametrize("form", ["mlx", "llama"])
def test_its_conversions_load_as_well(folder: Path, tmp_path: Path, form: str) -> None:
    convert(folder, tmp_path / "a", format=form)
    again = mm.load(str(tmp_path / "a"))
    assert again.generate("A fox", **COUNT).token_ids == (
        mm.load(str(folder)).generate("A fox", **COUNT).token_ids
    )
    assert again.tokenizer.vocab_size == 512


def test_a_dry_run_of_training_keeps_what_the_run_keeps(
    folder: Path,
    tmp_path: Path,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows: list[Any] = [{"text": f"Text {n}"} for n in range(8)] + [{"text": "x <call>"}]
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    words = ["lora", "--data", str(data), "--model", str(folder), "--val-fraction", "0"]
    assert command(*words, "--dry-run") == 1
    assert f"{data}:9: the text has the token '<call>'" in capsys.readouterr().err
    assert command(*words, "--dry-run", "--json", "--skip-bad", "1") == 0
    assert json.loads(capsys.readouterr().out)["counts"]["train"]["samples"] == 8


def test_servers_refuse_such_a_text_as_the_clients_fault(folder: Path) -> None:
    pytest.importorskip("fastapi")
    from support.serving import serving

    with serving(mm.load(str(folder))) as live:
        for path, body in (
            ("/v1/completions", {"model": "larger", "prompt": "x <call>"}),
            ("/v1/embeddings", {"model": "larger", "input": "x <call>"}),
            ("/tokenize", {"prompt": "x <call>"}),
            ("/api/generate", {"model": "larger", "prompt": "x <call>", "raw": True}),
            ("/api/embed", {"model": "larger", "input": "x <call>"}),
            ("/generate", {"text": "x <call>"}),
        ):
            answer = live.ask("POST", path, body)
            assert answer.status == 400, (path, answer.body)
            assert b"which the model does not know" in answer.body
