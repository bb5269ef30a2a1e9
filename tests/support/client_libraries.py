"""The client libraries that are run against the server, and what each cannot show.

docs/clients.md has the same list. `python_of` installs those for Python once into the tests' cache.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parents[1] / "server" / "clients"
NPM = (
    *("ai@6", "@ai-sdk/openai-compatible@2", "@ai-sdk/openai@3", "@ai-sdk/anthropic@3"),
    *("@anthropic-ai/sdk@1", "openai@6", "ollama@0.6", "zod@4"),
)
SECONDS = 900
"""For the installation, at most."""

THOUGHTS = ("thinking", "thinking streamed")
TOOLS = ("tools", "tools streamed")


@dataclass(frozen=True)
class Library:
    """A library, or one of its classes for an API."""

    name: str
    """As in the guide."""
    version: str
    """That which was last run."""
    program: str
    """A file of tests/server/clients."""
    api: str = ""
    """The program's second argument."""
    requirements: str = ""
    """A file beside the program, for a virtual environment of its own; none is the tests' own."""
    cannot: Mapping[str, str] = field(default_factory=dict)
    """Checks that fail for a reason of the library's own, with the reason."""
    checks: tuple[str, ...] = (*THOUGHTS, *TOOLS, "structure")
    """Those that it has a place for, at least."""


_MANY = "requirements.txt"
_PYDANTIC = "requirements-pydantic-ai.txt"
_NOT_READ = dict.fromkeys(THOUGHTS, "ChatOpenAI reads no reasoning_content, by intent")
_CLAUDE = "it takes only the names of Anthropic's own models"

LIBRARIES = [
    Library("openai", "3.57", "use_openai.py"),
    Library("openai, responses", "3.57", "use_openai_responses.py"),
    Library("anthropic", "2.14", "use_anthropic.py", checks=(*THOUGHTS, *TOOLS, "tool runner")),
    Library("ollama", "0.6.3", "use_ollama.py"),
    Library("langchain-openai", "1.7", "use_langchain.py", "openai", _MANY, _NOT_READ),
    Library("langchain-openai, responses", "1.7", "use_langchain.py", "responses", _MANY),
    Library("langchain-deepseek", "1.1", "use_langchain.py", "deepseek", _MANY),
    Library("langchain-anthropic", "1.7", "use_langchain.py", "anthropic", _MANY),
    Library("langchain-ollama", "1.1", "use_langchain.py", "ollama", _MANY),
    Library("llama-index-llms-openai-like", "0.8", "use_llama_index.py", "openai-like", _MANY),
    Library("llama-index-llms-ollama", "0.11", "use_llama_index.py", "ollama", _MANY),
    Library(
        "llama-index-llms-anthropic",
        "0.12",
        "use_llama_index.py",
        "anthropic",
        _MANY,
        dict.fromkeys((*THOUGHTS, *TOOLS, "structure"), _CLAUDE),
    ),
    Library("litellm, hosted_vllm", "1.106", "use_litellm.py", "hosted_vllm", _MANY),
    Library("litellm, openai", "1.106", "use_litellm.py", "openai", _MANY),
    Library("litellm, anthropic", "1.106", "use_litellm.py", "anthropic", _MANY),
    Library("litellm, ollama_chat", "1.106", "use_litellm.py", "ollama_chat", _MANY),
    Library("instructor", "1.17", "use_instructor.py", "", _MANY, checks=("structure",)),
    Library("pydantic-ai, chat", "2.68", "use_pydantic_ai.py", "chat", _PYDANTIC),
    Library("pydantic-ai, responses", "2.68", "use_pydantic_ai.py", "responses", _PYDANTIC),
    Library(
        "pydantic-ai, anthropic",
        "2.68",
        "use_pydantic_ai.py",
        "anthropic",
        _PYDANTIC,
        dict.fromkeys(
            ("structure native", "structure with tools"), "NativeOutput is for Claude's names only"
        ),
    ),
    Library("pydantic-ai, ollama", "2.68", "use_pydantic_ai.py", "ollama", _PYDANTIC),
    Library("openai-agents, chat", "0.20", "use_openai_agents.py", "chat", _MANY),
    Library("openai-agents, responses", "0.20", "use_openai_agents.py", "responses", _MANY),
    Library(
        "smolagents",
        "1.26",
        "use_smolagents.py",
        "",
        _MANY,
        {"thinking streamed": "its streams have no place for a thought"},
        checks=(*THOUGHTS, *TOOLS, "code"),
    ),
    Library("openai (npm)", "6.49", "use_openai.mjs"),
    Library("@anthropic-ai/sdk", "1.14", "use_anthropic.mjs"),
    Library("ollama (npm)", "0.6.4", "use_ollama.mjs"),
    Library("ai, @ai-sdk/openai-compatible", "6.0", "use_ai.mjs", "compatible"),
    Library("ai, @ai-sdk/openai", "6.0", "use_ai.mjs", "openai"),
    Library("ai, @ai-sdk/anthropic", "6.0", "use_ai.mjs", "anthropic"),
]


def python_of(cache: pytest.Cache, requirements: str) -> Path:
    """A Python that has the packages of a file; skips the test where they cannot be had."""
    if not requirements:
        return Path(sys.executable)
    wanted = (PROGRAMS / requirements).read_text(encoding="utf-8")
    folder = Path(cache.mkdir(f"python-{Path(requirements).stem}"))
    python, done = folder / "bin" / "python", folder / "installed"
    if done.exists() and done.read_text(encoding="utf-8") == wanted:
        return python
    make = [sys.executable, "-m", "venv", "--clear", str(folder)]
    install = [str(python), "-m", "pip", "install", "-q", "-r", str(PROGRAMS / requirements)]
    for command in (make, install):
        found = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        if found.returncode:
            said = found.stderr.strip().splitlines() or ["no reason"]
            pytest.skip(f"{requirements} cannot be installed: {said[-1]}")
    done.write_text(wanted, encoding="utf-8")
    return python
