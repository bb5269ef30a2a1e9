"""The llm command, told of the server by its own extra-openai-models.yaml."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("llm")
pytest.importorskip("fastapi")

if TYPE_CHECKING:
    from support.serving import Live

QUESTION = "What is the capital of France?"


def ask(server: Live, folder: Path, *arguments: str) -> str:
    """What `llm` prints, in a user directory of its own."""
    (folder / "extra-openai-models.yaml").write_text(
        f"- model_id: mine\n  model_name: demo\n  api_base: {server.url}/v1\n"
        f"- model_id: base\n  model_name: demo\n  api_base: {server.url}/v1\n  completion: true\n"
    )
    told = {"LLM_USER_PATH": str(folder), "HOME": str(folder), "OPENAI_API_KEY": "none"}
    told["LLM_LOAD_PLUGINS"] = ""  # the package that holds the demo is one, and needs llama-cpp
    done = subprocess.run(
        [sys.executable, "-m", "llm", *arguments],
        env=os.environ | told,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.rstrip("\n")


@pytest.mark.parametrize("stream", [True, False])
def test_llm_prints_what_generate_says(server, demo, tmp_path, stream):
    how = [] if stream else ["--no-stream"]
    text = ask(server, tmp_path, "-m", "mine", "-o", "max_tokens", "24", *how, QUESTION)
    assert text == demo.generate([{"role": "user", "content": QUESTION}], max_tokens=24).text


def test_llm_continues_its_conversation(server, demo, tmp_path):
    turns = [{"role": "user", "content": QUESTION}]
    first = ask(server, tmp_path, "-m", "mine", "-o", "max_tokens", "24", QUESTION)
    second = ask(server, tmp_path, "-c", "-o", "max_tokens", "8", "And of Italy?")
    turns += [
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And of Italy?"},
    ]
    assert second == demo.generate(turns, max_tokens=8).text.rstrip("\n")


def test_llm_completes_text(server, demo, tmp_path):
    text = ask(server, tmp_path, "-m", "base", "-o", "max_tokens", "6", "The capital of France is")
    assert text == demo.generate("The capital of France is", max_tokens=6).text
