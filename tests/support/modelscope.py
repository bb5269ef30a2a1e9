"""A ModelScope on this machine, which can fail in the ways that the real one does."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from support.local_server import LocalServer


class ModelScope(LocalServer):
    """As much of ModelScope as is asked for, on 127.0.0.1, with faults to switch on."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.listed: dict[str, dict[str, Any]] = {}  # changes to a file's entry, by its name
        self.cut: list[int] = []  # bytes after which the next transfers break off
        self.ranges = True  # whether a transfer can be continued
        self.token = ""  # needed where it is set
        self.delay = 0.0  # seconds before each answer
        self.storage = ""  # the address of the server that files lie on; its own, if empty
        self.status = 0  # answered to all
        self.cookies: list[tuple[str, str]] = []  # the path and cookie of each request
        self.starts: list[int] = []  # where each transfer began
        super().__init__(self.handler())

    def entry(self, name: str, body: bytes) -> dict[str, Any]:
        known = {
            "Path": name,
            "Name": name.rpartition("/")[2],
            "Type": "blob",
            "Size": len(body),
            "Sha256": hashlib.sha256(body).hexdigest(),
        }
        return known | self.listed.get(name, {})

    def handler(scope) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def reply(self, status: int, body: bytes, **headers: str) -> None:
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                time.sleep(scope.delay)
                address = urlsplit(self.path)
                parts = address.path.strip("/").split("/")
                api = parts[:3] == ["api", "v1", "models"]
                repo, rest = (
                    ("/".join(parts[3:5]), parts[5:]) if api else ("/".join(parts[1:3]), parts[3:])
                )
                files = scope.repos.get(repo)
                cookie = self.headers.get("Cookie", "")
                scope.cookies.append((address.path, cookie))
                if scope.status:
                    return self.reply(scope.status, b"{}")
                if parts[0] == "storage":  # the address that a file's own redirects to
                    return self.send_file(scope.repos["/".join(parts[1:3])]["/".join(parts[3:])])
                if files is None or (scope.token and f"m_session_id={scope.token}" not in cookie):
                    return self.reply(404, b'{"Code": 10010205001, "Success": false}')
                if api and rest == ["repo", "files"]:
                    assert parse_qs(address.query)["Revision"] == ["master"]
                    entries = [scope.entry(*item) for item in files.items()]
                    body = {"Code": 200, "Success": True, "Data": {"Files": entries}}
                    return self.reply(200, json.dumps(body).encode())
                if rest[:2] == ["resolve", "master"] and "/".join(rest[2:]) in files:
                    place = f"{scope.storage}/storage/{repo}/{'/'.join(rest[2:])}"
                    return self.reply(302, b"", Location=place)
                return self.reply(404, b'{"Code": 404, "Success": false}')

            def send_file(self, body: bytes) -> None:
                asked = self.headers.get("Range") if scope.ranges else None
                start = int(asked[6:].partition("-")[0]) if asked else 0
                scope.starts.append(start)
                if start >= len(body) > 0:
                    return self.reply(416, b"")
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(body) - start))
                self.end_headers()
                end = start + scope.cut.pop(0) if scope.cut else len(body)
                self.wfile.write(body[start:end])
                return None

        return Handler


@pytest.fixture
def modelscope(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelScope]:
    """A server that MODELSCOPE_ENDPOINT names."""
    server = ModelScope()
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
    yield server
    server.stop()
