"""Checks every request before its route, and adds headers to every response.

A page of another site can make a browser send requests to this machine. Three checks keep it out:
the Host that is called (against DNS rebinding), the Origin of the page, and Sec-Fetch-Site for
requests without Origin. Off loopback an API key is required too.
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
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from h11 import LocalProtocolError
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import request_body
from .api_error import ApiError
from .settings import Settings
from .streaming import ClientDisconnected

ResponseObserver = Callable[[Scope, int, float], None]
"""Called for every response with the request, the status (499: the client had left) and seconds."""
Renderer = Callable[[Scope, ApiError, dict[str, str]], JSONResponse]
"""Makes a response from request, error and headers, in the form of the API that was asked."""

PAGES = ("/", "/docs", "/chat")
"""Pages that links on other sites may open."""
CHALLENGE = 'Basic realm="minicpm-mlx", charset="UTF-8"'
DATA_POLICY = "default-src 'none'; frame-ancestors 'none'"
PAGE_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'"
)
"""For pages without their own policy: nothing from, and nothing to, another host."""
SECURITY_HEADERS = {
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
        self,
        app: ASGIApp,
        settings: Settings,
        render_error: Renderer,
        observe: ResponseObserver | None = None,
    ):
        self._app, self._settings = app, settings
        self._render_error, self._observe = render_error, observe
        machine = socket.gethostname().lower().removesuffix(".local")
        hosts = ["localhost", machine, f"{machine}.local", *settings.allowed_hosts]
        self._hosts = {host.lower() for host in hosts}
        self._origins = {origin.lower() for origin in settings.allowed_origins}
        self._active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, sender = time.perf_counter(), _ResponseSender(receive, send)
        method = scope["method"]
        scope = _canonical(scope)
        try:
            await self._respond(scope, receive, sender)
        except ClientDisconnected:
            sender.status = sender.status or 499
        except asyncio.CancelledError:  # the server is ending
            sender.status = sender.status or 503
            raise
        except Exception:
            # Starlette's own handler has responded by now, if it could.
            _log.exception("%s %s", method, _printable_path(scope))
            if not sender.status:
                failure = ApiError("the server failed; see its log", status=500)
                await self._refusal(scope, failure)(scope, receive, sender)
        finally:
            self._report({**scope, "method": method}, sender.status, time.perf_counter() - start)

    async def _respond(self, scope: Scope, receive: Receive, sender: _ResponseSender) -> None:
        cross_origin = False
        try:
            cross_origin = self._check_origin(scope, Headers(scope=scope))
            app: ASGIApp = _allow_origin(self._admit) if cross_origin else self._admit
            await app(scope, receive, sender)
        except ApiError as error:
            if not sender.status:
                response: ASGIApp = self._refusal(scope, error)
                response = _allow_origin(response) if cross_origin else response
                await response(scope, receive, sender)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Checks the key, the body and the load, and calls the application."""
        headers = Headers(scope=scope)
        self._check_key(headers)
        self._check_framing(scope, headers)
        if self._active >= self._settings.max_requests and scope["path"] != "/health":
            raise ApiError(
                f"the server is answering {self._active} requests and takes at most "
                f"{self._settings.max_requests}; try again in a moment",
                status=429,
                code="too_many_requests",
                retry_after=1,
            )
        self._active += 1
        try:
            receive = await self._read_body(scope, headers, receive)
            await self._app(scope, receive, send)
        finally:
            self._active -= 1

    def _refusal(self, scope: Scope, error: ApiError) -> JSONResponse:
        headers: dict[str, str] = {}
        if error.status == 401:
            headers["WWW-Authenticate"] = CHALLENGE
        # The rest of such a body is not read, so no other request can follow it.
        if error.status in (408, 413) or _has_two_lengths(Headers(scope=scope)):
            headers["Connection"] = "close"
        return self._render_error(scope, error, headers)

    def _check_origin(self, scope: Scope, headers: Headers) -> bool:
        """Whether the request comes from a page of an allowed other site; ApiError 403 if not
        allowed."""
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or not self._is_own_host(hosts[0]):
            raise ApiError(
                f"host {_quote(hosts)} is not served; use localhost or an address, "
                "or start the server with --allowed-host",
                status=403,
                code="host_not_allowed",
            )
        if not origins:
            self._check_fetch_site(scope, headers)
            return False
        origin = origins[0].lower()
        if len(origins) == 1 and origin in self._origins:
            return True
        if len(origins) == 1 and origin != "null" and _netloc(origin) == hosts[0].lower():
            return False
        raise ApiError(
            f"pages of {_quote(origins)} may not call this server; "
            "start it with --allowed-origin to let them",
            status=403,
            code="origin_not_allowed",
        )

    def _is_own_host(self, host: str) -> bool:
        if not (match := _HOST.fullmatch(host)):
            return False
        name = match[1].lower()
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return name in self._hosts or name.endswith(".localhost")
        return True

    def _check_fetch_site(self, scope: Scope, headers: Headers) -> None:
        """Browsers send no Origin for images, scripts and links; of these only links may come."""
        site = headers.get("sec-fetch-site", "none")
        page = scope["path"].rstrip("/") in {path.rstrip("/") for path in PAGES}
        if site in ("cross-site", "same-site") and not (
            page and headers.get("sec-fetch-mode") == "navigate"
        ):
            raise ApiError(
                "pages of other sites may not call this server",
                status=403,
                code="origin_not_allowed",
            )

    def _check_key(self, headers: Headers) -> None:
        if self._settings.api_key is None:
            return
        key = self._settings.api_key.encode()
        sent = [*map(_parse_key, headers.getlist("authorization")), *headers.getlist("x-api-key")]
        # In constant time, so that the time reveals nothing about the key.
        if not any(hmac.compare_digest(value.encode("latin-1"), key) for value in sent):
            raise ApiError(
                "the API key is missing or wrong; "
                "send it as `Authorization: Bearer KEY` or `x-api-key: KEY`",
                status=401,
                code="invalid_api_key",
            )

    def _check_framing(self, scope: Scope, headers: Headers) -> None:
        if _has_two_lengths(headers):
            # If a proxy uses one and we the other, a body can hide a request.
            raise ApiError("Transfer-Encoding and Content-Length exclude each other; send one")
        if "transfer-encoding" not in headers and not _content_length(headers):
            return
        if scope["method"] in ("GET", "HEAD"):
            raise ApiError(f"{scope['method']} takes no body; send it without one")
        coding = headers.get("content-encoding", "identity").strip().lower()
        if coding != "identity":
            raise ApiError(
                f"expected no Content-Encoding, got {coding[:80]!r}; send it plain", status=415
            )
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if _is_page(scope) or kind == "application/json" or kind.endswith("+json"):
            return
        if not scope["path"].startswith("/api/"):
            raise ApiError(
                f"expected Content-Type: application/json, got {kind[:80]!r}", status=415
            )
        # Ollama ignores the type, because `curl -d` sends another one. Pages can send that one
        # without a preflight, which does no harm: their origin has been checked.
        MutableHeaders(scope=scope)["content-type"] = "application/json"

    async def _read_body(self, scope: Scope, headers: Headers, receive: Receive) -> Receive:
        """Reads and checks the body; returns a `receive` for it."""
        if scope["method"] in ("GET", "HEAD"):
            return receive
        content = await request_body.read(
            receive,
            _content_length(headers),
            self._settings.max_body,
            self._settings.body_seconds,
            wait=headers.get("expect", "").lower() == "100-continue",
        )
        if content and not _is_page(scope):
            request_body.check_json(content)
        return request_body.replay(content, receive)

    def _report(self, scope: Scope, status: int, seconds: float) -> None:
        if self._observe:
            self._observe(scope, status, seconds)
        if self._settings.log:
            client = (scope.get("client") or ("-",))[0]
            request = f"{client} {scope['method'][:16]} {_printable_path(scope)}"
            self._settings.log(f"{request} {status} {seconds:.2f} s")


