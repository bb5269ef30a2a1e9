"""Thoughts in a real terminal: they fold, open again, are saved, and stay out of pipes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import minicpm_mlx as mm
from support.scripted_model import follow_script, write_scripted
from support.terminal import CTRL_C, Terminal, alone, scripted

SCRIPT = {
    "2 + 2": "<think>\nTwo and\n\n\n\x1b[31mtwo.\n</think>\n\nIt is four.",
    "Hello": "Hi!",
    "Silent": "<think>\nHm.",
    "endless": "<think>\n" + "on and on " * 700,
    "Long": "<think>\n" + "".join(f"row {i} 想\n" for i in range(40)) + "</think>\n\nDone.",
    "Wide": "<think>\n" + "words that are wrapped, 还有中文字。" * 9 + "</think>\n\nDone.",
}
CODE = scripted(SCRIPT)
FOLDED = r"thought for \d+\.\d s, \d+ tokens\n"
DIM = "\x1b[2m│ "

Open = Callable[..., Terminal]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    write_scripted(tmp_path / "thinker")
    alone(monkeypatch, tmp_path / "home")
    return str(tmp_path / "thinker")


@pytest.fixture
def opened(model: str) -> Iterator[Open]:
    """Opens a command in a terminal, with the scripted model."""
    terminals: list[Terminal] = []

    def call(verb: str, *arguments: str, columns: int = 80, **environment: str) -> Terminal:
        terminals.append(Terminal(verb, "-m", model, *arguments, code=CODE, **environment))
        terminals[-1].resize(24, columns)
        return terminals[-1]

    yield call
    for terminal in terminals:
        terminal.close()
        assert "Traceback" not in terminal.text


def saved(tmp_path: Path) -> dict[str, Any]:
    (path,) = (tmp_path / "home" / "sessions").glob("*.json")
    return json.loads(path.read_text(encoding="utf-8"))


def screen(raw: str) -> list[str]:
    """The lines that are left of what was written, if none of it scrolls."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b.|\n|\r|[^\x1b\n\r]+", raw):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif up := re.fullmatch(r"\x1b\[(\d+)A", part):
            row -= int(up[1])
        elif part == "\x1b[J":  # only ever after \r
            lines[row:] = [""]
        elif part == "\x1b[K":
            lines[row] = ""
        elif part[0] not in "\x1b\r":
            lines[row] += part
    return lines


def test_a_thought_folds_to_a_line_and_opens_again(opened: Open, tmp_path: Path) -> None:
    shell = opened("chat", columns=320)
    shell.say("What is 2 + 2?")
    shell.wait(r"│ Two and\n│ \n│ \[31mtwo\.")
    shell.wait(FOLDED + r"It is four\.\n\d+ tokens · ")
    raw = shell.raw.decode(errors="ignore")
    assert DIM in raw
    lines = screen(raw[raw.index(DIM) :])
    assert re.fullmatch(FOLDED, lines[0] + "\n")
    assert lines[1] == "It is four."
    shell.say("/thoughts")
    shell.wait(r"\n?│ Two and\n│ \n│ \[31mtwo\.\n\n")
    (_, answer) = saved(tmp_path)["messages"]
    assert answer == {
        "role": "assistant",
        "content": "It is four.",
        "reasoning_content": "Two and\n\n\n\x1b[31mtwo.",
    }
    for line, shown in [
        ("/copy", "copied"),
        (f"/save {tmp_path}/plain.md", "written to"),
        (f"/save -t {tmp_path}/whole.md", "written to"),
        (f"/save -t {tmp_path}/whole.md", "/save -f -t .*whole.md replaces it"),
        ("/retry", FOLDED + "It is four"),
        ("Hello", r"\nHi!\n"),
        ("/thoughts", "the last reply has no thought"),
        ("/undo", "taken back: Hello"),
        ("/thoughts", "│ Two and"),
        ("/undo", "taken back: What is 2"),
        ("/thoughts", "the last reply has no thought"),
    ]:
        shell.say(line)
        shell.wait(shown)
    assert "two" not in (tmp_path / "plain.md").read_text()
    assert "> *thought*\n> \n> Two and\n" in (tmp_path / "whole.md").read_text()
    shell.say("/exit")
    assert shell.status() == 0


def test_think_switches_and_bounds_the_thought(opened: Open, tmp_path: Path) -> None:
    shell = opened("chat", columns=320)
    for line, shown in [
        ("/think", "thinking: the model decides"),
        ("/think maybe", r"usage: /think \[on\|off\|auto\|N\]"),
        ("/think off", "thinking: off"),
        ("What is 2 + 2?", r"\nIt is four\."),
        ("/thoughts", "the last reply has no thought"),
        ("/think 3", "thinking: on, at most 3 tokens"),
        ("What is 2 + 2?", FOLDED + r"It is four\."),
        ("/thoughts", r"│ T.+\n"),
        ("/set think on", "thinking: on\n"),
        ("/set think_tokens 5", "think_tokens = 5"),
        ("/set think_tokens -1", "think_tokens must be 0 or more"),
        ("/show", r"think +on\n(.*\n)*think_tokens +5"),
        ("/think auto", "thinking: the model decides"),
        ("Silent", "the model ended within its thought: /retry"),
        ("/set max_tokens 20", "max_tokens = 20"),
        ("endless", r"within its thought: /set max_tokens N .* /think N"),
        ("/copy", "there is no reply yet"),
        ("/think 9", "thinking: on, at most 9 tokens"),
    ]:
        shell.say(line)
        shell.wait(shown)
    assert "cut off" not in shell.text
    last = saved(tmp_path)["messages"][-1]
    assert last["content"] == ""
    assert last["reasoning_content"].startswith("on and")
    shell.say("/exit")
    assert shell.status() == 0

    again = opened("chat", "-c", "--lang", "zh", columns=200)
    for line, shown in [
        ("/think", "思考：开，最多 9 个词元"),
        ("/thoughts", "│ on and"),
        ("What is 2 + 2?", r"思考 \d+\.\d 秒，\d+ 个词元\nIt"),
        ("/thoughts 1", "没有思考"),
        ("/thoughts 3", r"3\. Silent\n│ Hm\.\n\n"),
        (
            "/thoughts all",
            r"2\. What is 2 \+ 2\?\n│ T.+\n\n3\. Silent\n(.*\n)+5\. What is 2 \+ 2\?\n│ T",
        ),
        ("/thoughts 6", "应为轮次编号（1 到 5）或 all"),
        ("/thoughts x", r"用法：/thoughts \[N\|all\]"),
    ]:
        again.say(line)
        again.wait(shown)


