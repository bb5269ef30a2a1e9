"""Programs and addresses whose tools a conversation may call.

They run on a thread of their own, so that calls can be waited for and given up.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
import re
import tempfile
import threading
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from minicpm_mlx.arguments import printable
from minicpm_mlx.errors import MiniCPMError, MissingPackageError

from .config import McpServer
from .messages import MendedStream

START = 30.0
"""Seconds that a server has to list its tools."""
CALL = 120.0
"""Seconds that a call may take."""
RESULT = 40_000
"""Characters of a result, at most; the rest is cut off, and the model is told."""
TOOLS = 2000
"""Tools of a server, at most."""
SILENCE = 300.0
"""Seconds that a server over HTTP may send nothing while its stream is open."""
_TIMEOUTS = (TimeoutError, asyncio.TimeoutError, concurrent.futures.TimeoutError)
"""One class from Python 3.11 on."""
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")


@dataclass(frozen=True)
class McpResult:
    """The text that a call gave, as the model reads it."""

    text: str
    failed: bool = False


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
        # A line that a server prints is no message, and no news: the terminal is the chat's.
        logging.getLogger("mcp").addHandler(logging.NullHandler())
        self.tools: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self._homes: dict[str, tuple[_Running, str]] = {}
        self._servers = [_Running(server) for server in servers]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> McpServers:
        self._thread.start()
        started = [self._run(server.start()) for server in self._servers]
        found: dict[tuple[str, str], tuple[_Running, Any]] = {}
        for server, future in zip(self._servers, started, strict=True):
            try:
                for tool in future.result(START + 5):
                    found.setdefault((server.entry.name, tool.name), (server, tool))
            except (Exception, CancelledError) as error:
                server.problems.append(f"{server.entry.name}: {server.reason(error)}")
        owners = Counter(name for _, name in found)
        for server, tool in found.values():
            self._add(server, tool, shared=owners[tool.name] > 1)
        self.problems = [line for server in self._servers for line in server.problems]
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

    def _add(self, server: _Running, tool: Any, *, shared: bool) -> None:
        """Offers a tool; under its server's name if another server has one of that name.

        Otherwise a server could take the place of a tool that the user trusts.
        """
        prefix = re.sub(r"[^A-Za-z0-9_-]", "_", server.entry.name)
        name = f"{prefix}_{tool.name}" if shared else tool.name
        if not _NAME.fullmatch(name):
            server.leave_out(name, "a name has up to 128 letters, digits and _ . : / -")
        elif name in self._homes:
            server.leave_out(name, "another has that name")
        else:
            self._homes[name] = server, tool.name
            function = {"name": name, "description": tool.description or ""}
            function["parameters"] = tool.input_schema
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
        self.problems: list[str] = []
        """A line for each tool that cannot be offered."""
        self.refusal = ""
        """The status of the last answer over HTTP, if it was an error."""
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
        from mcp import Client

        client = Client(self._transport(), read_timeout_seconds=CALL)
        async with client:
            yield client

    @asynccontextmanager
    async def _transport(self) -> AsyncIterator[Any]:
        import httpx2  # which mcp speaks HTTP with
        from mcp import StdioServerParameters
        from mcp.client.stdio import get_default_environment, stdio_client
        from mcp.client.streamable_http import streamable_http_client

        entry = self.entry
        async with AsyncExitStack() as stack:
            if entry.url is not None:
                http = await stack.enter_async_context(
                    httpx2.AsyncClient(
                        headers=dict(entry.headers),
                        timeout=httpx2.Timeout(START, read=SILENCE),
                        event_hooks={"response": [self._note_refusal]},
                    )
                )
                transport = streamable_http_client(entry.url, http_client=http)
            else:
                program = StdioServerParameters(
                    command=str(entry.command),
                    args=list(entry.args),
                    env={**get_default_environment(), **entry.env},
                    cwd=entry.cwd,
                    encoding_error_handler="replace",
                )
                transport = stdio_client(program, errlog=self.log)
            read, write = await stack.enter_async_context(transport)
            yield MendedStream(read, self.leave_out), write

    async def _note_refusal(self, response: Any) -> None:
        """Keeps the status of an answer that is an error, which mcp's own errors leave out."""
        code = response.status_code
        self.refusal = f"HTTP {code} {response.reason_phrase}".strip() if code >= 400 else ""

    def leave_out(self, name: str, reason: str) -> None:
        self.problems.append(f"{self.entry.name}: the tool {printable(name)} is left out: {reason}")

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
        elif isinstance(error, FileNotFoundError) and error.filename == self.entry.command:
            text = f"there is no program {error.filename}"
        elif isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"
        elif callable(details := getattr(error, "errors", None)):  # pydantic's
            place = ".".join(str(part) for part in details()[0]["loc"])
            text = f"its answer breaks the protocol ({place}: {details()[0]['msg']})"
        else:
            text = self.refusal or (str(error).strip() or type(error).__name__).splitlines()[0]
            if self.refusal[:8] in ("HTTP 401", "HTTP 403"):
                text += ': expected a key in "headers" that the server takes'
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
    """A result's text; what is none is named."""
    text = "\n".join(_part(part) for part in result.content or ())
    if not text and result.structured_content is not None:
        text = json.dumps(result.structured_content, ensure_ascii=False)
    text = text or "[nothing]"
    if len(text) > RESULT:
        text = f"{text[:RESULT]}\n[cut: {len(text) - RESULT} more characters]"
    failed = bool(result.is_error)
    return McpResult(f"Error: {text}" if failed else text, failed)


def _part(part: Any) -> str:
    """The text of a part of a result: also that of a file in it, and the address of another."""
    inner = getattr(part, "resource", part)
    text = getattr(inner, "text", None)
    if text is None:
        what = getattr(inner, "mime_type", None) or part.type
        text = f"[{what}, which cannot be shown to the model]"
        if uri := getattr(inner, "uri", None):
            text = f"[{what}: {uri}]"
    return str(text)
