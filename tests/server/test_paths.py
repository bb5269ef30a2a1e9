"""HEAD, and slashes around paths, mean the same on every route."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

pytest.importorskip("fastapi")

if TYPE_CHECKING:
    from support.serving import Live


def paths(live: Live, method: str) -> list[str]:
    document = live.ask("GET", "/openapi.json").json
    found = [path for path, methods in document["paths"].items() if method in methods]
    return [path.replace("{name}", "tiny").replace("{digest}", "x") for path in found]


def test_head_answers_as_get_does_without_the_body(tiny_server: Live) -> None:
    for path in [*paths(tiny_server, "get"), "/", "/docs", "/openapi.json", "/nowhere"]:
        get, head = (tiny_server.ask(method, path) for method in ("GET", "HEAD"))
        assert (head.status, head.body) == (get.status, b""), path
        assert head.headers.get("content-type") == get.headers.get("content-type")
    answer = tiny_server.ask("HEAD", "/v1/chat/completions")
    assert (answer.status, answer.headers["allow"]) == (405, "POST")
    assert any("HEAD /v1/models 200" in line for line in tiny_server.log)
    counted = tiny_server.ask("GET", "/metrics").body.decode()
    assert 'method="HEAD",route="/v1/models"' in counted


def test_slashes_around_a_path_mean_nothing(tiny_server: Live) -> None:
    for method in ("get", "post", "delete"):
        for path in paths(tiny_server, method):
            body = {} if method == "post" else None
            expected = tiny_server.ask(method.upper(), path, body)
            for way in (f"{path}/", f"/{path}", f"{path}//"):
                answer = tiny_server.ask(method.upper(), way, body)
                assert answer.status == expected.status, (method, way)
                kinds = [reply.headers.get("content-type") for reply in (answer, expected)]
                assert kinds[0] == kinds[1]


def test_slashes_do_not_lead_around_the_checks(tiny_server: Live) -> None:
    for path in ("/v1/models/", "//v1/models", "//api/tags//"):
        answer = tiny_server.ask("GET", path, headers={"Origin": "https://evil.com"})
        assert answer.status == 403
    cross = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert tiny_server.ask("GET", "//v1/models", headers=cross).status == 403
    plain = {"Content-Type": "text/plain"}
    for path in ("//v1/chat/completions", "/v1/chat/completions/"):
        assert tiny_server.ask("POST", path, b"{}", plain).status == 415