def test_ctrl_c_within_a_thought_keeps_what_came(opened: Open, tmp_path: Path) -> None:
    shell = opened("chat", columns=40)
    shell.say("endless")
    shell.wait("on and on on")
    shell.send(CTRL_C)
    shell.wait(FOLDED + r"stopped · \d+ tokens")
    shell.say("/thoughts")
    shell.wait("│ on and on on")
    shell.say("What is 2 + 2?")
    shell.wait(r"It is four\.\n\d+ tokens")
    (_, cut, _, answer) = saved(tmp_path)["messages"]
    assert cut["content"] == ""
    assert cut["reasoning_content"].startswith("on and on")
    assert answer["content"] == "It is four."


@pytest.mark.parametrize("columns", [12, 80])
def test_a_long_thought_leaves_nothing_on_the_screen(opened: Open, columns: int) -> None:
    shell = opened("chat", "--plain", columns=columns)
    for question in ("Long", "Wide"):
        shell.say(question)
        shell.wait(r"Done\.")
        raw = shell.raw.decode(errors="ignore")
        left = screen(raw[raw.rindex("\x1b[?2004h", 0, raw.rindex("Done.")) :])
        assert "".join(left).replace("\x1b", "").count("│") == 0
        assert "".join(left).startswith("thought for")


def test_where_no_cursor_moves_a_thought_stays_above_its_line(opened: Open) -> None:
    shell = opened("chat", TERM="dumb")
    shell.say("What is 2 + 2?")
    shell.wait(r"│ Two and\n│ \n│ \[31mtwo\.\n" + FOLDED + r"It is four\.")
    assert "\x1b[2m" not in shell.raw.decode()


def test_generate_shows_the_thought_at_a_terminal(opened: Open) -> None:
    shell = opened("generate", "-p", "What is 2 + 2?")
    shell.wait(r"│ Two and\n│ \n│ \[31mtwo\.\n" + FOLDED + r"It is four\.\n")
    assert shell.status() == 0
    assert DIM in shell.raw.decode()


Piped = Callable[..., tuple[int, str, str]]


@pytest.fixture
def piped(
    model: str,
    command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Piped:
    """Runs a command with the scripted model and standard output in a pipe."""
    load = mm.load
    monkeypatch.setattr(mm, "load", lambda *a, **k: follow_script(load(*a, **k), SCRIPT))

    def run(verb: str, *arguments: str) -> tuple[int, str, str]:
        status = command(verb, "-m", model, *arguments)
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_a_pipe_gets_the_answer_alone(piped: Piped, verb: str) -> None:
    for options in ((), ("--think",), ("--no-think",), ("--think-tokens", "3"), ("--seed", "1")):
        asked = (*options, "-p", "What is 2 + 2?")
        assert piped(verb, *asked) == (0, "It is four.\n", ""), options
    status, out, err = piped(verb, "-p", "endless", "--max-tokens", "9")
    assert (status, out.strip()) == (0, "")
    assert "raise --max-tokens, or end the thought earlier with --think-tokens" in err


def test_json_has_the_thought_apart(piped: Piped) -> None:
    record = json.loads(piped("generate", "--json", "-p", "What is 2 + 2?")[1])
    assert record["text"] == "It is four."
    assert record["thinking"] == "Two and\n\n\n\x1b[31mtwo."
    assert 0 < record["thinking_tokens"] < record["completion_tokens"]
    record = json.loads(piped("generate", "--json", "--no-think", "-p", "What is 2 + 2?")[1])
    assert (record["thinking"], record["thinking_tokens"]) == ("", 0)


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_options_that_cannot_be_are_refused_in_a_line(
    piped: Piped, verb: str, demo_folder: Path
) -> None:
    for options, problem in [
        (("--no-think", "--think-tokens", "3"), "--no-think contradicts --think-tokens"),
        (("--think-tokens", "-1"), "--think-tokens must be 0 or more"),
        (("-m", str(demo_folder), "--think"), "does not think .*leave out --think$"),
        (("-m", str(demo_folder), "--think-tokens", "3"), "leave out --think-tokens$"),
    ]:
        status, out, err = piped(verb, *options, "-p", "Hello")
        assert (status != 0, out, err.count("\n")) == (True, "", 1), err
        assert re.search(problem, err.strip())
