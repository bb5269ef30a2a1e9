"""Tools of MCP servers in a real terminal: nothing runs unasked, results go to the model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.scripted_model import TEMPLATE, write_scripted
from support.terminal import CTRL_C, Terminal, alone, scripted

CALL = '<function name="weather"><param name="place">{}</param></function>'
LONG = "a\u202eb\n" * 100 + "the end"
SCRIPT = {
    "Wien?": "<think>\nI look.\n</think>\n\n" + CALL.format("Wien"),
    "Rom?": CALL.format("Rom"),
    "Dry in Wien": "It is dry in Wien.",
    "Dry in Rom": "It is dry in Rom.",
    "did not allow": "Then not.",
    "out of cheese": "The server is gone.",
    "interrupted this": "And now?",
    "Hello": "Hi!",
    "Always?": CALL.format("Linz"),
    "Dry in Linz": CALL.format("Linz"),
    "Long?": CALL.format(LONG),
    "Dry in a": "A long one.",
    "Thousand?": '<function name="tool_999"></function>',
    "Dry in None": "The last of them.",
    "Escape?": CALL.format("x").replace("weather", "escapes_weather"),
    "Dry [red]": "It has colours.",
}
CODE = scripted(SCRIPT)
SERVER = Path(__file__).parents[1] / "support" / "mcp_server.py"
Open = Callable[..., Terminal]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("mcp", reason="needs the mcp package")
    described = TEMPLATE.replace("tool | tojson", "tool.function.name")  # a thousand fit
    write_scripted(tmp_path / "caller", described, positions=16_000)
    alone(monkeypatch, tmp_path / "home")
    return str(tmp_path / "caller")


@pytest.fixture
def opened(model: str, tmp_path: Path) -> Iterator[Open]:
    """Opens `chat` in a terminal, with the scripted model and servers of those kinds."""
    terminals: list[Terminal] = []

    def call(kinds: str, *arguments: str, columns: int = 120) -> Terminal:
        servers = {
            kind: {"command": sys.executable, "args": [str(SERVER), kind]} for kind in kinds.split()
        }
        (tmp_path / "mcp.json").write_text(json.dumps({"mcpServers": servers}))
        mcp = ["--mcp", str(tmp_path / "mcp.json")]
        terminals.append(Terminal("chat", "-m", model, *mcp, *arguments, code=CODE))
        terminals[-1].resize(24, columns)
        return terminals[-1]

    yield call
    for terminal in terminals:
        terminal.close()
        assert "Traceback" not in terminal.text


def messages(tmp_path: Path) -> list[dict[str, Any]]:
    (path,) = (tmp_path / "home" / "sessions").glob("*.json")
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["messages"]
    return found


def test_a_call_runs_only_when_it_is_allowed(opened: Open, tmp_path: Path) -> None:
    shell = opened("good")
    shell.say("Wien?")
    shell.wait(r'▸ weather\(place="Wien"\) · good\nrun it\? \[y\]es .* \[n\]o:')
    shell.send("xn")  # a key that is no answer is none
    shell.wait(" n\nnot run")
    shell.wait("Then not\\.")
    shell.say("Wien?")
    shell.wait("run it\\?")
    shell.send("y")
    shell.wait(r"Dry in Wien\n")
    shell.wait(r"It is dry in Wien\.")
    shell.say("Rom?")
    shell.wait("run it\\?")
    shell.send("a")
    shell.wait(r"It is dry in Rom\.")
    shell.say("Wien?")
    shell.wait(r"It is dry in Wien\.")  # and no question
    assert shell.text.count("run it?") == 3
    shell.say("/tools")
    shell.wait(r"✓ weather \(good\)  The weather of a place\.")
    turn = messages(tmp_path)[-4:]
    assert [message["role"] for message in turn] == ["user", "assistant", "tool", "assistant"]
    assert turn[1]["tool_calls"][0]["function"]["name"] == "weather"
    assert turn[2]["content"] == "Dry in Wien"
    shell.say(f"/save {tmp_path}/talk.md")
    shell.wait("written to")
    assert "> Dry in Rom" in (tmp_path / "talk.md").read_text()


def test_ctrl_c_at_the_question_ends_the_turn_and_leaves_it_whole(
    opened: Open, tmp_path: Path
) -> None:
    shell = opened("good")
    shell.say("Rom?")
    shell.wait("run it\\?")
    shell.send(CTRL_C)
    shell.wait("stopped")
    assert messages(tmp_path)[-1]["content"].startswith("Error: the user interrupted")
    shell.say("Hello")
    shell.wait("Hi!")


def test_a_server_that_dies_is_told_to_the_model(opened: Open) -> None:
    shell = opened("dies", "--allow-tool", "weather")
    shell.say("Rom?")
    shell.wait("Error: .*out of cheese")
    shell.wait("The server is gone\\.")
    assert "run it?" not in shell.text


@pytest.mark.slow
def test_the_questions_in_chinese(opened: Open) -> None:
    shell = opened("good", "--lang", "zh", columns=50)
    shell.say("Rom?")
    shell.wait(r'▸ weather\(place="Rom"\) · good\n')
    shell.wait(r"运行吗？\[y\] 是 · \[a\] 始终允许此工具 · \[n\] 否：")
    shell.send("n")
    shell.wait(" n\n未运行\n")
    shell.say("/tools")
    shell.wait(r"  weather \(good\)  The weather of a place\.\n\n")
    shell.say("Rom?")
    shell.wait("否：")
    shell.send("a")
    shell.wait(r"  Dry in Rom\nIt is dry in Rom\.")
    shell.say("/tools")
    shell.wait(r"✓ weather \(good\).*\n✓ 表示无需询问即可运行")
    shell.say("/set max_rounds 2")
    shell.wait("max_rounds = 2")
    shell.say("Always?")
    shell.wait("已停止：连续调用了 2 轮工具仍没有回答；发送任意消\n息可让它继续，/set max_rounds N")


@pytest.mark.slow
def test_a_long_call_is_viewed_whole_before_it_runs(opened: Open) -> None:
    shell = opened("good", columns=80)
    shell.say("Long?")
    shell.wait(r"▸ weather · good\n  place =\n(  .+\n)+  .* … \(509 characters\)\n")
    shell.wait(r"\[v\]iew it whole:")
    assert "the end" not in shell.text
    shell.send("v")
    shell.wait(r" v\n  place =\n(    a\?b\n){100}    the end\n")
    shell.wait(r"run it\? .*\[n\]o:")
    assert "\u202e" not in shell.text[shell.text.index("▸") :]
    shell.send("y")
    shell.wait(r"  Dry in a\?b … 100 lines more\nA long one\.")


@pytest.mark.slow
def test_calls_without_an_end_are_stopped_and_go_on_with_a_message(
    opened: Open, tmp_path: Path
) -> None:
    shell = opened("good", "--allow-tool", "weather", "--max-rounds", "3")
    shell.say("Always?")
    shell.wait(
        "stopped: 3 rounds of calls and no answer yet; any message lets it go on, /set max_r"
    )
    assert shell.text.count("Dry in Linz") == 3
    assert "name=" not in shell.text  # the last call is not shown as text
    shell.say("Hello")
    shell.wait(r"Hi!\n\d+ tokens")
    assert [message["role"] for message in messages(tmp_path)][-4:] == [
        *("assistant", "tool", "user", "assistant")
    ]


@pytest.mark.slow
def test_nothing_that_a_server_sends_moves_the_cursor(opened: Open) -> None:
    shell = opened("escapes keyless junk", "--allow-tool", "escapes_weather", columns=80)
    shell.wait(r"tools: keyless: .*\(WEATHER_KEY must be set\)")
    shell.say("/tools")
    shell.wait(
        r"✓ escapes_weather \(escapes\)  \?\]0;mine\?\?\[2J\[bold\]The\? weather\[/bold\] \{place\}"
    )
    shell.say("Escape?")
    shell.wait(r"  \?\[2J\?Dry \[red\]in\[/red\] \{x\}\? … 40 lines more\nIt has colours\.")
    for mark in ("\x1b]0;", "\x1b[2J", "\u202e", "\x07"):
        assert mark not in shell.raw.decode()
    assert "Traceback" not in shell.text


@pytest.mark.slow
def test_one_of_a_thousand_tools_is_called(opened: Open) -> None:
    shell = opened("many", "--allow-tool", "tool_999")
    shell.say("/tools")
    shell.wait(r"\n  tool_29 \(many\)  No\. 29\n… and 970 more; /tools TEXT lists those")
    shell.say("/tools TOOL_99")
    shell.wait(r"  tool_99 \(many\)(.*\n)+✓ tool_999 \(many\)  No\. 999\n✓ runs")
    shell.say("/tools nothing")
    shell.wait("no tool has nothing in its name")
    shell.say("Thousand?")
    shell.wait(r"▸ tool_999\(\) · many\n  Dry in None\nThe last of them\.")
    again = opened("many", "--context", "4000")
    again.say("Thousand?")
    again.wait("without tools: their descriptions take \\d+ tokens, and the context has 4000;")
    again.say("/tools")
    again.wait("this model is offered no tools")


@pytest.mark.slow
def test_ctrl_c_ends_the_wait_for_a_server_that_hangs(opened: Open, tmp_path: Path) -> None:
    shell = opened("hangs", "--allow-tool", "weather")
    shell.say("Rom?")
    shell.wait(r"▸ weather\(place=\"Rom\"\) · hangs\n")
    shell.wait_raw("⋯ 1 s")
    shell.send(CTRL_C)
    shell.wait("stopped")
    assert messages(tmp_path)[-1]["content"].startswith("Error: the user interrupted")
    shell.say("Hello")
    shell.wait("Hi!")
    shell.say("/exit")
    assert shell.status() == 0
