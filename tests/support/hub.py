"""A model hub on this machine, which can fail in every way that the real one does."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from support.local_server import LocalServer

REPO = "openbmb/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = bytes(range(256)) * 400
BASE = {
    "config.json": b'{"vocab_size": 8}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"model": {}}',
    "tokenizer_config.json": b'{"a": 1}',
    "special_tokens_map.json": b'{"b": 1}',
}
CLUTTER = {
    "README.md": b"# tiny",
    "modeling_minicpm.py": b"import os",
    "tokenizer.py": b"import sys",
    "training_args.bin": b"\0" * 9,
    "flax_model.msgpack": b"\1" * 9,
    "onnx/model.onnx": b"\2" * 9,
    "original/model.safetensors": b"\3" * 9,
}
SAFE = {"model.safetensors": WEIGHTS}


class Hub(LocalServer):
    """As much of a hub as huggingface_hub asks for, on 127.0.0.1, with faults to switch on."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str]] = []
        self.refuse: dict[str, tuple[int, str]] = {}  # repo -> status, X-Error-Code
        self.cut: list[int] = []  # bytes after which the next weight transfers break off
        self.starts: list[int] = []  # where each weight transfer began
        self.broken = False  # answer 503 to weight transfers, once `cut` is used up
        self.html = False
        self.status = 200  # of the front page
        self.stalled = threading.Event()  # cleared: the front page is not answered
        self.stalled.set()
        super().__init__(self.handler())

    def stop(self) -> None:
        self.stalled.set()
        super().stop()

    def got(self) -> list[str]:
        """The files whose bytes were asked for."""
        return sorted(
            path.rpartition("/")[2]
            for verb, path in self.requests
            if verb == "GET" and "/resolve/" in path
        )

    def handler(hub) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def reply(self, status: int, body: bytes, kind: str, **headers: str) -> None:
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key.replace("_", "-"), value)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                hub.requests.append((self.command, path))
                if path == "/":  # what `auto` asks for
                    hub.stalled.wait(20)
                    return self.reply(hub.status, b"", "text/html")
                if hub.html:
                    return self.reply(200, b"<html>please log in</html>", "text/html")
                api = path.startswith("/api/models/")
                parts = path.removeprefix("/api/models").split("/")
                repo, files = "/".join(parts[1:3]), hub.repos.get("/".join(parts[1:3]))
                status, code = hub.refuse.get(
                    repo, (401, "RepoNotFound") if files is None else (0, "")
                )
                if status or files is None:
                    return self.reply(status, b"{}", "application/json", X_Error_Code=code)
                if parts[4] not in ("main", COMMIT):
                    return self.reply(
                        404, b"{}", "application/json", X_Error_Code="RevisionNotFound"
                    )
                if api:
                    body = listing(repo, files) if parts[3] == "revision" else tree(files)
                    return self.reply(200, json.dumps(body).encode(), "application/json")
                return self.send_file(files, "/".join(parts[5:]))

            def send_file(self, files: dict[str, bytes], name: str) -> None:
                body = files[name]
                start = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
                weights = self.command == "GET" and name.endswith((".bin", ".safetensors"))
                hub.starts += [start] if weights else []
                if weights and hub.broken and not hub.cut:
                    return self.reply(503, b"", "text/plain")
                self.send_response(206 if start else 200)
                self.send_header("ETag", f'"{etag(body)}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(body) - start))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(
                        body[start : start + hub.cut.pop(0)]
                        if weights and hub.cut
                        else body[start:]
                    )
                return None

        return Handler


def etag(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def listing(repo: str, files: dict[str, bytes]) -> dict[str, Any]:
    return {
        "id": repo,
        "sha": COMMIT,
        "siblings": [{"rfilename": n, "size": len(b), "blobId": etag(b)} for n, b in files.items()],
    }


def tree(files: dict[str, bytes]) -> list[dict[str, Any]]:
    return [{"type": "file", "path": n, "size": len(b), "oid": etag(b)} for n, b in files.items()]


@pytest.fixture
def hub_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants, file_download, utils
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    from minicpm_mlx.loading.download import sources

    hub = Hub()
    hub.repos[REPO] = BASE | CLUTTER | SAFE
    for name in (
        "HF_TOKEN",
        "MINICPM_MLX_SOURCE",
        "HTTP_PROXY",
        "http_proxy",
        "HTTPS_PROXY",
        "https_proxy",
        "ALL_PROXY",
        "all_proxy",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    # What huggingface_hub read from the environment when it was imported.
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    sources.forget()
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # its pauses between attempts
    disable_progress_bars()
    yield hub
    sources.forget()
    enable_progress_bars()
    if hub.thread.is_alive():
        hub.stop()
    getattr(utils, "close_session", lambda: None)()
