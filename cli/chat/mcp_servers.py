"""MCP servers: programs and addresses whose tools a conversation may call.

They run on a thread of their own, so that calls can be waited for and given up.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import re
import tempfile
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minicpm_mlx.arguments import printable, shown
from minicpm_mlx.errors import FileError, InvalidArgumentError, MiniCPMError, MissingPackageError

START = 30.0
"""Seconds that a server has to list its tools."""
CALL = 120.0
"""Seconds that a call may take."""
RESULT = 40_000
"""Characters of a result, at most; the rest is cut off, and the model is told."""
TOOLS = 2000
"""Tools of a server, at most."""
_TIMEOUTS = (TimeoutError, asyncio.TimeoutError, concurrent.futures.TimeoutError)
"""One class from Python 3.11 on."""
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")


@dataclass(frozen=True, kw_only=True)
class McpServer:
    """An entry of a file: a program to run, or an address."""

    name: str
    command: str | None = None
    args: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    url: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class McpResult:
    """The text that a call gave, as the model reads it."""

    text: str
    failed: bool = False


def read_servers(path: Path) -> list[McpServer]:
    """The servers of a file in the usual form: `{"mcpServers": {"name": {"command": ...}}}`.

    `${NAME}` in values is that variable of the environment. Raises FileError.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise FileError(f"could not be read ({error.strerror})").at(path) from None
    except (ValueError, RecursionError) as error:
        raise FileError(f"must be JSON ({error})").at(path) from None
    servers = None
    if isinstance(content, Mapping):
        servers = content.get("mcpServers", content.get("servers"))
    if not isinstance(servers, Mapping) or not servers:
        raise FileError('must have servers by name in "mcpServers"').at(path)
    try:
        return [
            _entry(str(name), value)
            for name, value in servers.items()
            if not (isinstance(value, Mapping) and value.get("disabled") is True)
        ]
    except InvalidArgumentError as error:
        raise FileError(str(error)).at(path) from None


_TEXTS = {"command": str, "cwd": str, "url": str, "args": list, "env": dict, "headers": dict}


def _entry(name: str, value: object) -> McpServer:
    if not isinstance(value, Mapping):
        raise InvalidArgumentError(f"server {shown(name)} must be an object, got {shown(value)}")
    if (kind := value.get("type", value.get("transport"))) not in (
        *(None, "stdio", "http", "streamable-http", "streamableHttp"),
    ):
        raise InvalidArgumentError(f"server {name}: type must be stdio or http, got {shown(kind)}")
    given: dict[str, Any] = {}
    for key, wanted in _TEXTS.items():
        item = value.get(key, value.get("serverUrl") if key == "url" else None)
        if item is None:
            continue
        parts = [item] if wanted is str else item.values() if wanted is dict else item
        if not isinstance(item, wanted) or not all(isinstance(part, str) for part in parts):
            what = {str: "text", list: "a list of texts", dict: "an object of texts"}[wanted]
            raise InvalidArgumentError(f"server {name}: {key} must be {what}, got {shown(item)}")
        given[key] = _expanded(name, item)
    if ("command" in given) == ("url" in given):
        raise InvalidArgumentError(f"server {name}: expected either a command or a url")
    return McpServer(name=name, **given)


def _expanded(server: str, item: Any) -> Any:
    """`item` with `${NAME}` replaced by that variable of the environment."""
    if isinstance(item, dict):
        return {key: _expanded(server, part) for key, part in item.items()}
    if isinstance(item, list):
        return [_expanded(server, part) for part in item]

    def variable(match: re.Match[str]) -> str:
        value = os.environ.get(match["name"], match["default"])
        if value is None:
            raise InvalidArgumentError(
                f"server {server}: the variable {match['name']} is not set; set it, or give "
                f"${{{match['name']}:-a default}}"
            )
        return value

    return re.sub(r"\$\{(?:env:)?(?P<name>\w+)(?::-(?P<default>[^}]*))?\}", variable, item)


