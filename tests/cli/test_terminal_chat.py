"""`minicpm-mlx chat` in a real terminal, with the demo: its commands, keys, signals and ends."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import minicpm_mlx as mm
from support.scripted_model import write_scripted
from support.terminal import (
    ALT_ENTER,
    CTRL_C,
    CTRL_D,
    CTRL_E,
    CTRL_R,
    CTRL_X,
    ENTER,
    PROMPT,
    STATS,
    TAB,
    UP,
    Terminal,
    scripted,
)

FRANCE, PARIS = "What is the capital of France?", r"\nThe capital of France is Paris\.\n"
STORY = "Tell me a very long story about a dragon"
ADD = "Write a Python function that adds two numbers, in a code block."
WORDS = r"\n[A-Z][\w',]* [\w',]+ [\w',]+ "  # a long reply has begun
COLOUR = re.compile(rb"\x1b\[[0-9;]*[39][0-7][0-9;]*m")

SCRIPT = {
    FRANCE: "The capital of France is Paris.",
    STORY: "Once there was a dragon. " * 300,
    "user\n": "Well.",  # whatever is said
}

Open = Callable[..., Terminal]
Saved = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def folder(demo_folder: Path, tmp_path: Path) -> Path:
    """A cache of the test's own, with the demo in it."""
    home = tmp_path / "home"
    home.mkdir()
    (home / demo_folder.name).symlink_to(demo_folder)
    return home


@pytest.fixture
def chat(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens a chat with the demo in a terminal."""
    monkeypatch.setenv("MINICPM_MLX_HOME", str(folder))
    monkeypatch.setenv("LANG", "C.UTF-8")
    for name in ("LC_ALL", "LC_MESSAGES", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "VISUAL"):
        monkeypatch.delenv(name, raising=False)
    opened: list[Terminal] = []

    def call(
        *arguments: str, model: str | None = "demo", code: str | None = None, **environment: str
    ) -> Terminal:
        which = ["--model", model] if model else []
        options = ["--temp", "0", "--max-tokens", "200"]
        opened.append(Terminal("chat", *which, *options, *arguments, code=code, **environment))
        return opened[-1]

    yield call
    for terminal in opened:
        terminal.close()
        assert "Traceback" not in terminal.text


@pytest.fixture
def scripted_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What `chat` takes to open one with a model that says what `SCRIPT` has, in no time."""
    write_scripted(tmp_path / "teller", positions=8192)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    return {"model": str(tmp_path / "teller"), "code": scripted(SCRIPT)}


@pytest.fixture
def saved(folder: Path) -> Saved:
    """The sessions on disk."""

    def call() -> list[dict[str, Any]]:
        paths = sorted((folder / "sessions").glob("*.json"))
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths]

    return call


def converse(terminal: Terminal, lines: Iterable[tuple[str, str]]) -> None:
    """Types each line and waits for its answer, wherever its lines are broken."""
    for typed, answer in lines:
        terminal.say(typed)
        terminal.wait(answer.replace(" ", r"\s+"))


def finished(terminal: Terminal) -> int:
    terminal.say("/exit")
    status = terminal.status()
    assert terminal.echoes
    return status


# Commands


