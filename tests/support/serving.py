"""A server on a free port of this machine, in a thread of the tests, and plain HTTP to ask it."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import minicpm_mlx as mm
from minicpm_mlx.server.http.settings import Settings
from minicpm_mlx.server.serve import Address, GracefulServer, Mount
from minicpm_mlx.server.service import Service

PATIENCE = 60.0  # seconds before an answer that does not come is called missing


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    """Names in small letters."""
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Live:
    """A server that runs."""

    url: str
    service: Service
    running: GracefulServer
    log: list[str]
    """A line for each request."""

    @property
    def place(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        assert parts.hostname
        assert parts.port
        return parts.hostname, parts.port

    def ask(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """One request on a connection of its own; a body that is no bytes is sent as JSON."""
        connection = http.client.HTTPConnection(*self.place, timeout=PATIENCE)
        given = {"Content-Type": "application/json"} if body is not None else {}
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, path, content, given | dict(headers or {}))
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, found, response.read())
        finally:
            connection.close()


@contextmanager
def serving(
    lm: mm.LM,
    *,
    settings: Mapping[str, Any] | None = None,
    mount: Mount | None = None,
    grace: float = 5.0,
    port: int = 0,
    **options: Any,
) -> Iterator[Live]:
    """Serve `lm` while the block lasts; `options` are the Service's, `settings` the Settings'."""
    log: list[str] = []
    chosen = Settings(**{"log": log.append, **(settings or {})})
    address, begun, urls = Address(port=port), threading.Event(), list[str]()

    def ready(url: str) -> None:
        urls.append(url)
        begun.set()

    service = Service(lm, **options)
    server = GracefulServer(
        service, address=address, settings=chosen, grace=grace, mount=mount, ready=ready
    )
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    try:
        assert begun.wait(PATIENCE), "the server did not begin"
        yield Live(urls[0], service, server, log)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the server did not end"