class McpServers:
    """Servers that run while the `with` block lasts.

    `tools` are their tools in OpenAI's form, `problems` a line for each server that did not start
    and each tool that cannot be offered.
    """

    def __init__(self, servers: Sequence[McpServer]):
        try:
            import mcp  # noqa: F401
        except ImportError:
            raise MissingPackageError(
                'tools of MCP servers need the mcp package: pip install "minicpm-mlx[mcp]"'
            ) from None
        self.tools: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self._homes: dict[str, tuple[_Running, str]] = {}
        self._servers = [_Running(server) for server in servers]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> McpServers:
        self._thread.start()
        started = [self._run(server.start()) for server in self._servers]
        for server, future in zip(self._servers, started, strict=True):
            try:
                self._add(server, future.result(START + 5))
            except (Exception, CancelledError) as error:
                self.problems.append(f"{server.entry.name}: {server.reason(error)}")
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(Exception, CancelledError):
            self._run(self._stop()).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        if not self._loop.is_running():
            self._loop.close()
        for server in self._servers:
            server.log.close()

    async def _stop(self) -> None:
        await asyncio.gather(*(server.stop() for server in self._servers))
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await self._loop.shutdown_asyncgens()

    def _run(self, work: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _add(self, server: _Running, tools: Sequence[Any]) -> None:
        for tool in tools:
            name, schema = tool.name, tool.input_schema
            if not _NAME.fullmatch(name) or schema.get("type", "object") != "object":
                self.problems.append(
                    f"{server.entry.name}: the tool {printable(name)[:80]} is left out: its name "
                    "or the schema of its arguments is not one that a model can be given"
                )
                continue
            if name in self._homes:
                name = f"{server.entry.name}_{name}"
            if name in self._homes or not _NAME.fullmatch(name):
                self.problems.append(f"{server.entry.name}: there are two tools {printable(name)}")
                continue
            self._homes[name] = server, tool.name
            function = {"name": name, "description": tool.description or "", "parameters": schema}
            self.tools.append({"type": "function", "function": function})

    def server_of(self, name: str) -> str:
        """The name of the server that has a tool."""
        return self._homes[name][0].entry.name

    def call(self, name: str, arguments: Mapping[str, Any]) -> McpResult:
        """Call a tool and wait; whatever goes wrong is a result that says so. Ctrl-C passes."""
        if name not in self._homes:
            return McpResult(f"Error: there is no tool {name}", failed=True)
        server, own_name = self._homes[name]
        future = self._run(server.call(own_name, dict(arguments)))
        try:
            return _result(future.result(CALL + 5))
        except KeyboardInterrupt:
            future.cancel()
            raise
        except (Exception, CancelledError) as error:
            return McpResult(f"Error: {server.reason(error)}", failed=True)


class _Running:
    """One server. A task of its own opens it and closes it, as its library needs."""

    def __init__(self, entry: McpServer):
        self.entry = entry
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.client: Any = None
        self.stopping: asyncio.Event | None = None
        self.task: asyncio.Task[None] | None = None

    async def start(self) -> Sequence[Any]:
        """The tools, once it is there."""
        ready: asyncio.Future[Sequence[Any]] = asyncio.get_running_loop().create_future()
        self.stopping = asyncio.Event()
        self.task = asyncio.create_task(self._live(ready))
        try:
            return await asyncio.wait_for(asyncio.shield(ready), START)
        except BaseException:
            self.task.cancel()
            raise

    async def _live(self, ready: asyncio.Future[Sequence[Any]]) -> None:
        assert self.stopping
        try:
            async with self._client() as client:
                tools: list[Any] = []
                cursor = None
                while True:
                    page = await client.list_tools(cursor=cursor)
                    tools += page.tools
                    cursor = page.next_cursor
                    if not cursor or len(tools) >= TOOLS:
                        break
                self.client = client
                ready.set_result(tools[:TOOLS])
                await self.stopping.wait()
        except BaseException as error:
            cause = _cause(error)
            if not isinstance(cause, Exception):
                ready.cancel()
                raise
            if not ready.done():
                ready.set_exception(cause)
        finally:
            self.client = None

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[Any]:
        from mcp import Client, StdioServerParameters
        from mcp.client.stdio import get_default_environment, stdio_client
        from mcp.client.streamable_http import streamable_http_client
        from mcp.shared._httpx_utils import create_mcp_http_client

        entry = self.entry
        async with AsyncExitStack() as stack:
            if entry.url is not None:
                headers = dict(entry.headers) or None
                http = await stack.enter_async_context(create_mcp_http_client(headers=headers))
                transport = streamable_http_client(entry.url, http_client=http)
            else:
                program = StdioServerParameters(
                    command=str(entry.command),
                    args=list(entry.args),
                    env={**get_default_environment(), **entry.env},
                    cwd=entry.cwd,
                )
                transport = stdio_client(program, errlog=self.log)
            client = Client(transport, read_timeout_seconds=CALL)
            yield await stack.enter_async_context(client)

    async def call(self, name: str, arguments: dict[str, Any]) -> Any:
        if self.client is None:
            raise MiniCPMError("the server has ended")
        return await asyncio.wait_for(self.client.call_tool(name, arguments), CALL)

    async def stop(self) -> None:
        if self.stopping and self.task:
            self.stopping.set()
            with suppress(Exception, asyncio.CancelledError):
                await asyncio.wait_for(self.task, 4)

    def reason(self, error: BaseException) -> str:
        """One line: why it failed, and the last line that it wrote to stderr."""
        if isinstance(error, _TIMEOUTS):
            text = "no answer in time"
        elif isinstance(error, FileNotFoundError):
            text = f"there is no program {self.entry.command}"
        else:
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
        with suppress(OSError, ValueError):
            self.log.seek(0)
            lines = [line.strip() for line in self.log.read().splitlines() if line.strip()]
            text += f" ({lines[-1]})" if lines else ""
        return printable(text)[:400]


def _cause(error: BaseException) -> BaseException:
    """The first error in a group of them."""
    while inner := getattr(error, "exceptions", None):
        error = inner[0]
    return error


def _result(result: Any) -> McpResult:
    """A result's text; of pictures and the like, their kind."""
    parts = [
        part.text if part.type == "text" else f"[{part.type}]" for part in result.content or ()
    ]
    text = "\n".join(parts)
    if not text and result.structured_content is not None:
        text = json.dumps(result.structured_content, ensure_ascii=False)
    if len(text) > RESULT:
        text = f"{text[:RESULT]}\n[cut: {len(text) - RESULT} more characters]"
    failed = bool(result.is_error)
    return McpResult(f"Error: {text}" if failed else text, failed)
