"""The llm command, told of the server by its own extra-openai-models.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("fastapi")

if TYPE_CHECKING:
    from support.serving import Live

QUESTION = "What is the capital of France?"

# Its connections to its own database are closed when they are collected.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)


def test_llm_chats_continues_and_completes(
    tiny_server: Live, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins = pytest.importorskip("llm.plugins")
    from click.testing import CliRunner

    # The package that holds the demo is a plugin of llm's, and needs llama-cpp.
    monkeypatch.setattr(plugins, "LLM_LOAD_PLUGINS", "")
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: mine\n  model_name: tiny\n  api_base: {tiny_server.url}/v1\n"
        f"- model_id: base\n  model_name: tiny\n  api_base: {tiny_server.url}/v1\n"
        "  completion: true\n"
    )

    def ask(*arguments: str) -> str:
        from llm.cli import cli

        run = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert run.exit_code == 0, run.output
        return run.stdout.rstrip("\n")

    short = ("-o", "max_tokens", "8")
    turns = [{"role": "user", "content": QUESTION}]
    first = ask("-m", "mine", *short, QUESTION)
    assert first == tiny.generate(turns, max_tokens=8).text.rstrip("\n")
    assert ask("-m", "mine", *short, "--no-stream", QUESTION) == first
    turns += [{"role": "assistant", "content": first}, {"role": "user", "content": "Why?"}]
    assert ask("-c", *short, "Why?") == tiny.generate(turns, max_tokens=8).text.rstrip("\n")
    completed = ask("-m", "base", *short, "The capital of France is")
    assert completed == tiny.generate("The capital of France is", max_tokens=8).text.rstrip("\n")
