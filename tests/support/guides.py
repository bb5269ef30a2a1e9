"""The guides in docs/: their commands, options, tables and blocks of code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

DOCS = Path(__file__).parents[2] / "docs"
GUIDE = "server.md"
HERE = "http://127.0.0.1:8080"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@cache
def text(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def commands(name: str) -> list[list[str]]:
    """The arguments of every `minicpm-mlx …`, in a block or within a sentence."""
    lines = re.findall(r"^\$ minicpm-mlx (.*)$|`minicpm-mlx ([^`]+)`", text(name), re.MULTILINE)
    return [shlex.split(block or inline, comments=True) for block, inline in lines]


@cache
def cli() -> Any:
    import typer

    from minicpm_mlx.cli.main import app

    return typer.main.get_command(app)


def parsed(arguments: list[str]) -> Iterator[dict[str, Any]]:
    """What the command line makes of them, and of the command that is launched; nothing runs."""
    name, *rest = arguments
    command = cli().commands[name]
    if rest and rest[0] in getattr(command, "commands", {}):
        name, *rest = rest
        command = command.commands[name]
    with patch("minicpm_mlx.cli.paths.apply"):  # the files of the guides are not here
        parameters: dict[str, Any] = command.make_context(name, rest).params
    yield parameters
    if name == "launch":
        yield from parsed(parameters["command"])


def options(group: Any = None) -> set[str]:
    """The options of all commands."""
    found = set()
    for command in (group or cli()).commands.values():
        for parameter in command.params:
            found |= {*parameter.opts, *parameter.secondary_opts}
        if hasattr(command, "commands"):
            found |= options(command)
    return found


def rows(name: str, pattern: str) -> list[list[str]]:
    """The cells of the tables' lines that begin so."""
    found = re.findall(rf"^\| ({pattern} \|.*) \|$", text(name), re.MULTILINE)
    return [row.split(" | ") for row in found]


def spans(content: str) -> list[str]:
    """What is set as code within a line."""
    return re.findall(r"`([^`\n]+)`", content)


def blocks(language: str, name: str = GUIDE) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text(name), re.DOTALL | re.MULTILINE)
