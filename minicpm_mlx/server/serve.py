"""A server from its start to its end: addresses, keys, signals."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ..errors import InvalidArgumentError
from .app import create_app
from .http.connections import protocol
from .http.settings import Settings, check_key
from .service import Service

KEY = "MINICPM_MLX_API_KEY"
"""The environment variable that holds the key where none is given."""
KEEP_ALIVE = 65
"""Seconds that a connection may wait for another request; clients give theirs up before."""
Mount = Callable[[FastAPI, Service], None]


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where to listen, and by what certificate clients know the server."""

    host: str = "127.0.0.1"
    port: int = 8080
    """0: any that is free."""
    certificate: Path | None = None
    """PEM file, for https."""
    private_key: Path | None = None
    """PEM file, where the certificate's does not hold it."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise InvalidArgumentError(f"port must be 0 to 65535, got {self.port}")
        if self.private_key is not None and self.certificate is None:
            raise InvalidArgumentError("a TLS key needs its certificate too (--tls-cert)")
        if self.certificate is not None:
            self._check(self.certificate)

    def _check(self, certificate: Path) -> None:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, self.private_key, password="")
        except (OSError, ssl.SSLError) as error:
            raise InvalidArgumentError(
                f"{certificate}: expected a certificate and its key in PEM, without a "
                f"passphrase; {error.strerror or error}"
            ) from None


def key_of(given: str | None, file: Path | None) -> str | None:
    """The API key: as given, or a file's content, or the environment's; None: there is none."""
    if given is not None and file is not None:
        raise InvalidArgumentError("--api-key and --api-key-file both give a key; leave one")
    if file is None:
        return given if given is not None else os.environ.get(KEY) or None
    try:
        key = file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        raise InvalidArgumentError(f"{file}: {error.strerror or error}") from None
    check_key(key, f"{file}: the API key")
    return key


def readable_by_others(file: Path) -> bool:
    """Whether other users of this machine can read a key's file."""
    return bool(file.stat().st_mode & 0o044)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server on `host`."""
    with suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host.lower() == "localhost" or host.lower().endswith(".localhost")


def listen(address: Address, api_key: str | None) -> list[socket.socket]:
    """Sockets on `address`; clients that come before the server runs wait.

    InvalidArgumentError where other machines could come without a key, or another has the port.
    """
    if api_key is None and not is_loopback(address.host):
        raise InvalidArgumentError(
            f"{address.host} can be reached by other machines, so an API key is needed: give "
            f"--api-key-file FILE or set {KEY} (a key: `openssl rand -hex 16`), or listen on "
            "127.0.0.1"
        )
    host, port = address.host.strip("[]"), address.port
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, place in dict.fromkeys((one[0], one[4][0]) for one in found):
            with suppress_missing(family, last=not sockets and family == found[-1][0]):
                one = socket.create_server((str(place), port), family=family, backlog=1024)
                # asyncio has small writes sent at once only where the socket says it is of TCP;
                # else each waits for the client's word that it has the one before.
                tcp = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, one.detach())
                sockets.append(tcp)
                port = tcp.getsockname()[1]
    except OSError as error:
        for one in sockets:
            one.close()
        raise InvalidArgumentError(_why_not(host, port, error)) from None
    return sockets


@contextmanager
def suppress_missing(family: int, *, last: bool) -> Iterator[None]:
    """A name such as localhost may have an IPv6 address on a machine that has no IPv6."""
    try:
        yield
    except OSError as error:
        missing = error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
        if last or family != socket.AF_INET6 or not missing:
            raise


def _why_not(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is taken; end what listens there, or give another with --port"
    if error.errno == errno.EACCES:
        return f"port {port} is for the system's own services; give one above 1023 with --port"
    return f"cannot listen on {host}: {error.strerror or error}; try --host 127.0.0.1"


def url_of(address: Address, sockets: Sequence[socket.socket]) -> str:
    """What a browser on this machine opens."""
    host, port = address.host.strip("[]"), sockets[0].getsockname()[1]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{'https' if address.certificate else 'http'}://{host}:{port}"


def serve(
    service: Service,
    *,
    address: Address | None = None,
    settings: Settings | None = None,
    sockets: Sequence[socket.socket] | None = None,
    grace: float = 10.0,
    mount: Mount | None = None,
    ready: Callable[[str], None] | None = None,
    ending: Callable[[], None] | None = None,
) -> None:
    """Answer requests until a signal comes (Ctrl-C: raises KeyboardInterrupt then; SIGTERM: not).

    At the first no more requests are taken, and replies have `grace` seconds to finish; at the
    second all ends at once. `sockets` are those of `listen`, made here where they are not given.
    `mount` adds pages to the application; `ready` is told the URL as soon as there are answers, and
    `ending` is called at the first signal. A rank that follows another ends with that.

        serve(Service(mm.load("demo")))
    """
    if service.follows:
        for number in (signal.SIGINT, signal.SIGTERM):  # the first rank is told too, and ends all
            signal.signal(number, signal.SIG_IGN)
        service.follow()
        return
    server = running(
        service,
        address=address or Address(),
        settings=settings or Settings(),
        sockets=sockets,
        grace=grace,
        mount=mount,
        ready=ready,
        ending=ending,
    )
    server.run()
    if server.signalled == signal.SIGINT:
        raise KeyboardInterrupt


def running(
    service: Service,
    *,
    address: Address,
    settings: Settings,
    sockets: Sequence[socket.socket] | None = None,
    grace: float = 10.0,
    mount: Mount | None = None,
    ready: Callable[[str], None] | None = None,
    ending: Callable[[], None] | None = None,
) -> Running:
    """What `serve` runs: `run` blocks until `should_exit` is set, on any thread."""
    if not 0 <= grace <= 3600:
        raise InvalidArgumentError(f"grace must be 0 to 3600 seconds, got {grace}")
    taken = list(sockets or listen(address, settings.api_key))
    app = create_app(service, settings)
    if mount is not None:
        mount(app, service)
    url = url_of(address, taken)
    config = uvicorn.Config(
        app,
        http=protocol(settings),
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=2,
        ssl_certfile=address.certificate,
        ssl_keyfile=address.private_key,
    )
    return Running(
        config,
        service,
        sockets=taken,
        grace=grace,
        ready=lambda: ready(url) if ready else None,
        ending=ending or (lambda: None),
    )


class Running(uvicorn.Server):
    """uvicorn's server, with replies that may finish and one that ends when told twice."""

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        *,
        sockets: list[socket.socket],
        grace: float,
        ready: Callable[[], None],
        ending: Callable[[], None],
    ):
        super().__init__(config)
        self._service, self._sockets, self._grace = service, sockets, grace
        self._ready, self._ending = ready, ending
        self.signalled: int | None = None
        """The first signal that came."""
        self._at_once = asyncio.Event()

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        super().run(sockets or self._sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but does not send the signals once more when all is over."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            one: signal.signal(one, self.handle_exit) for one in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """At the first signal begin to end, at the second stop waiting; a third is not ours."""
        if not self.should_exit:
            self.signalled = sig
            self.should_exit = True
            return
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, signal.SIG_DFL)
        self._loop.call_soon_threadsafe(self._at_once.set)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let replies finish, then end."""
        self._ending()
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        closing = asyncio.ensure_future(self._service.close(self._grace))
        waiting = asyncio.ensure_future(self._at_once.wait())
        await asyncio.wait({closing, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if not closing.done():
            # As if every client had left: what they asked for is given up.
            for connection in list(self.server_state.connections):
                connection.transport.abort()
        await closing
        await super().shutdown(sockets)
