"""A SOCKS5 proxy without a password, on this machine."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Proxy(socketserver.ThreadingTCPServer):
    """Connects every client to `target`, whatever host it asked for."""

    daemon_threads = True

    def __init__(self, target: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), Tunnel)
        self.target = target
        self.asked: list[str] = []
        """Host names that clients asked for."""

    @property
    def url(self) -> str:
        return f"socks5h://127.0.0.1:{self.server_address[1]}"


class Tunnel(socketserver.StreamRequestHandler):
    server: Proxy

    def handle(self) -> None:  # RFC 1928
        _, methods = self.rfile.read(2)
        self.rfile.read(methods)
        self.wfile.write(b"\x05\x00")
        kind = self.rfile.read(4)[3]
        assert kind == 3, "expected a host name: it is the proxy that resolves it"
        self.server.asked.append(self.rfile.read(self.rfile.read(1)[0]).decode())
        self.rfile.read(2)
        self.wfile.write(b"\x05\x00\x00\x01" + bytes(6))
        with socket.create_connection(self.server.target) as there:
            back = threading.Thread(target=self.copy_back, args=(there,), daemon=True)
            back.start()
            while data := self.connection.recv(1 << 16):
                there.sendall(data)
            there.shutdown(socket.SHUT_WR)
            back.join(timeout=5)

    def copy_back(self, there: socket.socket) -> None:
        while data := there.recv(1 << 16):
            self.connection.sendall(data)


@contextmanager
def socks_proxy(target: tuple[str, int]) -> Iterator[Proxy]:
    with Proxy(target) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.01,))
        thread.start()
        yield proxy
        proxy.shutdown()
        thread.join()