def test_commands_change_settings_and_turns(chat: Open, saved: Saved) -> None:
    shell = chat(PATH="")
    converse(
        shell,
        [
            ("/load nothing", r"no session 'nothing' in .*/sessions"),  # while the model loads
            ("/help", r"/attach \[FILE\|off\] +attach a text file\n(.*\n)*/exit +leave"),
            ("/wat", "no command /wat; /help lists them"),
            ("/system", "no system prompt"),
            ("/system Answer in English.", r"system prompt: Answer in English\."),
            ("/system off", "no system prompt"),
            ("/set temperature", r"temperature = 0\.0"),
            ("/set temperature hot", "temperature must be a number, got hot"),
            ("/set temperature nan", "temperature must be .*nan"),
            ("/set top_k 1.5", r"top_k must be a whole number, got 1\.5"),
            ("/set seed=none", "seed = -"),
            ("/set max_tokens 0", "max_tokens must be .*0"),
            ("/set max_tokens 30", "max_tokens = 30"),
            ("/set on_overflow sideways", "on_overflow must be one of stop, slide"),
            ("/set kv_bits 3", "kv_bits must be 8 or 4"),
            ("/set stop zebra", r'stop = \["zebra"\]'),
            ("/set kv_bits 8", "kv_bits = 8"),
            ("/set colour red", "no setting colour; the settings are temperature, top_p"),
            ("/undo", "there is no turn yet"),
            ("/copy", "there is no reply yet"),
            ("/sessions", "no saved sessions yet"),
            ("/resume", "no saved sessions yet"),
            ("/load", "usage: /load NAME"),
            ("/tokens Hello there", r"\n\d tokens"),
            ("/model", "model: demo"),
            ("/model nonsense", "nonsense"),
            ("/show", r"max_tokens +30\n(.*\n)*on_overflow +stop\nkv_bits +8"),
            (FRANCE, PARIS),
            (
                "/stats",
                r"1 reply, 7 tokens, [\d.]+ tok/s on average, 1\.0 tokens a pass\n"
                r"cache: \d+ tokens, .*in 8 bits",
            ),
            ("/tokens", r"\ncontext \d\d/8192"),
            ("/retry", PARIS),
            ("/copy", "copied"),
            ("/edit", r"What is the capital of France\?"),  # a draft
        ],
    )
    text = base64.b64encode(b"The capital of France is Paris.")
    assert b"\x1b]52;c;" + text + b"\x07" in shell.raw
    assert [len(session["messages"]) for session in saved()] == [2]  # until the other is sent
    assert saved()[0]["settings"]["kv_bits"] == 8
    shell.send("\x7f" * len("France?") + "Italy?" + ENTER)
    shell.wait(STATS)
    assert [m["content"] for m in saved()[0]["messages"][::2]] == ["What is the capital of Italy?"]
    converse(shell, [("/undo", r"taken back: What is the capital of Italy\?")])
    assert saved() == []
    converse(shell, [(FRANCE, PARIS), ("/clear", "conversation cleared")])
    assert saved() == []
    assert finished(shell) == 0


def test_sessions_are_saved_listed_and_resumed(
    chat: Open, folder: Path, tmp_path: Path, scripted_model: dict[str, str]
) -> None:
    sessions = folder / "sessions"
    shell = chat(**scripted_model)
    converse(
        shell,
        [
            (FRANCE, PARIS),
            ("/save first one", "saved as first one"),
            ("/save ../escape", "a session's name is"),
            (f"/save {tmp_path}/talk.md", "written to"),
            ("/save /nonexistent/talk.md", "talk.md: No such file"),
            ("/new", "a new conversation"),
            ("Say hello.", STATS),
        ],
    )
    assert "**You**\n\nWhat is the capital" in (tmp_path / "talk.md").read_text()
    shell.wait(PROMPT)
    shell.send("/load fir" + TAB)
    shell.wait("first one")
    shell.send(ENTER)
    shell.wait("first one: 2 messages")
    shell.resize(24, 80)
    converse(shell, [("/sessions", r"first one +2 messages +\d.* [kM]B +What is.*…\n")])
    newest = max(sessions.glob("2*.json"), key=lambda path: path.stat().st_mtime_ns)
    newer, current = newest.stem, "first one"
    for other in (newer, current, newer):  # the last one but that which is open
        converse(shell, [("/resume", f"{other}: 2 messages")])
        converse(shell, [("/system off", "no system prompt")])  # which is saved
    session = (sessions / "first one.json").read_text()
    (sessions / "odd.json").write_text(session.replace('"top_p": 1.0', '"top_p": 7'))
    converse(shell, [("/load odd", "top_p must be above 0"), ("/show", rf"session +{newer}\n")])
    assert '"top_p": 7' in (sessions / "odd.json").read_text()
    assert finished(shell) == 0
    assert "read" not in shell.text  # each cache was there

    again = chat("--resume", "first one", **{**scripted_model, "model": None})
    again.wait("first one: 2 messages")
    converse(again, [("And what is the capital of Italy?", STATS)])
    assert "read" not in again.text
    raw = json.loads((sessions / "first one.json").read_text())
    assert len(raw["messages"]) == 4
    (sessions / "other.json").write_text(
        json.dumps(raw | {"model": "minicpm-2b-dpo", "identity": "another"})
    )
    converse(again, [("/load other", "it was held with minicpm-2b-dpo"), ("Thank you.", STATS)])
    assert finished(again) == 0


