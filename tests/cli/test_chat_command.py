"""`minicpm-mlx chat`: in a real terminal, through a pipe, and turn by turn with a fake model."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

import minicpm_mlx as mm
from minicpm_mlx.cli import options
from minicpm_mlx.cli.chat import command
from minicpm_mlx.cli.chat.attachments import typed_path
from minicpm_mlx.cli.chat.conversation import Loading
from minicpm_mlx.cli.chat.conversation import TerminalChat as Conversation
from minicpm_mlx.cli.chat.line_editor import LineEditor
from minicpm_mlx.cli.main import main
from minicpm_mlx.cli.render import theme
from minicpm_mlx.cli.render.texts import Texts
from minicpm_mlx.engine import Session
from minicpm_mlx.errors import ContextLengthError, NumericsError
from support.fake_model import FakeLM
from support.terminal import ALT_ENTER, CODE, CTRL_C, CTRL_D, ENTER, PROMPT, STATS, UP, Terminal


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No colour or width that the machine running the tests asks for."""
    for name in ("FORCE_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    theme.console.cache_clear()


@pytest.fixture
def terminal(plain: None, demo_folder: Path) -> Iterator[Terminal]:
    opened = Terminal("chat", "--model", "demo", "--temp", "0", "--max-tokens", "400")
    yield opened
    opened.close()


# In a terminal


def test_a_conversation_in_a_terminal(terminal: Terminal) -> None:
    terminal.wait("demo\n")
    terminal.wait("Ctrl-C stops")
    terminal.wait(PROMPT)
    terminal.send("What is the capital of France?" + ENTER)
    terminal.wait(r"\nThe capital of France is Paris\.\n")
    tokens, first = map(int, terminal.wait(STATS).groups())
    assert (tokens, first) == (7, 44)

    terminal.wait(PROMPT)
    terminal.send("And what do people eat there? 用中文说" + ENTER)
    terminal.wait("用中文说")
    tokens, second = map(int, terminal.wait(STATS).groups())
    assert second > first + tokens  # the first turn is still there

    terminal.wait(PROMPT)
    terminal.send("/clear" + ENTER)
    terminal.wait("conversation cleared")
    terminal.wait(PROMPT)
    terminal.send(UP + UP + UP + ENTER)  # the first question again
    terminal.wait(r"\nThe capital of France is Paris\.\n")
    assert int(terminal.wait(STATS).group(2)) == first
    terminal.wait(PROMPT)
    terminal.send("/exit" + ENTER)
    assert terminal.status() == 0
    assert "Traceback" not in terminal.text


def test_ctrl_c_stops_a_reply_and_never_the_session(terminal: Terminal) -> None:
    terminal.wait("Ctrl-C stops")
    terminal.wait(PROMPT)
    terminal.send("half a line" + CTRL_C)
    terminal.wait(PROMPT)
    terminal.send("Tell me a very long story about" + ALT_ENTER + "a dragon" + ENTER)
    terminal.wait("dragon")
    terminal.wait(r"\n[A-Z]\w* \w+ \w+ ")  # some words of it
    terminal.send(CTRL_C)
    terminal.wait(r"\nstopped · \d+ tokens?\n")
    terminal.wait(PROMPT)
    terminal.send("/clear" + ENTER)
    terminal.wait("conversation cleared")
    terminal.wait(PROMPT)
    terminal.send("What is the capital of France?" + ENTER)
    terminal.wait(r"\nThe capital of France is Paris\.\n")
    terminal.wait(STATS)
    terminal.wait(PROMPT)
    terminal.send(CTRL_D)
    assert terminal.status() == 0
    assert "Traceback" not in terminal.text


@pytest.mark.parametrize(
    ("keys", "read"),
    [
        ("你好，世界" + ENTER, "你好，世界"),
        ("one" + ALT_ENTER + "two" + ENTER, "one\ntwo"),
        ("\x1b[200~one\ntwo\n\x1b[201~" + ENTER, "one\ntwo\n"),  # pasted
        ("half" + CTRL_C, ""),
        (CTRL_D, None),
        ('"""a' + ENTER + 'b"""' + ENTER, "a\nb"),
        ('\x1b[200~"""a\nb\x1b[201~' + ENTER, '"""a\nb'),
        ('\x1b[200~"""a\nb"""\n\x1b[201~' + ENTER, '"""a\nb"""\n'),
        ('\x1b[200~"""a\x1b[201~\x15"""b' + ENTER + '"""' + ENTER, "b"),
        ('see """' + ENTER, 'see """'),
    ],
    ids=[
        "chinese",
        "alt-enter",
        "pasted",
        "ctrl-c",
        "ctrl-d",
        "quotes",
        "quotes pasted",
        "quotes pasted at both ends",
        "quotes typed over what was pasted",
        "quotes within",
    ],
)
def test_what_is_typed_is_what_is_read(keys: str, read: str | None) -> None:
    with create_pipe_input() as typed, create_app_session(input=typed, output=DummyOutput()):
        typed.send_text(keys)
        prompt = LineEditor(None, [], lambda command: [])
        assert prompt.read() == read


def test_quotes_recalled_are_quotes_and_a_draft_is_sent_with_enter() -> None:
    with create_pipe_input() as typed, create_app_session(input=typed, output=DummyOutput()):
        prompt = LineEditor(None, [], lambda command: [])
        for keys, draft, read in (
            ('"""a' + ENTER + 'b"""' + ENTER, "", "a\nb"),
            (UP + ENTER, "", "a\nb"),
            ("!" + ENTER, '"""c', '"""c!'),
        ):
            typed.send_text(keys)
            assert prompt.read(draft) == read


# Through a pipe


def test_a_pipe_gets_plain_replies_alone(demo_folder: Path) -> None:
    arguments = ["chat", "--model", "demo", "--temp", "0", "--max-tokens", "12"]
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments],
        input="Hi\n\nWhat is 2+2?\n",
        capture_output=True,
        text=True,
        env={**os.environ, "FORCE_COLOR": "1"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert first.startswith("Hello")
    assert "four" in second or "4" in second
    assert "\x1b" not in done.stdout


# Turn by turn


Talk = Callable[..., tuple[mm.Chat, str]]


@pytest.fixture
def talk(capsys: pytest.CaptureFixture[str]) -> Talk:
    """Types `lines` to a fake model: the conversation, and what is shown."""

    def call(lm: FakeLM, *lines: str, system: str | None = None) -> tuple[mm.Chat, str]:
        make: Any = lambda lm: mm.Chat(lm, system=system)  # noqa: E731
        typed = iter(lines)
        conversation = Conversation(make, Loading(lambda: lm), Texts("en"), markdown=False)  # type: ignore[arg-type, return-value]
        conversation.loading.wait()
        command.converse(conversation, lambda: next(typed, None))
        return conversation.chat, capsys.readouterr().out

    return call


def roles(chat: mm.Chat) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in chat.messages]


