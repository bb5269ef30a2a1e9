"""Limits on connections below HTTP: their number, and slow or broken requests."""

from __future__ import annotations

import asyncio
import resource
from contextlib import suppress
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .settings import Settings

_FULL = (
    b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Type: text/plain; charset=utf-8\r\nContent-Length: 21\r\n\r\n"
    b"too many connections\n"
)
_OTHER_FILES = 256
"""Open files that are not connections: weights, logs, files of the web page."""


def connection_limit(connections: int) -> int:
    """How many of `connections` can be open at once.

    Raises the process's limit of open files if it can: a shell on a Mac starts with 256.
    """
    files = connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < files:
        new = files if hard == resource.RLIM_INFINITY else min(files, hard)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (new, hard))
            soft = new
    if soft == resource.RLIM_INFINITY:
        return connections
    return min(connections, max(soft - _OTHER_FILES, 16))


class LimitedConnection(H11Protocol):
    """Closes a connection whose headers or body do not end in time."""

    settings: Settings
    limit: int
    _timer: asyncio.TimerHandle | None = None
    _phase: object = None
    _accepted = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.connections) >= self.limit:
            transport.write(_FULL)
            transport.close()
            self.transport = transport
            return
        self._accepted = True
        super().connection_made(transport)
        self._expect(h11.IDLE)

    def data_received(self, data: bytes) -> None:
        if not self._accepted:
            return
        super().data_received(data)
        self._expect(self.conn.their_state)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        if self._accepted:
            super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE:  # the next request may never come
            self._expect(None)

    def send_400_response(self, msg: str) -> None:
        try:
            super().send_400_response(msg)
        except h11.LocalProtocolError:  # a response has begun; no other can follow
            self.transport.close()

    def _expect(self, phase: Any) -> None:
        """Starts the timer for what the client must send next."""
        if phase is self._phase:
            return
        self._phase = phase
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if phase is h11.IDLE:
            self._timer = self.loop.call_later(self.settings.header_seconds, self._on_timeout)
        elif phase is h11.SEND_BODY:
            # The guard answers a slow body; this ends one that continues after the response.
            self._timer = self.loop.call_later(2 * self.settings.body_seconds, self.transport.abort)

    def _on_timeout(self) -> None:
        with suppress(h11.LocalProtocolError):
            self.send_408()
        self.transport.close()

    def send_408(self) -> None:
        headers = [(b"connection", b"close"), (b"content-length", b"0")]
        response = h11.Response(status_code=408, headers=headers, reason=b"Request Timeout")
        for event in (response, h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")


def protocol(settings: Settings) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1 protocol with the limits of `settings`."""
    limit = connection_limit(settings.max_connections)
    return type("Connection", (LimitedConnection,), {"settings": settings, "limit": limit})
