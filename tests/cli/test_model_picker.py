"""The model of a chat that names none: the one on this disk, or one picked from a list."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.cells import cell_len

import minicpm_mlx as mm
from minicpm_mlx import device
from minicpm_mlx.cli.chat import model_picker
from minicpm_mlx.cli.chat.input.menu import choose
from minicpm_mlx.cli.render.texts import Texts
from minicpm_mlx.lm import sessions
from minicpm_mlx.model_cards import cards
from support.hub import Hub
from support.terminal import CTRL_C, CTRL_D, ENTER, ESCAPE, UP, Terminal

DOWN, HOME, END = "\x1b[B", "\x1b[H", "\x1b[F"
OFFERED = sorted((c for c in cards().values() if c.offer), key=lambda card: card.offer or 0)
Keep = Callable[..., None]


@pytest.fixture
def keep(monkeypatch: pytest.MonkeyPatch) -> Keep:
    """Lets the models of these cards be on the disk, and conversations with others be saved."""

    def call(*names: str, talked: tuple[str, ...] = ()) -> None:
        here = {card.repo for card in map(cards().__getitem__, names)}
        monkeypatch.setattr(model_picker, "is_here", lambda card: card.repo in here)
        saved = [SimpleNamespace(model=model) for model in talked]
        monkeypatch.setattr(sessions, "listed", lambda: saved)

    return call


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The names in the list that is shown, which nothing is picked from."""
    shown: list[str] = []

    def leave(choices: list[model_picker.Choice], *_: object) -> None:
        shown[:] = [choice.card.name for choice in choices]

    monkeypatch.setattr(model_picker, "_pick", leave)

    def call() -> list[str]:
        assert model_picker.find_or_pick(Texts("en")) is None
        return shown

    return call


@pytest.mark.parametrize(
    ("kept", "talked", "taken"),
    [
        (["minicpm-2b-dpo", "minicpm-1b-sft"], ["minicpm-1b-sft"], "minicpm-2b-dpo"),
        (["minicpm-1b-sft"], ["demo"], "minicpm-1b-sft"),
        (
            ["minicpm-1b-sft", "minicpm-2b-sft"],
            ["demo", "./mine", "minicpm-2b-128k", "minicpm-2b-sft", "minicpm-1b-sft"],
            "minicpm-2b-sft",
        ),
    ],
    ids=["the default", "the only one", "the last used"],
)
def test_a_model_on_this_disk_is_taken_without_a_question(
    keep: Keep, kept: list[str], talked: list[str], taken: str
) -> None:
    keep(*kept, talked=tuple(talked))
    assert model_picker.find_or_pick(Texts("en")) == taken


def test_the_list_has_what_is_here_first_and_the_demo_last(
    keep: Keep, listed: Callable[[], list[str]]
) -> None:
    keep()
    assert listed() == [card.name for card in OFFERED]
    assert OFFERED[-1].name == "demo"
    keep("minicpm-1b-sft", "minicpm-2b-128k")
    assert set(listed()[:2]) == {"minicpm-1b-sft", "minicpm-2b-128k"}
    assert listed()[-1] == "demo"
    assert len(set(listed())) == len(listed())


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("width", [3, 39, 79, 159])
def test_the_list_fits_the_terminal(
    keep: Keep, monkeypatch: pytest.MonkeyPatch, language: str, width: int
) -> None:
    monkeypatch.setattr(device, "chip", lambda: "Apple M3 Max")
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    monkeypatch.setattr(device, "available_memory", lambda: 4_000_000_000)
    monkeypatch.setattr(model_picker, "_width", lambda: width)
    keep("minicpm-1b-sft", "minicpm-2b-128k")
    choices = model_picker._choices(model_picker._kept())
    for selected, choice in enumerate(choices):
        drawn, at = model_picker._drawn(choices, selected, Texts(language))
        lines = drawn.split("\n")
        assert max(map(cell_len, lines)) <= width
        if width >= 39:
            assert lines[at].startswith(f"> {selected + 1} {choice.card.name}")
            text = " ".join(line.strip() for line in lines)
            speed = f"{choice.forecast.expected_speed:.0f}"
            sizes = [choice.forecast.memory, *[choice.forecast.download] * (not choice.here)]
            for fact in (speed, *(f"{size / 1e9:.1f} GB" for size in sizes)):  # as in `list`
                assert fact in text
            assert ("too big" in text or "不够" in text) or width < 79


@pytest.mark.parametrize(
    ("keys", "taken"),
    [
        (ENTER, 1),
        (DOWN + DOWN + UP + ENTER, 2),
        ("jjk" + ENTER, 2),
        (HOME + ENTER, 0),
        (END + "j" + ENTER, 3),
        ("1k" + ENTER, 0),
        ("9" + ENTER, 3),
        ("0zw\x1b[200~q4\r\x1b[201~" + ENTER, 1),
        ("q", None),
        (CTRL_D, None),
        (ESCAPE, None),
    ],
)
def test_keys_choose(keys: str, taken: int | None) -> None:
    with create_pipe_input() as typed, create_app_session(input=typed, output=DummyOutput()):
        typed.send_text(keys)
        assert choose(lambda at: (f"{at}\n" * 4, at), 4, 1) == taken


def test_what_is_picked_is_downloaded_and_the_next_chat_asks_no_more(
    hub_server: Hub, tiny: mm.LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("HF_HUB_OFFLINE", "0"), ("MINICPM_MLX_HOME", "home"), ("HF_HOME", "hub")):
        monkeypatch.setenv(name, value if value == "0" else str(tmp_path / value))
    for name in ("HF_HUB_CACHE", "LC_ALL", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    first = next(card for card in OFFERED if card.bits is None)
    files = {path.name: path.read_bytes() for path in Path(str(tiny.folder)).iterdir()}
    hub_server.repos[str(first.repo)] = files
    hub_server.refuse[str(first.repo)] = (503, "")
    place = str(OFFERED.index(first) + 1)

    shell = Terminal("chat", "--max-tokens", "4")
    shell.wait("q leaves")
    shell.send(place + ENTER)
    shell.wait(f"{first.name} is not on this disk")
    shell.wait(f"> {place} {first.name}")  # with the error above
    hub_server.refuse.clear()
    shell.send(ENTER + "Hi" + ENTER)
    shell.wait(f"{first.name}\n")
    shell.wait("4 tokens")
    shell.say("/exit")
    assert (shell.status(), shell.echoes) == (0, True)
    shell.close()

    shell = Terminal("chat", TERM="dumb")
    shell.wait(f"{first.name}\n")
    shell.say("/exit")
    assert shell.status() == 0
    assert "Which model" not in shell.text
    shell.close()


@pytest.mark.parametrize(("keys", "status"), [("0\rx\rq\r", 0), (CTRL_C, 130)], ids=["q", "ctrl-c"])
def test_a_terminal_without_escape_sequences_asks_for_a_number(
    keys: str, status: int, tmp_path: Path
) -> None:
    environment = {"TERM": "dumb", "MINICPM_MLX_HOME": str(tmp_path), "HF_HOME": str(tmp_path)}
    shell = Terminal("chat", "--lang", "zh", **environment)
    shell.wait(f"1 {OFFERED[0].name}(.*\n)*.*输入 1 到 {len(OFFERED)}，回车选 .*：")
    shell.send(keys)
    assert (shell.status(), shell.echoes) == (status, True)
    assert b"\x1b" not in shell.raw
    shell.close()