def test_each_turn_is_asked_with_those_before_it(talk: Talk) -> None:
    lm = FakeLM(["One", "."], ["Two."])
    chat, out = talk(lm, "first", "", "  ", "second", system="Be brief.")
    assert [len(prompt) for prompt in lm.prompts] == [2, 4]
    assert all(prompt[0]["content"] == "Be brief." for prompt in lm.prompts)
    assert roles(chat)[2:] == [("user", "second"), ("assistant", "Two.")]
    assert out.splitlines() == [
        "One.",
        "2 tokens · 1.0 tok/s · first after 0.50 s · context 11/64 · 0.0 GB",
        "",
        "Two.",
        "1 token · first after 0.50 s · context 10/64 · 0.0 GB",
        "",
    ]


@pytest.mark.parametrize("leave", ["/exit", "/quit", " /exit "])
def test_leaving_asks_nothing_more(talk: Talk, leave: str) -> None:
    lm = FakeLM(["One."])
    talk(lm, "first", leave, "never")
    assert len(lm.prompts) == 1


def test_clear_forgets_the_turns_and_keeps_the_system_text(talk: Talk) -> None:
    lm = FakeLM(["One."], ["Two."])
    _, out = talk(lm, "first", "/clear", "second", system="Be brief.")
    assert [message["role"] for message in lm.prompts[1]] == ["system", "user"]
    assert "conversation cleared" in out


def test_an_unknown_command_is_named(talk: Talk) -> None:
    lm = FakeLM()
    _, out = talk(lm, "/wat")
    assert "no command /wat; /help lists them" in out
    assert lm.prompts == []


@pytest.mark.parametrize("line", ["/sytem Be brief.", "/atach notes.txt"])
def test_a_misspelled_command_is_not_said_to_the_model(talk: Talk, line: str) -> None:
    lm = FakeLM()
    _, out = talk(lm, line)
    assert f"no command {line.split()[0]}; /help lists them" in out
    assert lm.prompts == []


@pytest.mark.parametrize(
    ("typed", "path"),
    [
        ("notes.txt", "notes.txt"),
        ("my notes.txt", "my notes.txt"),
        ("'my notes.txt'", "my notes.txt"),
        (r"my\ notes.txt", "my notes.txt"),  # as a terminal writes a file dropped on it
        ("it's.txt", "it's.txt"),
        ("~nobody-here/x", "~nobody-here/x"),
    ],
)
def test_a_path_may_be_quoted(typed: str, path: str) -> None:
    assert typed_path(typed) == Path(path)


