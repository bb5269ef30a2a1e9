"""The READMEs' commands and examples are real."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import minicpm_mlx as mm

ROOT = Path(__file__).parents[2]
READMES = ["README.md", "README_zh.md"]


def blocks(name: str, language: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_both_readmes_give_the_same_two_commands_which_ci_runs() -> None:
    english, chinese = (blocks(name, "sh") for name in READMES)
    assert english == chinese
    assert len(english) == 2


@pytest.mark.parametrize("name", READMES)
def test_first_python_example_runs_as_it_is(name: str, demo: Any, capsys: Any) -> None:
    exec(compile(blocks(name, "python")[0], name, "exec"), {})
    assert len(capsys.readouterr().out) > 40


@pytest.mark.parametrize("name", READMES)
def test_family_table_names_every_card(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    named: set[str] = set()
    for row in rows:
        cards = re.findall(r"`([^`]+)`", row)
        stem = next(card for card in cards if not card.startswith("-")).removesuffix("-bf16")
        named |= {stem + card if card.startswith("-") else card for card in cards}
    assert named == set(mm.cards())


@pytest.mark.parametrize("name", READMES)
def test_conversation_shown_is_what_the_demo_says(name: str, demo: Any) -> None:
    shown = blocks(name, "text")[0]
    chat = mm.Chat(demo, sampling=mm.Sampling())
    for question, reply in re.findall(r"^> ([^/].*)\n(.*)$", shown, re.MULTILINE):
        assert "".join(piece.text for piece in chat.reply(question)) == reply
