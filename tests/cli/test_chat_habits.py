"""What people type who come from other programs, and settings that are read as they are shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

import minicpm_mlx as mm
from minicpm_mlx.cli.chat import command, slash_commands
from minicpm_mlx.cli.chat.conversation import Loading, TerminalChat
from minicpm_mlx.cli.chat.input.line_editor import LineEditor
from minicpm_mlx.cli.chat.settings import parse_setting, setting_text, settings
from minicpm_mlx.cli.render import theme
from minicpm_mlx.cli.render.texts import Texts
from minicpm_mlx.errors import ContextLengthError
from minicpm_mlx.lm import sessions
from support.fake_model import FakeLM
from support.terminal import CTRL_C, CTRL_R, ENTER

Talk = Callable[..., tuple[TerminalChat, str]]


@pytest.fixture
def talk(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Types `lines` to a fake model: the conversation, and what is shown."""
    for name in ("FORCE_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    theme.console.cache_clear()

    def call(*lines: str, lm: FakeLM | None = None, **options: Any) -> tuple[TerminalChat, str]:
        lm, sampling = lm or FakeLM(), options.pop("sampling", None)
        make: Any = lambda lm: mm.Chat(lm, sampling=sampling)  # noqa: E731
        loading: Any = Loading(lambda: lm, background=False)  # type: ignore[arg-type, return-value]
        terminal = TerminalChat(make, loading, Texts("en"), markdown=False, **options)
        assert terminal.chat
        typed = iter(lines)
        command.converse(terminal, lambda: next(typed, None))
        return terminal, capsys.readouterr().out

    return call


@pytest.mark.parametrize("word", ["/bye", "exit", "quit", "QUIT", " exit ", "退出"])
def test_words_of_other_programs_leave(talk: Talk, word: str) -> None:
    lm = FakeLM(["One."])
    talk(word, "never", lm=lm)
    assert lm.prompts == []


@pytest.mark.parametrize("text", ["exit the loop", "quit?", "How do I quit", "exit\nquit", "再见"])
def test_such_words_in_a_message_are_said_to_the_model(talk: Talk, text: str) -> None:
    lm = FakeLM(["One."])
    talk(text, lm=lm)
    assert lm.prompts[0][-1]["content"] == text


def test_a_question_mark_lists_the_commands(talk: Talk) -> None:
    _, out = talk("/?")
    assert "/bye" in out
    assert "/set NAME VALUE" in out


def test_ctrl_r_then_enter_sends_what_was_found() -> None:
    with create_pipe_input() as typed, create_app_session(input=typed, output=DummyOutput()):
        editor = LineEditor(None, [], lambda command: [])
        for keys, read in (
            ("first question" + ENTER, "first question"),
            ("second" + ENTER, "second"),
            (CTRL_R + "first" + ENTER, "first question"),
            (CTRL_R + "no such" + ENTER + CTRL_C, None),  # nothing found, nothing sent
            ("draft" + CTRL_R + "second" + ENTER, "second"),
        ):
            typed.send_text(keys)
            try:
                assert editor.read() == read
            except KeyboardInterrupt:
                assert read is None


# Settings


@pytest.mark.parametrize(
    ("typed", "name", "value"),
    [
        ("stop ###", "stop", ["###"]),
        ("stop \\n\\n", "stop", ["\n\n"]),
        ('stop "User:" "\\n\\n"', "stop", ["User:", "\n\n"]),
        ('stop ["a", "停"]', "stop", ["a", "停"]),
        ("stop [INST]", "stop", ["[INST]"]),
        ("stop none", "stop", []),
        ("parameter seed 7", "seed", 7),
        ("temp 0.5", "temperature", 0.5),
        ("repetition-penalty=1.1", "repetition_penalty", 1.1),
        ("seed -", "seed", None),
        ('logit_bias {"5": -1.5}', "logit_bias", {5: -1.5}),
    ],
)
def test_a_setting_is_set(talk: Talk, typed: str, name: str, value: object) -> None:
    terminal, _ = talk(f"/set {typed}")
    assert settings(terminal.chat)[name] == value


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ('stop "open', 'stop takes one text, or several in quotes: "a" "b"'),
        ("stop [1, 2]", "stop takes one text"),
        ("logit_bias 5", "logit_bias takes token ids with numbers"),
        ("temperature -", "temperature must be a number, got -"),
    ],
)
def test_a_value_of_another_kind_is_explained(talk: Talk, typed: str, said: str) -> None:
    terminal, out = talk(f"/set {typed}")
    assert said in out
    assert list(terminal.chat.stop) == []


