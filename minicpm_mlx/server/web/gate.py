"""Lets through only what the page needs of Gradio: the page, its files, and events of its buttons.

Gradio's server can also take uploads, serve files, fetch from other hosts, and keep links and runs.
Paths that are not listed here cannot be reached.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..http.api_error import ApiError
from ..http.request_body import check_json, read, replay

FILE = r"[\w-]+(?:\.[\w-]+)*"
"""A file name that cannot leave its folder."""
READ_PATHS = re.compile(
    rf"/|/(?:theme\.css|assets/{FILE}|static/(?:{FILE}/)*{FILE})"
    r"|/gradio_api/(?:queue/data|startup-events)"
)
JOIN = "/gradio_api/queue/join"
EVENT_PATHS = re.compile(rf"{JOIN}|/gradio_api/(?:cancel|reset)")
HEARTBEAT = re.compile(r"/gradio_api/heartbeat/\w+")

MAX_EVENT = 2**22
"""Bytes of an event: the conversation, a message and the settings."""
SECONDS = 30.0
"""An event must arrive within this time."""
POLICY = (
    "default-src 'self'; script-src 'self' 'nonce-{nonce}'; style-src 'self' 'unsafe-inline'; "
    "img-src data: blob:; font-src 'self' data:; object-src 'none'; frame-src 'none'; "
    "base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
)
"""Only the page's own scripts run, and nothing comes from other hosts. If Gradio's sanitizer ever
lets a script of a reply through, the browser does not run it."""


class Gate:
    """ASGI middleware around Gradio's application.

    `files` are our own: type and content by path. `head` is added to that of the page. `events` has
    the number of values of each event of the page.
    """

    def __init__(
        self,
        app: ASGIApp,
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
            response = Response(content, headers={"Cache-Control": "no-cache"}, media_type=kind)
            await response(scope, receive, send)
        elif reading and HEARTBEAT.fullmatch(path):
            # The server need not know about idle tabs, and an open connection would delay its end.
            # The browser does not reconnect after a 204.
            await Response(status_code=204)(scope, receive, send)
        elif reading and READ_PATHS.fullmatch(path):
            await self._read(path, scope, receive, send)
        elif scope["method"] == "POST" and EVENT_PATHS.fullmatch(path):
            content = await read(receive, 0, MAX_EVENT, SECONDS, wait=False)
            check_event(content, self._events if path == JOIN else None)
            await self._app(scope, replay(content, receive), send)
        else:
            raise ApiError(f"there is no {scope['method']} {scope['path'][:80]}", status=404)

    async def _read(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        if path == "/gradio_api/queue/data":
            await self._app(scope, receive, send)
        elif path == "/":
            # With a query Gradio would look for a saved page; a compressed page cannot be given its
            # nonce.
            headers = [pair for pair in scope["headers"] if pair[0] != b"accept-encoding"]
            page = {**scope, "query_string": b"", "headers": headers}
            await self._app(page, receive, PageSender(page, receive, send, self._head))
        else:
            await self._app({**scope, "query_string": b""}, receive, send)


class PageSender:
    """A `send` that adds `head` to a page, and the policy's nonce to the page's scripts."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, head: bytes) -> None:
        self._connection, self._head = (scope, receive, send), head
        self._status = 200
        self._body = bytearray()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            return
        self._body += message.get("body", b"")
        if message.get("more_body"):
            return
        nonce = secrets.token_urlsafe(16)
        page = self._body.replace(b"</head>", self._head + b"</head>", 1)
        page = page.replace(b"<script", f"<script nonce='{nonce}'".encode())
        headers = {
            "Content-Security-Policy": POLICY.format(nonce=nonce),
            "Cache-Control": "no-store",
        }
        response = Response(bytes(page), self._status, headers, media_type="text/html")
        await response(*self._connection)


def check_event(content: bytes, events: Mapping[int, int] | None) -> None:
    """ApiError 400 unless `content` is one of `events` (None: a request without event).

    Among the values only text and numbers are allowed: for an object, Gradio would read a file or
    create a component.
    """
    check_json(content)
    event = json.loads(content)
    values = event.get("data", []) if isinstance(event, dict) else None
    plain = (str, int, float, bool, type(None))
    if not isinstance(values, list) or not all(isinstance(value, plain) for value in values):
        raise ApiError("data: expected a list of texts and numbers", field="data")
    if events is None:
        return
    number = event.get("fn_index")
    if type(number) is not int or number not in events:
        raise ApiError("fn_index: expected the number of an event", field="fn_index")
    if len(values) != events[number]:
        message = f"data: event {number} takes {events[number]} values, got {len(values)}"
        raise ApiError(message, field="data")
