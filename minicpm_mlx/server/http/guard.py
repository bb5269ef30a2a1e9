"""What stands before every route: who may ask, from where, how much, and what every answer says.

A page of another site can make a browser send requests to this machine. Three checks keep it out:
the Host it calls (against DNS rebinding), the Origin it comes from, and what the browser says of
requests that carry none. Off loopback an API key is asked for besides.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import logging
import re
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse, Response
from h11 import LocalProtocolError
from starlette.datastructures import Headers, MutableHeaders

from . import request_body
from .api_error import ApiError
from .settings import Settings
from .streaming import Gone

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Counted = Callable[[Scope, int, float], None]
"""Told of every answer: to what, its status (0: the client had left), seconds."""
Renderer = Callable[[str, ApiError, dict[str, str]], JSONResponse]
"""Path, error and headers to the response in the form of that path's API."""

PAGES = ("/", "/docs", "/chat")
"""What a browser may be sent to by a link on another site."""
CHALLENGE = 'Basic realm="minicpm-mlx", charset="UTF-8"'
DATA_POLICY = "default-src 'none'; frame-ancestors 'none'"
PAGE_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'"
)
"""For pages that bring no policy of their own: nothing from, and nothing to, another host."""
ALWAYS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}

_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:\[\]/@]+?)\.?(:[0-9]{1,5})?")
_log = logging.getLogger(__name__)


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(
        self, app: App, settings: Settings, render: Renderer, counted: Counted | None = None
    ):
        self._app, self._settings = app, settings
        self._render, self._counted = render, counted
        own = socket.gethostname().lower().removesuffix(".local")
        names = ["localhost", own, f"{own}.local", *settings.allowed_hosts]
        self._names = {name.lower() for name in names}
        self._origins = {origin.lower() for origin in settings.allowed_origins}
        self._busy = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, sent = time.perf_counter(), _Sent(scope["path"], receive, send, self._render)
        try:
            await self._answer(scope, receive, sent)
        except Gone:
            sent.status = sent.status or 499
        except asyncio.CancelledError:  # the server is ending
            sent.status = sent.status or 503
            raise
        except Exception:
            # Starlette's own handler has answered by now, where it could.
            _log.exception("%s %s", scope["method"], _shown(scope))
            if not sent.status:
                await sent.refuse(scope, receive, ApiError(500, "the server failed; see its log"))
        finally:
            self._tell(scope, sent.status, time.perf_counter() - start)

    async def _answer(self, scope: Scope, receive: Receive, sent: _Sent) -> None:
        headers = Headers(scope=scope)
        try:
            sent.cors = self._checked_origin(scope, headers)
            if sent.cors and "access-control-request-method" in headers:
                await Response(status_code=204, headers=_preflight(headers))(scope, receive, sent)
                return
            self._check_key(headers)
            self._check_framing(scope, headers)
            if self._busy >= self._settings.max_requests and scope["path"] != "/health":
                raise ApiError(
                    429,
                    f"requests being answered already: {self._busy}, of at most "
                    f"{self._settings.max_requests}; try again in a moment",
                    code="too_many_requests",
                    retry_after=1,
                )
            self._busy += 1
            try:
                receive = await self._whole(scope, headers, receive)
                await self._app(scope, receive, sent)
            finally:
                self._busy -= 1
        except ApiError as refusal:
            await sent.refuse(scope, receive, refusal)

    def _checked_origin(self, scope: Scope, headers: Headers) -> str:
        """The origin that is to be allowed by CORS headers, or ""."""
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            raise ApiError(
                403,
                f"host {_short(hosts)} is not served; use localhost or an address, "
                "or start the server with --allowed-host",
                code="host_not_allowed",
            )
        if not origins:
            self._check_unnamed_origin(scope, headers)
            return ""
        origin = origins[0].lower()
        if len(origins) == 1 and origin in self._origins:
            return origins[0]
        if len(origins) == 1 and origin != "null" and _place(origin) == hosts[0].lower():
            return ""
        raise ApiError(
            403,
            f"pages of {_short(origins)} may not call this server; "
            "start it with --allowed-origin to let them",
            code="origin_not_allowed",
        )

    def _is_ours(self, host: str) -> bool:
        if not (found := _HOST.fullmatch(host)):
            return False
        name = found[1].lower()
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return name in self._names or name.endswith(".localhost")
        return True

    def _check_unnamed_origin(self, scope: Scope, headers: Headers) -> None:
        """Browsers name no origin for images, scripts and links; of these only links may come."""
        site = headers.get("sec-fetch-site", "none")
        page = scope["path"].rstrip("/") in {path.rstrip("/") for path in PAGES}
        if site in ("cross-site", "same-site") and not (
            page and headers.get("sec-fetch-mode") == "navigate"
        ):
            raise ApiError(
                403, "pages of other sites may not call this server", code="origin_not_allowed"
            )

    def _check_key(self, headers: Headers) -> None:
        if self._settings.api_key is None:
            return
        key = self._settings.api_key.encode()
        given = [*map(_key_of, headers.getlist("authorization")), *headers.getlist("x-api-key")]
        # Each in constant time: how long it takes says nothing of the key.
        if not any(hmac.compare_digest(one.encode("latin-1"), key) for one in given):
            raise ApiError(
                401,
                "the API key is missing or wrong; "
                "send it as `Authorization: Bearer KEY` or `x-api-key: KEY`",
                code="invalid_api_key",
            )

    def _check_framing(self, scope: Scope, headers: Headers) -> None:
        if _framed_twice(headers):
            # Where a proxy believes the one and we the other, a body can hide a request.
            raise ApiError(400, "Transfer-Encoding and Content-Length exclude each other; send one")
        if "transfer-encoding" not in headers and not _declared(headers):
            return
        if scope["method"] in ("GET", "HEAD"):
            raise ApiError(400, f"{scope['method']} takes no body; send it without one")
        coding = headers.get("content-encoding", "identity").strip().lower()
        if coding != "identity":
            raise ApiError(415, f"expected no Content-Encoding, got {coding[:80]!r}; send it plain")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if _is_page(scope) or kind == "application/json" or kind.endswith("+json"):
            return
        if not scope["path"].startswith("/api/"):
            raise ApiError(415, f"expected Content-Type: application/json, got {kind[:80]!r}")
        # Ollama reads JSON whatever it is called, as `curl -d` calls it something else. That a
        # page may send such a type unasked does no harm: its origin has been checked.
        MutableHeaders(scope=scope)["content-type"] = "application/json"

    async def _whole(self, scope: Scope, headers: Headers, receive: Receive) -> Receive:
        """A `receive` whose body is there already, and JSON."""
        if scope["method"] in ("GET", "HEAD"):
            return receive
        content = await request_body.read(
            receive,
            _declared(headers),
            self._settings.max_body,
            self._settings.body_seconds,
            wait=headers.get("expect", "").lower() == "100-continue",
        )
        if content and not _is_page(scope):
            request_body.check_json(content)
        return request_body.given_again(content, receive)

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        if self._counted:
            self._counted(scope, status, seconds)
        if self._settings.log:
            client = (scope.get("client") or ("-",))[0]
            line = f"{client} {scope['method'][:16]} {_shown(scope)} {status} {seconds:.2f} s"
            self._settings.log(line)


