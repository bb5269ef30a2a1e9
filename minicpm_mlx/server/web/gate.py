"""What of Gradio is let through: the page, its own files, and the events of its buttons.

Gradio's server can do much more than this page needs: take uploads, hand out files, fetch from
other hosts, keep links and runs. None of that can be reached: what is not listed here is not there.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from minicpm_mlx.server.http.api_error import ApiError
from minicpm_mlx.server.http.request_body import check_json, given_again, read

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

FILE = r"[\w-]+(?:\.[\w-]+)*"
"""A name with no way out of its folder."""
READ = re.compile(
    rf"/|/(?:theme\.css|assets/{FILE}|static/(?:{FILE}/)*{FILE})"
    r"|/gradio_api/(?:queue/data|startup-events)"
)
JOIN = "/gradio_api/queue/join"
WRITTEN = re.compile(rf"{JOIN}|/gradio_api/(?:cancel|reset)")
HEARTBEAT = re.compile(r"/gradio_api/heartbeat/\w+")

LARGEST = 2**20
"""Bytes of an event: a message and the settings."""
SECONDS = 30.0
"""Within which it must have come."""
POLICY = (
    "default-src 'self'; script-src 'self' 'nonce-{nonce}'; style-src 'self' 'unsafe-inline'; "
    "img-src data: blob:; font-src 'self' data:; object-src 'none'; frame-src 'none'; "
    "base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
)
"""Scripts are those of the page alone, and nothing comes from another host, whatever a reply says:
should Gradio's cleaning of its HTML ever let something through, the browser does not run it."""


class Gate:
    """ASGI middleware around Gradio's application.

    `files` are our own: type and content by path; `head` is put into that of the page; `events`
    says how many values each of the page's events takes, by its number.
    """

    def __init__(
        self,
        app: App,
        files: Mapping[str, tuple[str, bytes]],
        head: bytes,
        events: Mapping[int, int],
    ) -> None:
        self._app, self._files, self._head, self._events = app, files, head, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        reading = scope["method"] in ("GET", "HEAD")
        if reading and path in self._files:
            kind, content = self._files[path]
            headers = {b"content-type": kind.encode(), b"cache-control": b"no-cache"}
            await _answer(200, headers, content, send)
        elif reading and HEARTBEAT.fullmatch(path):
            # Nothing here needs to know of a tab that is idle, and an open connection would keep
            # the server from ending. The browser does not ask again after a 204.
            await _answer(204, {}, b"", send)
        elif reading and READ.fullmatch(path):
            await self._read(path, scope, receive, send)
        elif scope["method"] == "POST" and WRITTEN.fullmatch(path):
            content = await read(receive, 0, LARGEST, SECONDS, wait=False)
            check_event(content, self._events if path == JOIN else None)
            await self._app(scope, given_again(content, receive), send)
        else:
            raise ApiError(404, f"there is no {scope['method']} {scope['path'][:80]}")

    async def _read(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        if path == "/gradio_api/queue/data":
            await self._app(scope, receive, send)
        elif path == "/":
            # Gradio would look for a saved page named in the query; compressed, it could not be
            # given its nonce.
            headers = [pair for pair in scope["headers"] if pair[0] != b"accept-encoding"]
            page = {**scope, "query_string": b"", "headers": headers}
            await self._app(page, receive, Dressed(send, self._head))
        else:
            await self._app({**scope, "query_string": b""}, receive, send)


class Dressed:
    """`send`, which adds `head` to a page and marks the page's scripts as its own."""

    def __init__(self, send: Send, head: bytes) -> None:
        self._send, self._head = send, head
        self._start: Message = {}
        self._body = bytearray()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._body += message.get("body", b"")
        if message.get("more_body"):
            return
        nonce = secrets.token_urlsafe(16)
        page = self._body.replace(b"</head>", self._head + b"</head>", 1)
        page = page.replace(b"<script", f"<script nonce='{nonce}'".encode())
        headers = {
            b"content-type": b"text/html; charset=utf-8",
            b"content-security-policy": POLICY.format(nonce=nonce).encode(),
            b"cache-control": b"no-store",
        }
        await _answer(self._start["status"], headers, bytes(page), self._send)


def check_event(content: bytes, events: Mapping[int, int] | None) -> None:
    """ApiError 400 unless it is one of `events` (None: it is none that takes values).

    Gradio takes an object among its values for a file to be read, or for a component to be made.
    """
    check_json(content)
    event = json.loads(content)
    values = event.get("data", []) if isinstance(event, dict) else None
    plain = (str, int, float, bool, type(None))
    if not isinstance(values, list) or not all(isinstance(value, plain) for value in values):
        raise ApiError(400, "data: expected a list of texts and numbers", field="data")
    if events is None:
        return
    number = event.get("fn_index")
    if type(number) is not int or number not in events:
        raise ApiError(400, "fn_index: expected the number of an event", field="fn_index")
    if len(values) != events[number]:
        what = f"data: event {number} takes {events[number]} values, got {len(values)}"
        raise ApiError(400, what, field="data")


async def _answer(status: int, headers: dict[bytes, bytes], body: bytes, send: Send) -> None:
    sized = headers if status == 204 else headers | {b"content-length": b"%d" % len(body)}
    await send({"type": "http.response.start", "status": status, "headers": [*sized.items()]})
    await send({"type": "http.response.body", "body": body})