@pytest.mark.parametrize("text", ["/etc/hosts is what?", "/tmp is what?", "/usr/bin", "1/2"])
def test_text_that_holds_a_slash_is_no_command(talk: Talk, text: str) -> None:
    lm = FakeLM(["Yes."])
    talk(lm, text)
    assert lm.prompts[0][-1]["content"] == text


def test_a_reply_that_is_stopped_stays_as_far_as_it_came(talk: Talk) -> None:
    lm = FakeLM(["One", " two", KeyboardInterrupt()], ["Three."])
    chat, out = talk(lm, "first", "second")
    assert out.startswith("One two\nstopped · 2 tokens\n")
    assert roles(chat)[1] == ("assistant", "One two")
    assert len(chat.messages) == 4


def test_a_reply_stopped_before_its_first_word_leaves_no_trace(talk: Talk) -> None:
    lm = FakeLM([KeyboardInterrupt()], ["Two."])
    chat, _ = talk(lm, "first", "second")
    assert roles(chat) == [("user", "second"), ("assistant", "Two.")]


def test_a_turn_that_fails_is_reported_and_the_session_goes_on(talk: Talk) -> None:
    lm = FakeLM([NumericsError("the [model] produced NaN")], ["Two."])
    chat, out = talk(lm, "first", "second")
    assert "the [model] produced NaN\n\n" in out
    assert roles(chat) == [("user", "second"), ("assistant", "Two.")]


def test_a_full_context_says_what_to_do(talk: Talk) -> None:
    lm = FakeLM([ContextLengthError("the prompt has 70 tokens")])
    _, out = talk(lm, "first")
    assert "the prompt has 70 tokens\nthe context is full: /undo, /new or /set" in out


def test_a_card_whose_model_is_here_is_greeted_by_name(
    demo_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command._greet("demo", Texts("zh")) == "demo"
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "demo"
    assert "SmolLM2-135M-Instruct，仅供试用" in out


@pytest.mark.parametrize(("answer", "chosen"), [("t", "demo"), ("d", "minicpm-2b-dpo")])
def test_a_model_that_is_not_here_is_explained_and_offered(
    monkeypatch: pytest.MonkeyPatch, answer: str, chosen: str
) -> None:
    fetched: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: answer)
    monkeypatch.setattr(
        "minicpm_mlx.loading.store.folder_of", lambda card: fetched.append(card.name)
    )
    assert command._greet("minicpm-2b-dpo", Texts("en")) == chosen
    assert fetched == ([chosen] if answer == "d" else [])


def test_any_other_answer_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["", "yes", "?", "Q"])
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    with pytest.raises(typer.Exit):
        command._greet("minicpm-2b-dpo", Texts("en"))
    assert not list(answers)


def test_counts_are_singular_and_plural() -> None:
    english, chinese = Texts("en"), Texts("zh")
    assert [english.count("reply", n) for n in (0, 1, 2)] == ["0 replies", "1 reply", "2 replies"]
    assert [chinese.count("message", n) for n in (1, 2)] == ["1 条消息", "2 条消息"]


# With the demo in this process


def test_a_second_turn_reads_only_what_is_new(demo: mm.LM) -> None:
    chat = mm.Chat(demo, sampling=mm.Sampling(temperature=0), max_tokens=8)
    first = [piece.stats for piece in chat.reply("My name is Ada.")][-1]
    second = [piece.stats for piece in chat.reply("你好，what is my name?")][-1]
    assert first
    assert second
    assert first.cached_tokens == 0
    assert second.cached_tokens >= first.prompt_tokens + first.completion_tokens - 1
    assert chat.messages[2]["content"] == "你好，what is my name?"


def test_a_turn_after_a_stopped_one_is_as_if_nothing_was_cached(demo: mm.LM) -> None:
    chat = mm.Chat(demo, sampling=mm.Sampling(temperature=0), max_tokens=8)
    reply = chat.reply("Tell me a long story about a dragon.")
    said = "".join(next(reply).text for _ in range(4))
    reply.close()
    assert chat.messages[-1] == {"role": "assistant", "content": said}
    cached = "".join(piece.text for piece in chat.reply("Go on."))
    again = mm.Chat(demo, sampling=mm.Sampling(temperature=0), max_tokens=8)
    again.messages = chat.messages[:2]
    again.session = Session(demo.config)
    assert "".join(piece.text for piece in again.reply("Go on.")) == cached


def test_options_reach_the_conversation(
    demo: mm.LM,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(options, "load_model", lambda name, **_: demo)
    arguments = ["--temp", "0", "--max-tokens", "24", "--stop", " is"]
    monkeypatch.setattr(sys, "argv", ["minicpm-mlx", "chat", *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is the capital of France?\n"))
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code, *capsys.readouterr()) == (0, "The capital of France\n", "")
