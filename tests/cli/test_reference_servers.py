"""The reference MCP servers, unchanged, in a real terminal: files, time and memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.node import installed
from support.scripted_model import write_scripted
from support.terminal import Terminal, alone, scripted

pytestmark = pytest.mark.slow  # the first run installs two of them from npm


def call(name: str, **arguments: str) -> str:
    parts = (f'<param name="{key}">{value}</param>' for key, value in arguments.items())
    return f'<function name="{name}">{"".join(parts)}</function>'


ENTITY = json.dumps([{"name": "Ada", "entityType": "person", "observations": ["likes tea"]}])


def script(folder: Path) -> dict[str, str]:
    """What the model says: calls of each server, and what it makes of their results."""
    return {
        "Write it.": call("write_file", path=f"{folder}/a.txt", content="It rains."),
        "Successfully wrote": "Written.",
        "Read it.": call("read_text_file", path=f"{folder}/a.txt"),
        "It rains.": "It says that it rains.",
        "Read theirs.": call("read_text_file", path="/etc/passwd"),
        "Access denied": "That is not allowed.",
        "Time?": call("get_current_time", timezone="Asia/Tokyo"),
        "day_of_week": "It is late.",
        "Elsewhere?": call("get_current_time", timezone="Asia/Nowhere"),
        "Invalid timezone": "There is no such place.",
        "Remember.": call("create_entities", entities=ENTITY),
        "did not allow": "Then not.",
        "entityType": "Noted.",
        "Who?": call("search_nodes", query="tea"),
        "relations": "Ada does.",
    }


@pytest.fixture
def shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> Iterator[Terminal]:
    """`chat` with the three servers."""
    pytest.importorskip("mcp_server_time", reason="needs mcp-server-time")
    names = ("filesystem", "memory")
    npm = installed(pytestconfig.cache, *(f"@modelcontextprotocol/server-{name}" for name in names))
    files, memory = (str(npm / "node_modules" / ".bin" / f"mcp-server-{name}") for name in names)
    (tmp_path / "files").mkdir()
    servers = {
        "files": {"command": files, "args": [str(tmp_path / "files")]},
        "memory": {"command": memory, "env": {"MEMORY_FILE_PATH": str(tmp_path / "memory.json")}},
        "time": {"command": sys.executable, "args": ["-m", "mcp_server_time"]},
    }
    (tmp_path / "mcp.json").write_text(json.dumps({"mcpServers": servers}))
    write_scripted(tmp_path / "caller", positions=65_536)
    alone(monkeypatch, tmp_path / "home")
    code = scripted(script(tmp_path / "files"))
    terminal = Terminal(
        "chat", "-m", str(tmp_path / "caller"), "--mcp", str(tmp_path / "mcp.json"), code=code
    )
    terminal.resize(24, 250)
    yield terminal
    terminal.close()
    assert "Traceback" not in terminal.text


def test_files_time_and_memory_are_used_as_the_user_allows(shell: Terminal, tmp_path: Path) -> None:
    for question, key, shown in [
        ("Write it.", "n", r" n\nnot run\nThen not\."),
        ("Write it.", "y", r" y\n  Successfully wrote to .*a\.txt\nWritten\."),
        ("Read it.", "a", r" a\n  It rains\.\nIt says that it rains\."),
        ("Read theirs.", "", r"  Error: Access denied.*\n(  .*\n)*That is not all"),
        ("Time?", "y", r" y\n  \{.*\nIt is late\."),
        ("Elsewhere?", "y", r" y\n  Error: .*Invalid timezone.*\n(  .*\n)*There is no such place"),
        ("Remember.", "n", r" n\nnot run\nThen not\."),
        ("Remember.", "y", r" y\n  .*\nNoted\."),
        ("Who?", "y", r" y\n  .*\nAda does\."),
    ]:
        shell.say(question)
        shell.wait(r"▸ \w+.* · (files|memory|time)")
        if key:
            shell.wait(r"run it\? .*\[n\]o:|iew it whole:")
            before = [*(tmp_path / "files").iterdir(), *tmp_path.glob("memory.json")]
            shell.send(key)
        shell.wait(shown)
        if key == "n":
            assert before == [*(tmp_path / "files").iterdir(), *tmp_path.glob("memory.json")]
    assert (tmp_path / "files" / "a.txt").read_text() == "It rains."
    assert "likes tea" in (tmp_path / "memory.json").read_text()
    shell.say("/tools time")
    shell.wait(r"  get_current_time \(time\)  Get current time")
    shell.say("/exit")
    assert shell.status() == 0
