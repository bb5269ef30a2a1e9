"""The READMEs' commands and examples are real, and the same in both languages."""

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


def test_both_languages_give_the_same_commands_and_code() -> None:
    english, chinese = (blocks(name, "sh") for name in READMES)
    assert english == chinese
    assert len(english) == 2
    english, chinese = (re.sub("#.*", "", "".join(blocks(name, "python"))) for name in READMES)
    assert english == chinese


def test_no_installation_replaces_an_editable_one() -> None:
    """Neither in the guides nor in what the program says: `pip install .` would copy this tree."""
    sources = [*(ROOT / "minicpm_mlx").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]
    sources += [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("models/*.toml")]
    here = re.compile(r"pip install((?: -\S+)*) [\"']?\.(?=[\[\s/\"'`]|$)")
    commands = [found for path in sources for found in here.findall(path.read_text("utf-8"))]
    assert len(commands) > 20
    assert {*commands} == {" -e"}


def test_first_python_example_runs(demo: Any, capsys: Any) -> None:
    example = re.sub("max_tokens=(32|64)", "max_tokens=8", blocks("README.md", "python")[0])
    exec(compile(example, "README.md", "exec"), {})
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


def test_conversation_shown_is_what_the_demo_says(demo: Any) -> None:
    english, chinese = (
        re.findall(r"^> ([^/].*)\n(.*)$", blocks(name, "text")[0], re.MULTILINE) for name in READMES
    )
    assert english == chinese
    chat = mm.Chat(demo, sampling=mm.Sampling())
    for question, reply in english:
        assert "".join(piece.text for piece in chat.reply(question)) == reply