def test_files_adapters_and_a_full_context(
    chat: Open, saved: Saved, demo_adapter: Path, tmp_path: Path
) -> None:
    notes, binary, long = tmp_path / "my notes.txt", tmp_path / "blob.bin", tmp_path / "long.txt"
    notes.write_text("\ufeffThe password is swordfish.\n", encoding="utf-8")
    binary.write_bytes(b"\xff\xfe\x00\x01")
    long.write_text("many words here " * 2400)
    (tmp_path / "huge.txt").write_text("many words here " * 60000)
    shell = chat("--max-tokens", "8")
    converse(
        shell,
        [
            (f"/attach {tmp_path}/missing.txt", "missing.txt: No such file"),
            (f"/attach {binary}", "not a text file in UTF-8"),
            ("/attach /dev/zero", "not a file"),
            ("/attach ~nobody-here/x", "No such file"),
            (f"/attach {tmp_path}/huge.txt", r"about 240000 tokens, but there is room"),
            (f"/attach '{notes}'", "my notes.txt: [0-9]+ tokens, sent with your next"),
            ("What is the password?", STATS),
            ("And now?", STATS),
        ],
    )
    first, second = (message["content"] for message in saved()[0]["messages"][::2])
    assert first.count("swordfish") == 1
    assert "\ufeff" not in first
    assert second == "And now?"
    converse(shell, [("/clear", "cleared"), (f"/attach {long}", "long.txt: 7[0-9]+ tokens")])
    shell.say("Sum it up.")
    time.sleep(1)  # it is being read
    shell.send(CTRL_C)
    shell.wait(r"\nstopped\n")
    assert saved() == []
    shell.wait(PROMPT + re.escape("Sum it up."))  # a draft
    shell.send(CTRL_C)
    converse(
        shell,
        [
            ("/attach off", "no file is attached any more"),
            (FRANCE, PARIS),
            ("/adapter", "no adapter\n"),
            (f"/adapter {tmp_path}", r"no adapter;\s+expected"),
            (f"/adapter {demo_adapter}", "adapter: "),
            ("/retry", STATS),
        ],
    )
    assert saved()[0]["adapter"] == str(demo_adapter)
    assert "Paris" not in saved()[0]["messages"][1]["content"]
    converse(
        shell,
        [
            ("/adapter off", "no adapter\n"),
            ("/retry", PARIS),
            ("/clear", "cleared"),
            ("/set max_tokens 60", "max_tokens = 60"),
            ("/set context 60", "context = 60"),
            (STORY, "the context is full: /undo"),
            ("Go on", "the conversation has [0-9]+ tokens and the context is 60"),
            ("/set on_overflow slide", "on_overflow = slide"),
            (STORY, "cut off: the context is full; the oldest turns .* next one the 2 oldest"),
        ],
    )
    assert finished(shell) == 0
    assert saved()[0]["adapter"] is None


# Keys