def _allow_origin(app: ASGIApp) -> ASGIApp:
    """Adds CORS headers, and answers preflights. The origin itself has been checked before."""
    return CORSMiddleware(
        app,
        allow_origin_regex=".*",
        allow_methods=["GET", "POST", "PUT", "DELETE", "HEAD"],
        allow_headers=["*"],
        allow_private_network=True,
        expose_headers=["Retry-After", "request-id", "x-request-id"],
    )


class _ResponseSender:
    """A `send` that adds the security headers and notes the status."""

    def __init__(self, receive: Receive, send: Send):
        self._receive, self._send = receive, send
        self.status = 0
        """Of the response; 0 before it begins."""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            is_html = headers.get("content-type", "").startswith("text/html")
            headers.setdefault("Content-Security-Policy", PAGE_POLICY if is_html else DATA_POLICY)
            headers.update(SECURITY_HEADERS)
        try:
            await self._send(message)
        except LocalProtocolError:
            # The client sent invalid HTTP meanwhile, and uvicorn has responded to that.
            while (await self._receive())["type"] != "http.disconnect":
                pass
            raise ClientDisconnected from None


def _parse_key(authorization: str) -> str:
    """The key in an Authorization header: a bearer token, or the password of a browser's dialog."""
    kind, _, value = authorization.partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() != "basic":
        return ""
    try:
        return base64.b64decode(value, validate=True).partition(b":")[2].decode("latin-1")
    except binascii.Error:
        return ""


def _netloc(origin: str) -> str:
    """HOST[:PORT] of SCHEME://HOST[:PORT]."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _has_two_lengths(headers: Mapping[str, str]) -> bool:
    return "transfer-encoding" in headers and "content-length" in headers


def _content_length(headers: Mapping[str, str]) -> int:
    length = headers.get("content-length", "0")
    return int(length) if re.fullmatch(r"[0-9]{1,18}", length) else 0


def _canonical(scope: Scope) -> Scope:
    """A request as the routes know it: HEAD is GET whose body the server leaves out, and slashes at
    the end of a path or of the client's base URL mean nothing. The web chat has its own rules."""
    if _is_page(scope):
        return scope
    path = re.sub("/+", "/", scope["path"])
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    canonical = {**scope, "method": method, "path": path}
    if not _is_page(canonical):
        canonical["path"] = path.rstrip("/") or "/"
    return canonical


def _is_page(scope: Scope) -> bool:
    """Whether the path belongs to the web chat, which checks its own requests."""
    path: str = scope["path"]
    return path == "/chat" or path.startswith("/chat/")


def _printable_path(scope: Scope) -> str:
    """The path as it was sent, which is ASCII, without the query, which may be private."""
    raw: bytes = scope.get("raw_path") or scope["path"].encode("ascii", "backslashreplace")
    return raw.partition(b"?")[0][:100].decode("ascii", "backslashreplace")


def _quote(values: list[str]) -> str:
    return repr(", ".join(values)[:80])
