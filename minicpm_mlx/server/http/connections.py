"""Connections that are too many, too slow or broken: what goes on below HTTP."""

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
"""Open files that are no connections: weights, logs, the web page's."""


def room_for(connections: int) -> int:
    """How many of so many connections may be open at once. The limit of open files is raised for
    them where it can be: a Mac's shell starts with 256."""
    wanted = connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        new = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (new, hard))
            soft = new
    if soft == resource.RLIM_INFINITY:
        return connections
    return min(connections, max(soft - _OTHER_FILES, 16))


def protocol(settings: Settings) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1 with the limits of `settings`."""
    most = room_for(settings.max_connections)

    class Connection(H11Protocol):
        """Ends a request whose headers or body do not come to an end."""

        _limit: asyncio.TimerHandle | None = None
        _phase: object = None
        _let_in = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            if len(self.connections) >= most:
                transport.write(_FULL)
                transport.close()
                self.transport = transport
                return
            self._let_in = True
            super().connection_made(transport)
            self._expect(h11.IDLE)

        def data_received(self, data: bytes) -> None:
            if not self._let_in:
                return
            super().data_received(data)
            self._expect(self.conn.their_state)

        def connection_lost(self, exc: Exception | None) -> None:
            self._expect(None)
            if self._let_in:
                super().connection_lost(exc)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.conn.their_state is h11.IDLE:  # waits for another request, which may be never
                self._expect(None)

        def send_400_response(self, msg: str) -> None:
            try:
                super().send_400_response(msg)
            except h11.LocalProtocolError:  # an answer has begun; there is no room for another
                self.transport.close()

        def _expect(self, phase: Any) -> None:
            """Start the clock for what the client has to send next."""
            if phase is self._phase:
                return
            self._phase = phase
            if self._limit is not None:
                self._limit.cancel()
                self._limit = None
            if phase is h11.IDLE:
                self._limit = self.loop.call_later(settings.header_seconds, self._late)
            elif phase is h11.SEND_BODY:
                # The guard answers a slow body. This is for one that goes on after the answer.
                self._limit = self.loop.call_later(2 * settings.body_seconds, self.transport.abort)

        def _late(self) -> None:
            with suppress(h11.LocalProtocolError):
                self.send_408()
            self.transport.close()

        def send_408(self) -> None:
            """Say why, and close."""
            headers = [(b"connection", b"close"), (b"content-length", b"0")]
            response = h11.Response(status_code=408, headers=headers, reason=b"Request Timeout")
            for event in (response, h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")

    return Connection