def test_what_is_typed_and_how(
    chat: Open, saved: Saved, tmp_path: Path, scripted_model: dict[str, str]
) -> None:
    editor = tmp_path / "editor"
    editor.write_text("#!/bin/sh\nprintf 'from the\\neditor' > \"$1\"\n")
    editor.chmod(0o755)
    shell = chat(EDITOR=str(editor), **scripted_model)
    shell.wait(PROMPT)
    shell.send("你好 😀 early" + ENTER)  # the model may still be loading
    shell.wait(STATS)
    for keys in (
        "\x1b[200~pasted\nlines\x1b[201~" + ENTER,
        "one" + ALT_ENTER + "two" + ENTER,
        '"""a' + ENTER + "b" + ENTER + 'c"""' + ENTER,
        CTRL_X + CTRL_E,
        "emoji 👩‍👩‍👧 e\u0301" + ENTER,
    ):
        shell.wait(PROMPT)
        shell.send(keys)
        if keys == CTRL_X + CTRL_E:
            shell.wait("editor")
            shell.send(ENTER)
        shell.wait(STATS)
    asked = [m["content"] for m in saved()[0]["messages"][::2]]
    assert asked == [
        "你好 😀 early",
        "pasted\nlines",
        "one\ntwo",
        "a\nb\nc",
        "from the\neditor",
        "emoji 👩‍👩‍👧 e\u0301",
    ]
    for keys, shown in [
        ("/cop" + TAB, "/copy"),
        ("/set tempe" + TAB, "/set temperature"),
        (f"/attach {tmp_path}/edi" + TAB, "editor"),
    ]:
        shell.wait(PROMPT)
        shell.send(keys)
        shell.wait(shown)
        shell.send(CTRL_C)
    shell.wait(PROMPT)
    shell.send("bytes \udcff here" + ENTER)  # no text in any encoding
    shell.wait("valid Unicode")
    shell.wait(PROMPT)
    shell.send(CTRL_C)
    shell.wait("press Ctrl-C again")
    shell.wait(PROMPT)
    shell.send(CTRL_C)
    assert shell.status() == 0
    assert shell.echoes

    again = chat(**scripted_model)
    again.wait(PROMPT)
    again.send(UP + UP)
    again.wait("emoji")
    again.send(CTRL_C)
    again.wait(PROMPT)
    again.send(CTRL_R + "early" + ENTER)
    again.wait(STATS)
    assert saved()[-1]["messages"][0]["content"] == "你好 😀 early"
    again.wait(PROMPT)
    again.send(CTRL_D)
    assert again.status() == 0


def test_a_reply_is_stopped_resized_and_typed_ahead_of(
    chat: Open, saved: Saved, scripted_model: dict[str, str]
) -> None:
    shell = chat("--max-tokens", "8000", **scripted_model)
    shell.say(STORY)
    shell.wait("still loading|" + WORDS)  # the line was taken: the key is a signal now
    shell.send(CTRL_C)
    shell.wait("stopped")
    shell.wait(PROMPT)
    shell.send(CTRL_C)  # a message stopped before its first word is a draft
    shell.say(STORY)
    shell.wait(WORDS)
    for columns in (20, 3, 200):
        shell.resize(10, columns)
        os.kill(shell.process.pid, signal.SIGWINCH)
        time.sleep(0.1)
    shell.send("typed ah\x1b[D\x1b[Dea")  # with arrow keys
    time.sleep(0.1)
    shell.send(CTRL_C)
    shell.wait(r"\nstopped · \d+ tokens?\n")
    shell.wait(PROMPT + "typed eaah")
    story = saved()[0]["messages"][-1]
    assert story["role"] == "assistant"
    assert len(story["content"]) > 20
    shell.send(CTRL_C)
    converse(shell, [("/clear", "cleared"), ("/set max_tokens 600", "max_tokens = 600")])
    shell.say(STORY)
    shell.wait(WORDS)
    assert shell.raw.rfind(b"\x1b[?2004h") > shell.raw.rfind(b"\x1b[?2004l")
    shell.send("\x1b[200~two\rlines\x1b[201~" + ENTER)
    shell.wait(STATS)
    shell.wait(STATS)
    assert [m["content"] for m in saved()[0]["messages"][::2]] == [STORY, "two\nlines"]
    assert finished(shell) == 0
    assert shell.raw.rfind(b"\x1b[?2004l") > shell.raw.rfind(b"\x1b[?2004h")


@pytest.mark.slow
def test_the_interface_in_chinese_and_without_colour(chat: Open) -> None:
    shell = chat("--max-tokens", "12", LANG="zh_CN.UTF-8", NO_COLOR="1")
    shell.wait("/help 列出命令")
    converse(
        shell,
        [
            ("/wat", "没有命令 /wat"),
            ("/attach /dev/zero", "/dev/zero：不是文件"),
            (STORY, "12 个词元 · .*\n达到 12 个词元上限"),
            ("/new", "新的对话"),
            (ADD, "def (.*\n)*.*个词元 · "),
        ],
    )
    assert finished(shell) == 0
    assert not COLOUR.search(shell.raw)


# Leaving, wanted or not


