"""Servers of tools: started, asked, and whatever can be wrong with them."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from minicpm_mlx.cli.chat.mcp import servers as mcp_servers
from minicpm_mlx.cli.chat.mcp.config import McpServer, read_servers
from minicpm_mlx.cli.chat.mcp.servers import McpServers
from minicpm_mlx.errors import FileError

SCRIPT = Path(__file__).parents[1] / "support" / "mcp_server.py"


@pytest.fixture(autouse=True)
def needs_mcp() -> None:
    pytest.importorskip("mcp", reason="needs the mcp package")


def kind(name: str) -> McpServer:
    return McpServer(name=name, command=sys.executable, args=[str(SCRIPT), name])


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    def write(content: object) -> Path:
        path = tmp_path / "mcp.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_a_call_gives_the_result_s_text() -> None:
    with McpServers([kind("good")]) as servers:
        [tool] = servers.tools
        assert servers.problems == []
        assert tool["function"]["name"] == "weather"
        assert tool["function"]["parameters"]["required"] == ["place"]
        assert servers.server_of("weather") == "good"
        assert servers.call("weather", {"place": "Wien"}).text == "Dry in Wien"
        assert servers.call("other", {}).text == "Error: there is no tool other"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dies", r"Error: .*\(I am out of cheese\)"),
        pytest.param("hangs", "Error: .*(in time|[Tt]imed out)", marks=pytest.mark.slow),
        ("fails", "Error: Dry in Wien"),
        ("junk", "Dry in Wien"),
        ("half", "Dry \ufffd$"),
        ("nothing", r"\[nothing\]"),
        ("parts", r"\[image/png, which .*\]\nDry\n\[resource_link: file:///b.txt\]"),
    ],
)
def test_whatever_a_call_gives_is_told_to_the_model(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mcp_servers, "CALL", 1.0)
    with McpServers([kind(name), kind("good")]) as servers:
        assert re.match(said, servers.call(f"{name}_weather", {"place": "Wien"}).text)
        again = servers.call(f"{name}_weather", {"place": "Wien"})
        assert again.failed == (name in ("dies", "hangs", "fails"))
        assert servers.call("good_weather", {"place": "Rom"}).text == "Dry in Rom"  # the other
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_servers_that_do_not_start_leave_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp_servers, "START", 2.0)
    bad = [
        McpServer(name="gone", command="no-such-program"),
        McpServer(name="ends", command=sys.executable, args=["-c", "import sys; sys.exit('bad')"]),
        McpServer(name="away", url="http://127.0.0.1:9/mcp"),
        kind("silent"),
        kind("keyless"),
        McpServer(name="no folder", command=sys.executable, cwd="/no/such/folder"),
    ]
    with McpServers([*bad, kind("good")]) as servers:
        assert [tool["function"]["name"] for tool in servers.tools] == ["weather"]
        names = [line.partition(":")[0] for line in servers.problems]
        assert names == [server.name for server in bad]
        assert not any("\n" in line for line in servers.problems)
        assert "there is no program no-such-program" in servers.problems[0]
        assert "bad" in servers.problems[1]
        assert "no answer in time" in servers.problems[3]
        assert "(WEATHER_KEY must be set)" in servers.problems[4]
        assert "/no/such/folder" in servers.problems[5]
    key = {"WEATHER_KEY": "x"}
    with McpServers([replace(kind("keyless"), env=key)]) as servers:
        assert servers.problems == []


def test_a_name_that_two_servers_have_is_neither_s_alone() -> None:
    """Otherwise one could take the place of a tool that is trusted."""
    twin = replace(kind("fails"), name="a b")
    with McpServers([kind("good"), twin, kind("twice")]) as servers:
        names = [tool["function"]["name"] for tool in servers.tools]
        assert names == ["good_weather", "a_b_weather", "twice_weather"]
        assert servers.problems == []
        assert not servers.call("good_weather", {"place": "x"}).failed
        assert servers.call("a_b_weather", {"place": "x"}).failed
        assert servers.server_of("a_b_weather") == "a b"


def test_malformed_tools_leave_the_others() -> None:
    with McpServers([kind("malformed")]) as servers:
        assert [tool["function"]["name"] for tool in servers.tools] == ["fine"]
        assert [line.count("is left out: ") for line in servers.problems] == [1] * 7
        assert servers.call("fine", {"place": "x"}).text == "Dry in x"


def test_many_tools_odd_tools_and_long_results() -> None:
    with McpServers([kind("many"), kind("odd"), kind("long")]) as servers:
        assert len(servers.tools) == 1002
        assert [line.count("left out") for line in servers.problems] == [1]
        assert servers.call("tool_999", {"place": "x"}).text == "Dry in x"
        text = servers.call("weather", {"place": "x"}).text
        assert text.endswith("more characters]")
        assert len(text) < mcp_servers.RESULT + 100


def test_a_server_over_http_is_asked_alike() -> None:
    import uvicorn
    from mcp.server import MCPServer

    server = MCPServer("there")

    @server.tool()
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    listener = socket.create_server(("127.0.0.1", 0))
    app = server.streamable_http_app()
    web = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not web.started and time.monotonic() < deadline:
        time.sleep(0.02)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/mcp"
    try:
        with McpServers([McpServer(name="there", url=url, headers={"X-Key": "1"})]) as servers:
            assert servers.problems == []
            assert servers.call("add", {"a": 2, "b": 3}).text == "5"
            assert servers.call("add", {"a": "x"}).failed
    finally:
        web.should_exit = True
        thread.join(10)


REFUSALS = {
    "key": (401, {"WWW-Authenticate": "Bearer"}, 'HTTP 401 Unauthorized: expected a key in "hea'),
    "ill": (500, {}, "HTTP 500"),
    "moved": (302, {"Location": "http://elsewhere.invalid/mcp"}, "Redirect to .* not followed"),
    "page": (200, {"Content-Type": "text/html"}, "text/html"),
}
"""Status, headers, and what is said of them, by path."""


class Refusing(BaseHTTPRequestHandler):
    """A server that is no MCP server, or not for us."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        status, headers, _ = REFUSALS[self.path[1:]]
        self.send_response(status)
        for name, value in ({"Content-Length": "0"} | headers).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_servers_over_http_that_refuse_say_why(capfd: pytest.CaptureFixture[str]) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{web.server_port}"
        entries = [McpServer(name=name, url=f"{base}/{name}") for name in REFUSALS]
        with McpServers(entries) as servers:
            for (_, _, said), problem in zip(REFUSALS.values(), servers.problems, strict=True):
                assert re.search(said, problem)
        web.shutdown()
    assert capfd.readouterr() == ("", "")


