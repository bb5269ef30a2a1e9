"""`minicpm-mlx chat` as a person uses it: every command and key, and every way to leave."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.terminal import (
    ALT_ENTER,
    CODE,
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
)

FRANCE, PARIS = "What is the capital of France?", r"\nThe capital of France is Paris\.\n"
STORY = "Tell me a very long story about a dragon"
WORDS = r"\n[A-Z][\w',]* [\w',]+ [\w',]+ "  # a long reply has begun
COLOUR = re.compile(rb"\x1b\[[0-9;]*[39][0-7][0-9;]*m")

Open = Callable[..., Terminal]


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

    def call(*arguments: str, model: str | None = "demo", **environment: str) -> Terminal:
        which = ["--model", model] if model else []
        how = ["--temp", "0", "--max-tokens", "200"]
        opened.append(Terminal("chat", *which, *how, *arguments, **environment))
        return opened[-1]

    yield call
    for terminal in opened:
        terminal.close()
        assert "Traceback" not in terminal.text


@pytest.fixture
def saved(folder: Path) -> Callable[[], list[dict[str, Any]]]:
    """The sessions on disk."""

    def call() -> list[dict[str, Any]]:
        found = sorted((folder / "sessions").glob("*.json"))
        return [json.loads(path.read_text(encoding="utf-8")) for path in found]

    return call


Saved = Callable[[], list[dict[str, Any]]]


def wrapped(pattern: str) -> str:
    """The pattern wherever its lines are broken."""
    return pattern.replace(" ", r"\s+")


def finished(terminal: Terminal) -> int:
    terminal.say("/exit")
    status = terminal.status()
    assert terminal.echoes
    return status


def piped(*arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    how = ["chat", "--model", "demo", "--temp", "0", "--max-tokens", "12"]
    program = [sys.executable, "-c", CODE, *how, *arguments]
    return subprocess.run(program, input=typed, capture_output=True, text=True)


# Commands


def test_settings_and_the_system_text(chat: Open, saved: Saved) -> None:
    shell = chat()
    for typed, answer in [
        ("/load nothing", r"no session 'nothing' in .*/sessions"),  # while the model still loads
        ("/help", r"/attach \[FILE\|off\] +attach a text file\n(.*\n)*/exit +leave"),
        ("/wat", "no command /wat; /help lists them"),
        ("/sytem Be brief.", "no command /sytem"),
        ("/system", "no system prompt"),
        ("/system Answer in English.", r"system prompt: Answer in English\."),
        ("/system off", "no system prompt"),
        ("/set temperature", r"temperature = 0\.0"),
        ("/set temperature 0.0", r"temperature = 0\.0"),
        ("/set temperature hot", "temperature must be a number, got hot"),
        ("/set temperature -1", "temperature must be .*-1"),
        ("/set temperature nan", "temperature must be .*nan"),
        ("/set top_k 1.5", r"top_k must be a whole number, got 1\.5"),
        ("/set seed=none", "seed = -"),
        ("/SET", "no command /SET"),
        ("/set Top_P 0.9", r"top_p = 0\.9"),
        ("/set top_p 1", r"top_p = 1\.0"),
        ("/set max_tokens 0", "max_tokens must be .*0"),
        ("/set max_tokens 30", "max_tokens = 30"),
        ("/set on_overflow sideways", "on_overflow must be one of stop, slide"),
        ("/set on_overflow slide", "on_overflow = slide"),
        ("/set kv_bits 3", "kv_bits must be 8 or 4"),
        ("/set kv_bits 8", "kv_bits = 8"),
        ("/set colour red", "no setting colour; the settings are temperature, top_p"),
        ("/undo", "there is no turn yet"),
        ("/retry", "there is no turn yet"),
        ("/edit", "there is no turn yet"),
        ("/copy", "there is no reply yet"),
        ("/sessions", "no saved sessions yet"),
        ("/resume", "no saved sessions yet"),
        ("/load", "usage: /load NAME"),
        ("/attach", "no file is attached"),
        ("/tokens Hello there", r"\n\d tokens"),
        ("/model", "model: demo"),
        ("/model nonsense", "nonsense"),
        ("/show", r"max_tokens +30\n(.*\n)*on_overflow +slide\nkv_bits +8"),
        (FRANCE, PARIS),
        (
            "/stats",
            r"1 reply, 7 tokens, [\d.]+ tok/s on average, .*\ncache: \d+ tokens, .*in 8 bits",
        ),
        ("/tokens", r"\ncontext \d\d/8192"),
    ]:
        shell.say(typed)
        shell.wait(wrapped(answer))
    assert finished(shell) == 0
    assert saved()[0]["settings"]["kv_bits"] == 8


def test_turns_are_taken_back_answered_anew_and_changed(chat: Open, saved: Saved) -> None:
    shell = chat(PATH="")
    shell.say(FRANCE)
    shell.wait(PARIS)
    shell.say("/retry")
    shell.wait(PARIS)
    assert [len(session["messages"]) for session in saved()] == [2]
    shell.say("/copy")
    shell.wait("copied")
    text = base64.b64encode(b"The capital of France is Paris.")
    assert b"\x1b]52;c;" + text + b"\x07" in shell.raw
    shell.say("/edit")
    shell.wait(re.escape(FRANCE))  # a draft
    assert len(saved()[0]["messages"]) == 2  # until the other is sent
    shell.send("\x7f" * len("France?") + "Italy?" + ENTER)
    shell.wait(STATS)
    assert [m["content"] for m in saved()[0]["messages"][::2]] == ["What is the capital of Italy?"]
    shell.say("/undo")
    shell.wait(r"taken back: What is the capital of Italy\?")
    assert saved() == []
    shell.say(FRANCE)
    shell.wait(PARIS)
    shell.say("/clear")
    shell.wait("conversation cleared")
    assert saved() == []
    assert finished(shell) == 0


def test_sessions_are_saved_listed_and_gone_on_with(
    chat: Open, folder: Path, tmp_path: Path
) -> None:
    sessions = folder / "sessions"
    shell = chat()
    shell.say(FRANCE)
    shell.wait(PARIS)
    shell.say("/save first one")
    shell.wait("saved as first one")
    shell.say("/save ../escape")
    shell.wait(wrapped("a session's name is"))
    shell.say(f"/save {tmp_path}/talk.md")
    shell.wait("written to")
    assert "**You**\n\nWhat is the capital" in (tmp_path / "talk.md").read_text()
    shell.say("/save /nonexistent/talk.md")
    shell.wait("talk.md: No such file")
    shell.say("/new")
    shell.wait("a new conversation")
    shell.say("Say hello.")
    shell.wait(STATS)
    shell.wait(PROMPT)
    shell.send("/load fir" + TAB)
    shell.wait("first one")
    shell.send(ENTER)
    shell.wait("first one: 2 messages")
    shell.resize(24, 80)
    shell.say("/sessions")
    shell.wait(r"first one +2 messages +What is the capital of Fr…\n")
    newer, current = sorted(sessions.glob("2*.json"))[-1].stem, "first one"
    for other in (newer, current, newer):  # the last one but that which is open
        shell.say("/resume")
        shell.wait(f"{other}: 2 messages")
        shell.say("/system off")  # which is saved
        shell.wait("no system prompt")
    (sessions / "odd.json").write_text(
        (sessions / "first one.json").read_text().replace('"top_p": 1.0', '"top_p": 7')
    )
    shell.say("/load odd")
    shell.wait("top_p must be above 0")
    shell.say("/show")
    shell.wait(rf"session +{newer}\n")
    assert '"top_p": 7' in (sessions / "odd.json").read_text()
    shell.say("/model demo")
    shell.wait("model: demo")
    assert finished(shell) == 0
    assert "read" not in shell.text  # each cache was there

    again = chat("--resume", "first one", model=None)
    again.wait("first one: 2 messages")
    again.say("And what is the capital of Italy?")
    again.wait(STATS)
    assert finished(again) == 0
    assert "read" not in again.text
    assert len(json.loads((sessions / "first one.json").read_text())["messages"]) == 4

    other = sessions / "other.json"
    raw = json.loads((sessions / "first one.json").read_text())
    other.write_text(json.dumps(raw | {"model": "minicpm-2b-dpo", "identity": "another"}))
    third = chat("--resume", "other")
    third.wait("other: 4 messages")
    third.say("Thank you.")
    third.wait(wrapped("it was held with minicpm-2b-dpo"))
    third.wait(STATS)
    assert finished(third) == 0


def test_a_file_goes_with_the_next_message_once(chat: Open, saved: Saved, tmp_path: Path) -> None:
    notes, binary, long = tmp_path / "my notes.txt", tmp_path / "blob.bin", tmp_path / "long.txt"
    notes.write_text("\ufeffThe password is swordfish.\n", encoding="utf-8")
    binary.write_bytes(b"\xff\xfe\x00\x01")
    long.write_text("many words here " * 2400)
    (tmp_path / "huge.txt").write_text("many words here " * 60000)
    shell = chat("--max-tokens", "20")
    for typed, answer in [
        (f"/attach {tmp_path}/missing.txt", "missing.txt: No such file"),
        (f"/attach {binary}", "not a text file in UTF-8"),
        (f"/attach {tmp_path}", "not a file"),
        ("/attach /dev/zero", "not a file"),
        ("/attach ~nobody-here/x", "No such file"),
        (f"/attach {tmp_path}/huge.txt", r"about 240000 tokens, but there is room"),
        (f"/attach '{notes}'", "my notes.txt: [0-9]+ tokens, sent with your next"),
        ("What is the password?", STATS),
        ("And now?", STATS),
        (f"/attach {notes}", "my notes.txt: [0-9]+ tokens"),
        ("/clear", "cleared"),  # which drops the file too
        (f"/attach {long}", "long.txt: 7[0-9]+ tokens"),
    ]:
        shell.say(typed)
        shell.wait(wrapped(answer))
        if typed == "And now?":
            asked = [m["content"] for m in saved()[0]["messages"][::2]]
            assert asked[0].count("swordfish") == 1
            assert "\ufeff" not in asked[0]
            assert asked[1] == "And now?"
    shell.say("Sum it up.")
    time.sleep(1.5)  # it is being read
    shell.send(CTRL_C)
    shell.wait(r"\nstopped\n")
    assert saved() == []
    shell.wait(PROMPT + re.escape("Sum it up."))  # a draft
    shell.send(CTRL_C)
    shell.say("/attach off")
    shell.wait("no file is attached any more")
    shell.say(FRANCE)
    shell.wait(PARIS)
    assert finished(shell) == 0


def test_an_adapter_is_put_on_and_taken_off(
    chat: Open, saved: Saved, demo_adapter: Path, tmp_path: Path
) -> None:
    shell = chat("--max-tokens", "8")
    shell.say(FRANCE)
    shell.wait(PARIS)
    shell.say("/adapter")
    shell.wait("no adapter\n")
    shell.say(f"/adapter {tmp_path}")
    shell.wait(r"no adapter;\s+expected")
    shell.say(f"/adapter {demo_adapter}")
    shell.wait("adapter: ")
    shell.say("/retry")
    shell.wait(STATS)
    assert saved()[0]["adapter"] == str(demo_adapter)
    other = saved()[0]["messages"][1]["content"]
    assert "Paris" not in other
    shell.say("/adapter off")
    shell.wait("no adapter\n")
    shell.say("/retry")
    shell.wait(PARIS)
    shell.say("/exit")
    assert shell.status() == 0
    assert saved()[0]["adapter"] is None
    answers = [piped("-p", FRANCE, "--adapter", str(folder)) for folder in (demo_adapter, tmp_path)]
    assert "Paris" not in answers[0].stdout
    assert answers[0].returncode == 0
    assert answers[1].returncode == 1
    assert "no adapter" in answers[1].stderr


def test_what_happens_when_the_context_is_full(chat: Open) -> None:
    shell = chat("--context", "60", "--max-tokens", "60")
    for typed, answer in [
        (STORY, "the context is full: /undo"),
        ("Go on", "the conversation has [0-9]+ tokens and the context is 60"),
        ("/set on_overflow slide", "on_overflow = slide"),
        (
            STORY,
            "cut off: the context is full; the oldest turns .* next one the 2 oldest",
        ),
        ("/set context off", "context = -"),
    ]:
        shell.say(typed)
        shell.wait(wrapped(answer))
    assert finished(shell) == 0


# Keys


def test_what_is_typed_and_how(chat: Open, saved: Saved, tmp_path: Path) -> None:
    editor = tmp_path / "editor"
    editor.write_text("#!/bin/sh\nprintf 'from the\\neditor' > \"$1\"\n")
    editor.chmod(0o755)
    shell = chat("--max-tokens", "2", EDITOR=str(editor))
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

    again = chat("--max-tokens", "2")
    again.wait(PROMPT)
    again.send(UP + UP)
    again.wait("emoji")
    again.send(CTRL_C)
    again.wait(PROMPT)
    again.send(CTRL_R + "early" + ENTER + ENTER)
    again.wait(STATS)
    assert saved()[-1]["messages"][0]["content"] == "你好 😀 early"
    again.wait(PROMPT)
    again.send(CTRL_D)
    assert again.status() == 0


def test_a_reply_can_be_stopped_and_its_window_changed(chat: Open, saved: Saved) -> None:
    shell = chat()
    shell.say("Hi")
    time.sleep(0.2)
    shell.send(CTRL_C)  # the model may still load
    shell.wait("stopped|" + STATS)
    shell.wait(PROMPT)
    shell.send(CTRL_C)  # what was stopped before its first word is a draft
    shell.say(STORY)
    shell.wait(WORDS)
    for columns in (20, 3, 200):
        shell.resize(10, columns)
        os.kill(shell.process.pid, signal.SIGWINCH)
        time.sleep(0.2)
    shell.send("typed ahead")
    shell.send(CTRL_C)
    shell.wait(r"\nstopped · \d+ tokens?\n")
    story = saved()[0]["messages"][-1]
    assert story["role"] == "assistant"
    assert len(story["content"]) > 20
    shell.wait(PROMPT)
    shell.send(CTRL_C)
    assert finished(shell) == 0


def test_what_comes_while_a_reply_does_waits_for_its_end(chat: Open, saved: Saved) -> None:
    shell = chat("--max-tokens", "40")
    shell.wait(PROMPT)
    shell.send("/show" + ENTER + "typed ahead")  # the model still loads
    shell.wait("kv_bits")
    assert shell.text.count("typed ahead") == 0
    shell.wait(PROMPT + "typed ahead")
    shell.send(CTRL_C)
    shell.say(STORY)
    shell.wait(WORDS)
    assert shell.raw.rfind(b"\x1b[?2004h") > shell.raw.rfind(b"\x1b[?2004l")
    shell.send("\x1b[200~two\rlines\x1b[201~" + ENTER)
    shell.wait(STATS)
    shell.wait(STATS)
    assert [m["content"] for m in saved()[0]["messages"][::2]] == [STORY, "two\nlines"]
    assert finished(shell) == 0
    assert shell.raw.rfind(b"\x1b[?2004l") > shell.raw.rfind(b"\x1b[?2004h")


# In Chinese


def test_the_interface_in_chinese(chat: Open) -> None:
    shell = chat("--max-tokens", "5", LANG="zh_CN.UTF-8")
    shell.wait("/help 列出命令")
    for typed, answer in [
        ("/wat", "没有命令 /wat"),
        ("/set colour red", "没有设置 colour"),
        ("/set temperature hot", "temperature 应为数字"),
        ("/attach /dev/zero", "/dev/zero：不是文件"),
        ("/undo", "还没有对话"),
        (STORY, "5 个词元 · .*\n达到 5 个词元上限"),
        ("/new", "新的对话"),
        ("/exit", ""),
    ]:
        shell.say(typed)
        shell.wait(wrapped(answer))
    assert shell.status() == 0
    asked = chat("--lang", "zh", model="minicpm-2b-dpo")
    asked.wait("还不在本机上")
    asked.send("q" + ENTER)
    assert asked.status() == 0


# Leaving, wanted or not


def test_a_terminated_chat_is_saved_as_far_as_it_came(chat: Open, saved: Saved) -> None:
    shell = chat()
    shell.say(STORY)
    shell.wait(WORDS)
    shell.process.terminate()
    assert shell.status() == 143
    assert shell.echoes
    assert len(saved()[0]["messages"][1]["content"]) > 10

    shell = chat("-c")
    shell.wait("2 messages")
    shell.say(STORY)
    shell.wait(WORDS)
    assert shell.hang_up() == 129
    assert [len(session["messages"]) for session in saved()] == [4]
    assert "again" not in shell.text

    shell = chat("-c")
    shell.say(FRANCE)
    shell.wait(STATS)
    shell.process.kill()
    shell.status()
    assert len(saved()[0]["messages"]) == 6

    shell = chat("-c")
    shell.wait("6 messages")
    shell.say(STORY)
    shell.wait(WORDS)
    shell.process.kill()  # in the middle of a reply
    shell.status()
    assert len(saved()[0]["messages"]) == 7
    shell = chat("-c")
    shell.wait("6 messages")
    shell.wait(PROMPT + STORY)  # a draft
    shell.process.terminate()  # at the prompt, while the model loads
    assert shell.status() == 143
    assert shell.echoes

    shell = chat("-c")
    shell.wait(PROMPT + STORY)
    shell.send(CTRL_C)
    shell.say("/show")
    shell.wait("kv_bits")
    shell.wait(PROMPT)
    assert shell.hang_up() in (0, 129)


def test_leaving_at_once_waits_for_nothing(chat: Open) -> None:
    for keys in (CTRL_D, "/exit" + ENTER, CTRL_C + CTRL_C):
        shell = chat()
        shell.wait(PROMPT)
        shell.send(keys)
        assert shell.status() == 0
        assert "terminate" not in shell.text


def test_no_save_leaves_nothing(chat: Open, folder: Path) -> None:
    shell = chat("--no-save")
    shell.say(FRANCE)
    shell.wait(PARIS)
    assert finished(shell) == 0
    assert [path.name for path in folder.iterdir() if "demo" not in path.name] == []


def test_where_nothing_can_be_saved_it_is_said_once(chat: Open, folder: Path) -> None:
    (folder / "sessions").write_text("a file where the folder would be")
    (folder / "history").mkdir()
    shell = chat("--max-tokens", "4")
    for _ in range(2):
        shell.say(STORY)
        shell.wait(STATS)
    assert finished(shell) == 0
    assert shell.text.count("not saved: ") == 1


# What cannot begin


def test_a_session_that_cannot_be_gone_on_with(chat: Open, folder: Path) -> None:
    shell = chat("-c")
    assert shell.status() == 1
    assert len(shell.text.splitlines()) == 1
    assert "no saved session in" in shell.text
    (folder / "sessions").mkdir()
    (folder / "sessions" / "torn.json").write_text('{"format": 1, "messages": [')
    shell = chat("--resume", "torn")
    assert shell.status() == 1
    assert len(shell.text.splitlines()) == 1
    assert "torn.json: cannot be read" in shell.text
    odd = {"format": 1, "messages": [], "model": "demo", "identity": "", "updated": ""}
    odd["settings"] = {"top_p": 7}
    (folder / "sessions" / "odd.json").write_text(json.dumps(odd))
    shell = chat("--resume", "odd")
    shell.say("Hi")
    assert shell.status() == 1
    assert "odd.json: top_p" in shell.text


def test_a_model_that_cannot_be_loaded_ends_the_chat(
    chat: Open, demo_folder: Path, tmp_path: Path
) -> None:
    shell = chat(model="/nonexistent")
    assert shell.status() == 1
    assert re.fullmatch("minicpm-mlx: .*/nonexistent.*\n", shell.text)
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
    done = piped("--model", str(damaged), "-p", "x")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


def test_a_model_that_is_not_here_is_asked_about(chat: Open) -> None:
    for keys, status in (("q" + ENTER, 0), (CTRL_D, 0), (CTRL_C, 130)):
        shell = chat(model="minicpm-2b-dpo")
        shell.wait(r"download of 5\.45 GB(.*\n)*.*quit: ")
        time.sleep(0.3)  # it asks before it listens
        shell.send(keys)
        assert shell.status() == status
        assert shell.echoes
    shell = chat(model="minicpm-2b-dpo")
    shell.wait("quit: ")
    shell.send("t" + ENTER)
    shell.wait("demo\n")
    shell.say(FRANCE)
    shell.wait(PARIS)
    assert finished(shell) == 0


# Plain and piped


def test_replies_without_colour_where_none_is_wanted(chat: Open) -> None:
    show = "Write a Python function that adds two numbers, in a code block."
    plain = chat("--plain", "--max-tokens", "60")
    plain.say(show)
    plain.wait("`{3}python")
    plain.wait(STATS)
    assert finished(plain) == 0
    assert COLOUR.search(plain.raw)  # that of the prompt
    bare = chat("--max-tokens", "60", NO_COLOR="1")
    bare.say(show)
    bare.wait("def ")
    bare.wait(STATS)
    assert finished(bare) == 0
    assert not COLOUR.search(bare.raw)


def test_a_prompt_from_the_command_line_or_a_pipe(chat: Open) -> None:
    one, two = piped("-p", FRANCE), piped("-p", "-", typed=FRANCE)
    assert (one.returncode, one.stdout, one.stderr) == (
        0,
        "The capital of France is Paris.\n",
        "",
    )
    assert (two.returncode, two.stdout, two.stderr) == (0, one.stdout, "")
    empty = piped("-p", "-", typed=" \n")
    assert (empty.returncode, empty.stderr.count("\n")) == (1, 1)
    for wrong in (["--kv-bits", "3"], ["--on-overflow", "no"], ["--context", "0"]):
        refused = piped("-p", "x", *wrong)
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)


def test_a_pipe_goes_on_with_a_session_if_told_to(chat: Open, saved: Saved) -> None:
    assert (piped("-p", FRANCE).returncode, saved()) == (0, [])
    shell = chat("--max-tokens", "8")
    shell.say(FRANCE)
    shell.wait(PARIS)
    assert finished(shell) == 0
    assert piped("-c", "-p", "And of Italy?").stderr == ""
    done = piped("--resume", saved()[0]["name"], typed="And of Spain?\nThank you.\n")
    assert (done.returncode, done.stderr) == (0, "")
    asked = [m["content"] for m in saved()[0]["messages"][::2]]
    assert asked == [FRANCE, "And of Italy?", "And of Spain?", "Thank you."]
    assert len(saved()) == 1
    missing = piped("--resume", "nothing", "-p", "x")
    assert (missing.returncode, missing.stderr.count("\n")) == (1, 1)
    assert f"the nearest are '{saved()[0]['name']}'" in missing.stderr


def test_a_reader_that_leaves_is_no_bug(chat: Open) -> None:
    program = [sys.executable, "-c", CODE, "chat", "--model", "demo", "-p", STORY]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout
        assert running.stderr
        running.stdout.read(1)
        running.stdout.close()
        assert running.stderr.read() == b""
        assert running.wait() == 1
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        time.sleep(1)  # it loads
        running.send_signal(signal.SIGINT)
        errors = running.communicate()[1]
        assert (running.returncode, errors.strip()) == (130, b"minicpm-mlx: interrupted")
