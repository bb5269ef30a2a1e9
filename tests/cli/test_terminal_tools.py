"""Tools of MCP servers in a real terminal: nothing runs unasked, results go to the model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.scripted_model import write_scripted
from support.terminal import CTRL_C, Terminal, alone, scripted

CALL = '<function name="weather"><param name="place">{}</param></function>'
SCRIPT = {
    "Wien?": "<think>\nI look.\n</think>\n\n" + CALL.format("Wien"),
    "Rom?": CALL.format("Rom"),
    "Dry in Wien": "It is dry in Wien.",
    "Dry in Rom": "It is dry in Rom.",
    "did not allow": "Then not.",
    "out of cheese": "The server is gone.",
    "interrupted this": "And now?",
    "Hello": "Hi!",
}
CODE = scripted(SCRIPT)
SERVER = Path(__file__).parents[1] / "support" / "mcp_server.py"
Open = Callable[..., Terminal]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("mcp", reason="needs the mcp package")
    write_scripted(tmp_path / "caller")
    alone(monkeypatch, tmp_path / "home")
    return str(tmp_path / "caller")


@pytest.fixture
def opened(model: str, tmp_path: Path) -> Iterator[Open]:
    """Opens `chat` in a terminal, with the scripted model and a server of that kind."""
    terminals: list[Terminal] = []

    def call(kind: str, *arguments: str) -> Terminal:
        servers = {kind: {"command": sys.executable, "args": [str(SERVER), kind]}}
        (tmp_path / "mcp.json").write_text(json.dumps({"mcpServers": servers}))
        mcp = ["--mcp", str(tmp_path / "mcp.json")]
        terminals.append(Terminal("chat", "-m", model, *mcp, *arguments, code=CODE))
        terminals[-1].resize(24, 120)
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
    shell.wait(r'▸ weather\(place="Wien"\) · good\n')
    shell.wait("run it\\?")
    shell.send("xn")  # a key that is no answer is none
    shell.wait("not run")
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
