"""Starts and ends a server: address, key, signals."""

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
"""The environment variable that holds the key if none is given."""
KEEP_ALIVE = 65
"""Seconds that a connection may wait for another request; clients close theirs earlier."""
Mount = Callable[[FastAPI, Service], None]


@dataclass(frozen=True, kw_only=True)
class Address:
    """Host and port to listen on, and the certificate for https."""

    host: str = "127.0.0.1"
    port: int = 8080
    """0: any free one."""
    certificate: Path | None = None
    """PEM file, for https."""
    private_key: Path | None = None
    """PEM file, if the certificate's file does not hold the key."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise InvalidArgumentError(f"must be 0 to 65535, got {self.port}", field="port")
        if self.private_key is not None and self.certificate is None:
            raise InvalidArgumentError("a TLS key needs its certificate too (--tls-cert)")
        if self.certificate is None:
            return
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate, self.private_key, password="")
        except (OSError, ssl.SSLError) as error:
            raise InvalidArgumentError(
                f"{self.certificate}: expected a certificate and its key in PEM, without a "
                f"passphrase; {error.strerror or error}"
            ) from None


def load_key(key: str | None, file: Path | None) -> str | None:
    """The API key from the option, a file or the environment; None if there is none."""
    if key is not None and file is not None:
        raise InvalidArgumentError("--api-key and --api-key-file both give a key; leave one out")
    if file is None:
        return key if key is not None else os.environ.get(KEY) or None
    try:
        key = file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        raise InvalidArgumentError(f"{file}: {error.strerror or error}") from None
    check_key(key, f"{file}: the API key")
    return key


def readable_by_others(file: Path) -> bool:
    """Whether other users of this machine can read the file of a key."""
    return bool(file.stat().st_mode & 0o044)


def is_loopback(host: str) -> bool:
    """Whether a server on `host` can be reached from this machine only."""
    with suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host.lower() == "localhost" or host.lower().endswith(".localhost")


def listen(address: Address, api_key: str | None) -> list[socket.socket]:
    """Sockets on `address`. Clients that connect before the server runs wait.

    InvalidArgumentError if other machines could connect without a key, or the port is taken.
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
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, ip in dict.fromkeys((info[0], info[4][0]) for info in infos):
            with _skip_missing_ipv6(family, last=not sockets and family == infos[-1][0]):
                opened = socket.create_server((str(ip), port), family=family, backlog=1024)
                # asyncio sets TCP_NODELAY only on sockets whose protocol is TCP, not 0. Without it
                # each small write waits until the client has acknowledged the one before.
                protocol = socket.IPPROTO_TCP
                tcp = socket.socket(family, socket.SOCK_STREAM, protocol, opened.detach())
                sockets.append(tcp)
                port = tcp.getsockname()[1]
    except OSError as error:
        for opened in sockets:
            opened.close()
        raise InvalidArgumentError(_listen_problem(host, port, error)) from None
    return sockets


@contextmanager
def _skip_missing_ipv6(family: int, *, last: bool) -> Iterator[None]:
    """A name such as localhost may have an IPv6 address on a machine without IPv6."""
    try:
        yield
    except OSError as error:
        missing = error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
        if last or family != socket.AF_INET6 or not missing:
            raise


def _listen_problem(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is taken; stop the program that uses it, or give another with --port"
    if error.errno == errno.EACCES:
        return f"port {port} is reserved for the system; give one above 1023 with --port"
    return f"cannot listen on {host}: {error.strerror or error}; try --host 127.0.0.1"


def url_of(address: Address, sockets: Sequence[socket.socket]) -> str:
    """The URL for a browser on this machine."""
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
    """Answers requests until a signal arrives; raises KeyboardInterrupt after Ctrl-C.

    After the first signal no requests are taken, and replies have `grace` seconds to finish; the
    second ends all at once. `sockets` come from `listen` and are opened here by default. `mount`
    adds pages to the application, `ready` is called with the URL once the server answers, and
    `ending` at the first signal. A rank that follows another ends with it.

        serve(Service(mm.load("demo")))
    """
    if service.follows:
        for number in (signal.SIGINT, signal.SIGTERM):  # the first rank gets it too, and ends all
            signal.signal(number, signal.SIG_IGN)
        service.follow()
        return
    server = GracefulServer(
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


class GracefulServer(uvicorn.Server):
    """uvicorn's server, which lets replies finish, and ends at once at the second signal.

    `run` works on any thread, until `should_exit` is set. See `serve` for the options.
    """

    def __init__(
        self,
        service: Service,
        *,
        address: Address,
        settings: Settings,
        sockets: Sequence[socket.socket] | None = None,
        grace: float = 10.0,
        mount: Mount | None = None,
        ready: Callable[[str], None] | None = None,
        ending: Callable[[], None] | None = None,
    ):
        if not 0 <= grace <= 3600:
            raise InvalidArgumentError(f"grace must be 0 to 3600 seconds, got {grace}")
        self._service, self._grace = service, grace
        self._ready, self._ending = ready, ending
        self._sockets = list(sockets or listen(address, settings.api_key))
        self._url = url_of(address, self._sockets)
        self.signalled: int | None = None
        """The first signal that arrived."""
        self._second_signal = asyncio.Event()
        app = create_app(service, settings)
        if mount is not None:
            mount(app, service)
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
        super().__init__(config)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        super().run(sockets or self._sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self._ready is not None:
            self._ready(self._url)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Like uvicorn's, but does not raise the signals again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        handlers = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Starts the shutdown at the first signal, and stops waiting for replies at the second.

        A third one gets the system's own handler.
        """
        if not self.should_exit:
            self.signalled = sig
            self.should_exit = True
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        self._loop.call_soon_threadsafe(self._second_signal.set)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Lets replies finish, then ends."""
        if self._ending is not None:
            self._ending()
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        closing = asyncio.ensure_future(self._service.close(self._grace))
        second_signal = asyncio.ensure_future(self._second_signal.wait())
        await asyncio.wait({closing, second_signal}, return_when=asyncio.FIRST_COMPLETED)
        second_signal.cancel()
        if not closing.done():
            # As if every client had left: their requests are cancelled.
            for connection in list(self.server_state.connections):
                connection.transport.abort()
        await closing
        await super().shutdown(sockets)