def test_each_setting_can_be_set_as_it_is_shown(talk: Talk) -> None:
    sampling = mm.Sampling(temperature=0.7, top_k=40, seed=3, logit_bias={5: -1.5})
    terminal, out = talk(
        '/set stop "a\\nb" "停"',
        "/set max_tokens 30",
        "/set on_overflow slide",
        "/show",
        sampling=sampling,
    )
    shown = dict(line.split(maxsplit=1) for line in out.splitlines() if line[20:21] == " ")
    before = settings(terminal.chat)
    assert before.keys() <= shown.keys()
    assert {name: parse_setting(name, shown[name]) for name in before} == before
    _, out = talk(f"/set system {shown['system']}", "/set system Be brief.", "/show")
    assert "no system prompt" in out
    assert "Be brief." in out


@given(
    st.lists(st.text(min_size=1, max_size=8), max_size=3),
    st.dictionaries(st.integers(0, 99), st.floats(-100, 100), max_size=3),
    st.none() | st.integers(0, 2**64 - 1),
    st.floats(0, 100),
)
def test_every_value_is_read_as_it_is_shown(
    stop: list[str], bias: dict[int, float], seed: int | None, temperature: float
) -> None:
    values = {"stop": stop, "logit_bias": bias, "seed": seed, "temperature": temperature}
    for name, value in values.items():
        assert parse_setting(name, setting_text(value)) == value


# Another model


@pytest.fixture
def another(monkeypatch: pytest.MonkeyPatch) -> FakeLM:
    """A model with sampling of its own, that /model finds."""
    lm = FakeLM()
    lm.sampling = mm.Sampling(temperature=0.9, top_p=0.8)
    lm.card.name = "another"
    monkeypatch.setattr(slash_commands.model_cards, "resolve", lambda text: lm.card)
    return lm


def test_another_model_keeps_the_users_sampling_and_says_so(talk: Talk, another: FakeLM) -> None:
    terminal, out = talk(
        "/set top_k 5",
        "/set temperature 0",  # which is this model's too
        "/model another",
        load=lambda name: another,
        changes={"seed": 4, "top_p": None},
        sampling=mm.Sampling(seed=4),
    )
    expected = asdict(another.sampling) | {"top_k": 5, "temperature": 0.0, "seed": 4}
    assert asdict(terminal.chat.sampling) == expected  # type: ignore[arg-type]
    assert "your settings stay: temperature = 0.0, top_k = 5, seed = 4" in out


def test_another_model_has_its_own_sampling_where_the_user_set_none(
    talk: Talk, another: FakeLM
) -> None:
    terminal, out = talk("/model another", load=lambda name: another)
    assert terminal.chat.sampling is None
    assert "settings stay" not in out


def test_another_model_says_what_it_does_without(talk: Talk, another: FakeLM) -> None:
    lm: Any = FakeLM()
    lm.adapter, lm.draft = "pirate", FakeLM()
    _, out = talk("/model another", lm=lm, load=lambda name: another)
    assert "without the adapter pirate" in out
    assert "without the draft model" in out


# A context that is full


def test_a_long_system_text_is_named_and_not_the_message(talk: Talk, demo: mm.LM) -> None:
    terminal, out = talk("/set context 60", "/system" + " word" * 90, "Hi", lm=demo)  # type: ignore[arg-type]
    assert "this message alone" not in out
    assert "the system prompt has 90 tokens" in " ".join(out.split())
    assert "/system off" in out
    chat = terminal.chat
    with pytest.raises(ContextLengthError, match="the system text has 90 tokens and with"):
        next(chat.reply("Hi"))
    chat.system = None
    with pytest.raises(ContextLengthError, match="this message alone"):
        next(chat.reply(" word" * 90))


# Sessions


def test_sessions_are_listed_with_sizes_and_deleted(
    talk: Talk, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINICPM_MLX_HOME", str(tmp_path))
    raw = {"format": 1, "messages": [], "model": "demo", "identity": "", "updated": ""}
    sessions.directory().mkdir()
    for name in ("now", "old one"):
        sessions.path_of(name).write_text(json.dumps(raw))
    sessions.cache_path("old one").write_bytes(b"x" * 5000)
    _, out = talk(
        "/sessions",
        "/sessions delete now",
        "/sessions delete ../now",
        "/sessions delete old",
        "/sessions delete old one",
        "/sessions drop old one",
        name="now",
    )
    assert "5.08 kB" in out
    assert "KV caches: 5 kB of at most 4 GB" in out
    assert "now is this conversation" in out
    assert "a session's name is" in out
    assert "the nearest are 'old one'" in out
    assert "old one deleted, 5.08 kB" in out
    assert "usage: /sessions [delete NAME]" in out
    assert [path.name for path in sessions.directory().iterdir()] == ["now.json"]