def test_a_chat_that_is_ended_is_saved_as_far_as_it_came(
    chat: Open, saved: Saved, scripted_model: dict[str, str]
) -> None:
    shell = chat("--max-tokens", "8000", **scripted_model)
    shell.say(STORY)
    shell.wait(WORDS)
    shell.process.terminate()
    assert shell.status() == 143
    assert shell.echoes
    assert len(saved()[0]["messages"][1]["content"]) > 10

    shell = chat("-c", "--max-tokens", "8000", **scripted_model)
    shell.wait("2 messages")
    shell.say(STORY)
    shell.wait(WORDS)
    assert shell.hang_up() == 129
    assert [len(session["messages"]) for session in saved()] == [4]
    assert "reads it again" not in shell.text

    shell = chat("-c", "--max-tokens", "8000", **scripted_model)
    shell.wait("4 messages")
    converse(shell, [(FRANCE, STATS)])
    shell.say(STORY)
    shell.wait(WORDS)
    shell.process.kill()  # in the middle of a reply
    shell.status()
    assert len(saved()[0]["messages"]) == 7

    shell = chat("-c", "--max-tokens", "8000", **scripted_model)
    shell.wait("6 messages")
    shell.wait(PROMPT + STORY)  # a draft
    shell.process.terminate()  # at the prompt, while the model loads
    assert shell.status() == 143
    assert shell.echoes


@pytest.mark.parametrize("keys", [CTRL_D, CTRL_C + CTRL_C], ids=["ctrl-d", "ctrl-c"])
def test_leaving_at_once_waits_for_nothing(chat: Open, keys: str, tiny: mm.LM) -> None:
    shell = chat(model=str(tiny.folder))
    shell.wait(PROMPT)
    shell.send(keys)
    assert shell.status() == 0
    assert "terminate" not in shell.text


# What cannot begin


def test_a_session_or_model_that_cannot_be_loaded_ends_the_chat(
    chat: Open, folder: Path, demo_folder: Path, tmp_path: Path
) -> None:
    sessions = folder / "sessions"
    sessions.mkdir()
    (sessions / "torn.json").write_text('{"format": 1, "messages": [')
    odd = {"format": 1, "messages": [], "model": "demo", "identity": "", "updated": ""}
    (sessions / "odd.json").write_text(json.dumps(odd | {"settings": {"top_p": 7}}))
    shell = chat("--resume", "torn")
    assert shell.status() == 1
    assert len(shell.text.splitlines()) == 1
    assert "torn.json: cannot be read" in shell.text
    shell = chat("--resume", "odd")
    shell.say("Hi")
    assert shell.status() == 1
    assert "odd.json: top_p" in shell.text
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in demo_folder.iterdir():
        data = path.read_bytes()
        (damaged / path.name).write_bytes(data[:5000] if path.suffix == ".safetensors" else data)
    shell = chat(model=str(damaged))
    shell.wait(PROMPT)
    shell.send("half a questi")
    assert shell.status() == 1
    assert shell.echoes
    assert re.search(r"\nminicpm-mlx: .*damaged.*\n", shell.text)


@pytest.mark.parametrize(("keys", "status"), [("q" + ENTER, 0), (CTRL_C, 130)], ids=["q", "ctrl-c"])
def test_a_download_can_be_declined(chat: Open, keys: str, status: int) -> None:
    shell = chat("--lang", "zh", model="minicpm-2b-dpo")
    shell.wait("还不在本机上(.*\n)*.*退出：")
    shell.send(keys)
    assert shell.status() == status
    assert shell.echoes


def test_keys_typed_before_a_question_is_shown_answer_it(chat: Open) -> None:
    shell = chat("--no-save", model="minicpm-2b-dpo")
    shell.send("x" + ENTER + "t" + ENTER + "/bye" + ENTER)  # no answer; the demo; the chat's prompt
    assert shell.status() == 0
    assert shell.text.count("quit: ") == 2
    assert shell.echoes


def test_the_demo_may_be_tried_plain_and_unsaved(chat: Open, folder: Path) -> None:
    shell = chat("--plain", "--no-save", "--max-tokens", "12", model="minicpm-2b-dpo")
    shell.wait(r"The download is 5\.5 GB(.*\n)*.*quit: ")
    shell.send("t" + ENTER)
    shell.wait("demo\n")
    shell.say(ADD)
    shell.wait("`{3}python")
    shell.wait(STATS)
    assert finished(shell) == 0
    assert COLOUR.search(shell.raw)  # that of the prompt
    assert [path.name for path in folder.iterdir() if "demo" not in path.name] == []