class _Sent:
    """`send`, which adds to every answer what all of them say."""

    def __init__(self, path: str, receive: Receive, send: Send, render: Renderer):
        self._path, self._receive, self._send, self._render = path, receive, send, render
        self.status = 0
        """Of the answer that has begun; 0: none has."""
        self.cors = ""
        """The origin whose pages may read the answer."""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._mark(MutableHeaders(scope=message))
        try:
            await self._send(message)
        except LocalProtocolError:
            # What the client sent meanwhile was no HTTP, which it has been told already.
            while (await self._receive())["type"] != "http.disconnect":
                pass
            raise Gone from None

    def _mark(self, headers: MutableHeaders) -> None:
        html = headers.get("content-type", "").startswith("text/html")
        headers.setdefault("Content-Security-Policy", PAGE_POLICY if html else DATA_POLICY)
        for name, value in ALWAYS.items():
            headers[name] = value
        if self.cors:
            headers["Access-Control-Allow-Origin"] = self.cors
            headers["Access-Control-Expose-Headers"] = "Retry-After, request-id, x-request-id"
            headers.add_vary_header("Origin")

    async def refuse(self, scope: Scope, receive: Receive, refusal: ApiError) -> None:
        """Say so, if nothing else has been said; a body that is not read to its end is cut off."""
        if self.status:
            return
        headers: dict[str, str] = {}
        if refusal.status == 401:
            headers["WWW-Authenticate"] = CHALLENGE
        if refusal.status in (408, 413) or _framed_twice(Headers(scope=scope)):
            headers["Connection"] = "close"
        await self._render(self._path, refusal, headers)(scope, receive, self)


def _preflight(headers: Mapping[str, str]) -> dict[str, str]:
    """What a browser asks before it sends more than a form could."""
    asked = headers.get("access-control-request-headers", "")
    names = [name.strip() for name in asked.split(",")]
    allowed = {
        "Access-Control-Allow-Methods": "GET, POST, PUT, DELETE, HEAD",
        "Access-Control-Allow-Headers": ", ".join(
            name for name in names[:64] if re.fullmatch(r"[A-Za-z0-9-]{1,64}", name)
        ),
        "Access-Control-Max-Age": "600",
    }
    if headers.get("access-control-request-private-network") == "true":
        allowed["Access-Control-Allow-Private-Network"] = "true"
    return allowed


def _key_of(authorization: str) -> str:
    """The key in an Authorization header: a Bearer's, or the password a browser asked for."""
    kind, _, value = authorization.partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() != "basic":
        return ""
    try:
        return base64.b64decode(value, validate=True).partition(b":")[2].decode("latin-1")
    except binascii.Error:
        return ""


def _place(origin: str) -> str:
    """HOST[:PORT] of SCHEME://HOST[:PORT]."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _framed_twice(headers: Mapping[str, str]) -> bool:
    return "transfer-encoding" in headers and "content-length" in headers


def _declared(headers: Mapping[str, str]) -> int:
    length = headers.get("content-length", "0")
    return int(length) if re.fullmatch(r"[0-9]{1,18}", length) else 0


def _is_page(scope: Scope) -> bool:
    """Whether the path belongs to the web chat, whose requests are its own affair."""
    path: str = scope["path"]
    return path == "/chat" or path.startswith("/chat/")


def _shown(scope: Scope) -> str:
    """The path as it was sent, so in printable ASCII; what follows a ? may be private."""
    raw: bytes = scope.get("raw_path") or scope["path"].encode("ascii", "backslashreplace")
    return raw.partition(b"?")[0][:100].decode("ascii", "backslashreplace")


def _short(values: list[str]) -> str:
    return repr(", ".join(values)[:80])
