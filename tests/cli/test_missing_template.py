"""A model without a chat template: each command says what it can do with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from minicpm_mlx.text import tokenizer
from support.eval_data import write_all
from support.tiny_model import write_model


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of another family, whose folder has no template."""
    folder = write_model(tmp_path / "bare")
    (folder / "tokenizer_config.json").write_text("{}")
    monkeypatch.setattr(tokenizer, "_builtin_template", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    write_all(tmp_path / "data")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 4)
    return folder


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ("generate -p Hi", "--raw"),
        ("chat -p Hi", "minicpm-mlx generate --raw"),
        ("lora --data rows.jsonl --adapter-path new", '{"text": …}'),
        (
            "eval --tasks gsm8k --data data --limit 1 --chat-template --output new",
            "leave out --chat-template",
        ),
    ],
    ids=lambda value: value.split()[0],
)
def test_the_advice_fits_the_command(
    bare: Path,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    advice: str,
) -> None:
    status = command(*arguments.split(), "--model", str(bare))
    assert status == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "has no chat template; add a chat_template.jinja to it, or" in last
    assert last.endswith(advice)


def test_raw_text_needs_no_template(bare: Path, command: Callable[..., int]) -> None:
    assert command("generate", "-p", "Hi", "--raw", "--max-tokens", "2", "-m", str(bare)) == 0
