"""JSON output: one system of units, and nothing that is 0 or false left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer.main

from minicpm_mlx import model_cards
from minicpm_mlx.cli.main import app

Command = Callable[..., int]
Out = pytest.CaptureFixture[str]

OTHER_UNITS = ("_gb", "_mb", "_kb", "_gib", "_ms", "_ns", "_pct", "percent")


def keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    for item in value if isinstance(value, list) else ():
        yield from keys(item)


@pytest.mark.parametrize(
    "line",
    [
        "list",
        "show demo",
        "doctor",
        "sessions",
        "generate -m demo -p Hi --max-tokens 2",
        "ppl -m demo --text {text}",
    ],
)
def test_json_has_bytes_seconds_and_shares_alone(
    command: Command, capsys: Out, demo_folder: Path, tmp_path: Path, line: str
) -> None:
    text = tmp_path / "text"
    text.write_text("The capital of France is Paris.")
    assert command(*line.format(text=text).split(), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert not [key for key in keys(found) if key.endswith(OTHER_UNITS)]


def test_memory_is_said_in_bytes(command: Command, capsys: Out, demo_folder: Path) -> None:
    assert command("doctor", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["memory_bytes"] >= facts["available_bytes"] > 1e7
    assert facts["cache"] == facts["data"]  # MINICPM_MLX_HOME is set
    demo = facts["models"]["demo"]
    assert {"weights_bytes", "cache_bytes", "working_bytes", "context", "fits"} < set(demo)
    assert command("show", "demo", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    size = sum(file.stat().st_size for file in demo_folder.iterdir())
    assert (facts["kept_bytes"], facts["download_bytes"]) == (size, 100_000_000)


def test_a_temperature_of_0_and_what_is_false_are_shown(
    command: Command, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = replace(model_cards.cards()["minicpm-2b-sft-bf16"], temperature=0.0)
    monkeypatch.setattr("minicpm_mlx.cli.models.manage.resolve", lambda name: card)
    assert command("show", card.name, "--json") == 0
    assert json.loads(capsys.readouterr().out)["temperature"] == 0
    assert command("show", card.name) == 0
    assert "temperature" in capsys.readouterr().out


def test_help_says_whether_json_is_an_array(command: Command, capsys: Out) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name in ("list", "sessions", "show"):
        option = next(p for p in commands[name].params if p.name == "as_json")
        assert command(name, *["demo"] * (name == "show"), "--json") == 0
        is_array = isinstance(json.loads(capsys.readouterr().out), list)
        assert ("array" in option.help) == is_array, name
