"""The guides in docs/: their commands, options and tables."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from minicpm_mlx.cli.main import app

if TYPE_CHECKING:
    pass

DOCS = Path(__file__).parents[2] / "docs"


SHAPE = {
    "hidden_size": 2304,
    "intermediate_size": 5760,
    "num_attention_heads": 36,
    "num_key_value_heads": 36,
    "num_hidden_layers": 40,
    "vocab_size": 122753,
    "max_position_embeddings": 4096,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 256,
    "architectures": ["MiniCPMForCausalLM"],
    "quantization": {"group_size": 64, "bits": 4},
}
"""MiniCPM-2B, as its default card packs it."""


def text(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def commands(name: str) -> list[list[str]]:
    """The arguments of every `minicpm-mlx …`, in a block or within a sentence."""
    lines = re.findall(r"^\$ minicpm-mlx (.*)$|`minicpm-mlx ([^`]+)`", text(name), re.MULTILINE)
    return [shlex.split(block or inline, comments=True) for block, inline in lines]


def parsed(arguments: list[str]) -> Iterator[dict[str, Any]]:
    """What the command line makes of them, and of the command that is launched; nothing runs."""
    group: Any = typer.main.get_command(app)
    name, *rest = arguments
    found: dict[str, Any] = group.commands[name].make_context(name, rest).params
    yield found
    if name == "launch":
        yield from parsed(found["command"])


def options() -> set[str]:
    group: Any = typer.main.get_command(app)
    return {
        option
        for command in group.commands.values()
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }


def rows(name: str, pattern: str) -> list[list[str]]:
    """The cells of the tables' lines that begin so."""
    found = re.findall(rf"^\| ({pattern} \|.*) \|$", text(name), re.MULTILINE)
    return [row.split(" | ") for row in found]


GUIDE = "server.md"


HERE = "http://127.0.0.1:8080"


QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def blocks(language: str, name: str = GUIDE) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", text(name), re.DOTALL | re.MULTILINE)
    assert found
    return found
