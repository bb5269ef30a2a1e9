"""`minicpm-mlx chat` in this process: keys, turns with a fake model, and pipes with the demo."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

import minicpm_mlx as mm
from minicpm_mlx.cli import options
from minicpm_mlx.cli.chat import command as chat_command
from minicpm_mlx.cli.chat.attachments import typed_path
from minicpm_mlx.cli.chat.conversation import Loading
from minicpm_mlx.cli.chat.conversation import TerminalChat as Conversation
from minicpm_mlx.cli.chat.input.line_editor import LineEditor
from minicpm_mlx.cli.render import theme
from minicpm_mlx.cli.render.texts import Texts
from minicpm_mlx.errors import ContextLengthError, NumericsError
from minicpm_mlx.lm import sessions
from support.fake_model import FakeLM
from support.terminal import ALT_ENTER, CTRL_C, CTRL_D, ENTER, UP


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No colour or width that the machine running the tests asks for."""
    for name in ("FORCE_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    theme.console.cache_clear()


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
        chat_command.converse(conversation, lambda: next(typed, None))
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
    assert chat_command._greet("demo", Texts("zh")) == "demo"
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "demo"
    assert "SmolLM2-135M-Instruct，仅供试用" in out


@pytest.mark.parametrize(("answer", "chosen"), [("t", "demo"), ("d", "minicpm-2b-dpo")])
def test_a_model_that_is_not_here_is_explained_and_offered(
    monkeypatch: pytest.MonkeyPatch, answer: str, chosen: str
) -> None:
    fetched: list[str] = []
    monkeypatch.setattr(chat_command, "ask", lambda question, file: answer)
    monkeypatch.setattr(
        "minicpm_mlx.cli.chat.command.folder_of", lambda card: fetched.append(card.name)
    )
    assert chat_command._greet("minicpm-2b-dpo", Texts("en")) == chosen
    assert fetched == ([chosen] if answer == "d" else [])


def test_any_other_answer_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["", "yes", "?", "Q"])
    monkeypatch.setattr(chat_command, "ask", lambda question, file: next(answers))
    with pytest.raises(typer.Exit):
        chat_command._greet("minicpm-2b-dpo", Texts("en"))
    assert not list(answers)


def test_counts_are_singular_and_plural() -> None:
    english, chinese = Texts("en"), Texts("zh")
    assert [english.count("reply", n) for n in (0, 1, 2)] == ["0 replies", "1 reply", "2 replies"]
    assert [chinese.count("message", n) for n in (1, 2)] == ["1 条消息", "2 条消息"]


# Through a pipe, with the demo in this process

FRANCE, PARIS = "What is the capital of France?", "The capital of France is Paris.\n"

Pipe = Callable[..., tuple[int, str, str]]


@pytest.fixture
def piped(
    demo: mm.LM,
    tmp_path: Path,
    command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Pipe:
    """Runs `chat` with its standard input: status, stdout, stderr."""
    monkeypatch.setenv("MINICPM_MLX_HOME", str(tmp_path))
    monkeypatch.setattr(options, "load_model", lambda name, **_: demo)

    def call(*arguments: str, typed: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        status = command("chat", "--temp", "0", "--max-tokens", "12", *arguments)
        return status, *capsys.readouterr()

    return call


def test_a_pipe_gets_plain_replies_alone(piped: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert piped("-p", FRANCE) == (0, PARIS, "")
    assert piped("-p", "-", typed=FRANCE) == (0, PARIS, "")
    assert piped("--stop", " is", typed=f"{FRANCE}\n") == (0, "The capital of France\n", "")
    status, out, err = piped(typed="Hi\n\nWhat is 2+2?\n/exit\nnever")
    assert (status, err) == (0, "")
    first, second = out.splitlines()
    assert first.startswith("Hello")
    assert "four" in second or "4" in second
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--kv-bits", "3"), "--kv-bits must be 8 or 4, got 3"),
        (("--on-overflow", "no"), "--on-overflow must be stop or slide, got 'no'"),
        (("--context", "0"), "--context must be 1 or more, got 0"),
        (("--max-tokens", "0"), "--max-tokens must be 1 or more, got 0"),
        (("--lang", "fr"), "--lang must be en or zh, got 'fr'"),
        (("--top-p", "7"), "--top-p must be"),
        (("-p", " \n"), "the prompt is empty"),
        (("-c", "--no-save"), "--no-save contradicts --resume and --continue"),
        (("-c",), "no saved session in"),
    ],
)
def test_options_are_refused_before_anything_is_asked(
    piped: Pipe, arguments: tuple[str, ...], message: str
) -> None:
    status, out, err = piped("-p", "x", *arguments)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert message in err


def test_a_pipe_resumes_a_session_if_told_to(piped: Pipe, demo: mm.LM) -> None:
    assert piped("-p", FRANCE)[0] == 0
    assert sessions.listed() == []
    chat = mm.Chat(demo, max_tokens=2)
    list(chat.reply(FRANCE))
    sessions.save(chat, "talk")
    assert piped("-c", "-p", "And of Italy?")[0] == 0
    assert piped("--resume", "talk", typed="And of Spain?\nThank you.\n")[::2] == (0, "")
    (saved,) = sessions.listed()
    questions = [message["content"] for message in saved.messages[::2]]
    assert questions == [FRANCE, "And of Italy?", "And of Spain?", "Thank you."]
    status, _, err = piped("--resume", "nothing", "-p", "x")
    assert (status, err.count("\n")) == (1, 1)
    assert "the nearest are 'talk'" in err