def test_a_file_names_servers_with_variables(
    file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY", "secret")
    path = file(
        {
            "mcpServers": {
                "a": {"command": "x", "args": ["--k", "${KEY}"], "env": {"A": "${env:KEY}"}},
                "b": {"type": "http", "url": "http://x/${NONE:-mcp}", "headers": {"H": "${KEY}"}},
                "c": {"command": "y", "disabled": True},
            }
        }
    )
    a, b = read_servers(path)
    assert (a.args, a.env) == (["--k", "secret"], {"A": "secret"})
    assert (b.url, b.headers) == ("http://x/mcp", {"H": "secret"})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "must be JSON"),
        ("[" * 100_000, "must be JSON"),
        ([], "must have servers by name"),
        ({"mcpServers": {}}, "must have servers by name"),
        ({"mcpServers": {"a": 1}}, "server 'a' must be an object"),
        ({"mcpServers": {"a": {}}}, "either a command or a url"),
        ({"mcpServers": {"a": {"command": "x", "url": "y"}}}, "either a command or a url"),
        ({"mcpServers": {"a": {"command": ""}}}, "either a command or a url"),
        ({"mcpServers": {"a": {"url": "ftp://x"}}}, "url must begin with http"),
        ({"mcpServers": {"a": {"url": "http://x", "headers": {"K": "a\nb"}}}}, "header 'K' must"),
        ({"mcpServers": {"a": {"command": 1}}}, "command must be text"),
        ({"mcpServers": {"a": {"command": "x", "args": "y"}}}, "args must be a list"),
        ({"mcpServers": {"a": {"command": "x", "env": {"A": 1}}}}, "env must be an object"),
        ({"mcpServers": {"a": {"type": "sse", "url": "x"}}}, "type must be stdio or http"),
        ({"mcpServers": {"a": {"command": "${NOT_SET_AT_ALL}"}}}, "NOT_SET_AT_ALL is not set"),
    ],
)
def test_a_file_that_is_wrong_says_where(
    content: Any, said: str, file: Callable[..., Path]
) -> None:
    path = file(content)
    with pytest.raises(FileError, match=said) as caught:
        read_servers(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
