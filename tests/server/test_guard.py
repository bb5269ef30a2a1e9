"""Who is let in: hosts, origins, keys; what every answer says; and a server's start and end."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("fastapi")

import minicpm_mlx as mm
from minicpm_mlx.errors import InvalidArgumentError
from minicpm_mlx.server import serve as run
from minicpm_mlx.server.http.settings import Settings

if TYPE_CHECKING:
    from support.serving import Live

KEY = "sesame-0123456789abcdef"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def locked(tiny: mm.LM) -> Iterator[Live]:
    """A server with an API key, one more host and one more origin."""
    settings = {"api_key": KEY, "allowed_hosts": ("mac.example.com",)}
    settings["allowed_origins"] = ("https://app.example.com",)
    from support.serving import serving

    with serving(tiny, settings=settings) as live:
        yield live


def routes(live: Live) -> list[tuple[str, str]]:
    """Every method and path of the OpenAPI document, and the pages that are not in it."""
    answer = live.ask("GET", "/openapi.json", headers={"x-api-key": KEY})
    paths = answer.json["paths"].items()
    found = [(m.upper(), re.sub(r"\{[^}]*\}", "x", path)) for path, ms in paths for m in ms]
    assert len(found) > 20
    pages = ("/", "/docs", "/openapi.json", "/chat/", "/nowhere")
    return [*found, *(("GET", path) for path in pages)]


# Hosts


def test_names_of_this_machine_alone_are_served(tiny_server: Live) -> None:
    ours = ["localhost", "LOCALHOST:8080", "localhost.", "a.localhost", "127.0.0.1:1", "[::1]:80"]
    for host in (*ours, socket.gethostname()):
        assert tiny_server.ask("GET", "/health", headers={"Host": host}).status == 200, host
    others = ["evil.com", "evil.com:80", "localhost.evil.com", "localhost@evil.com", "127.1"]
    for host in (*others, "127.0.0.1.evil.com", "[::1", ":80", "localhost:"):
        answer = tiny_server.ask("GET", "/v1/models", headers={"Host": host})
        assert answer.status == 403, host
        assert "--allowed-host" in answer.json["error"]["message"]


def test_a_host_that_the_operator_named_is_served(locked: Live) -> None:
    headers = {"x-api-key": KEY, "Host": "MAC.example.com:8080"}
    assert locked.ask("GET", "/health", headers=headers).status == 200


# Origins


def test_pages_of_this_server_alone_may_ask(tiny_server: Live) -> None:
    host = {"Host": "localhost:8080"}
    for origin in ("http://localhost:8080", "https://localhost:8080"):
        answer = tiny_server.ask("GET", "/health", headers=host | {"Origin": origin})
        assert answer.status == 200
        assert "access-control-allow-origin" not in answer.headers
    others = ["null", "http://evil.com", "http://localhost:9", "", "x", "http://[", "file://"]
    for origin in (*others, "http://localhost:8080.evil.com"):
        for method, path, body in (("GET", "/health", None), ("POST", "/api/chat", b"{}")):
            answer = tiny_server.ask(method, path, body, host | {"Origin": origin})
            assert answer.status == 403, origin
            assert "access-control-allow-origin" not in answer.headers


def test_another_site_gets_nothing_but_a_link_to_pages(tiny_server: Live) -> None:
    # "same-site" is another port of this machine.
    for site, mode, paths, status in (
        ("cross-site", "no-cors", ("/flush_cache", "/", "/v1/models"), 403),
        ("same-site", "no-cors", ("/flush_cache",), 403),
        ("cross-site", "navigate", ("/flush_cache",), 403),
        ("cross-site", "navigate", ("/", "/docs"), 200),
    ):
        headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode}
        for path in paths:
            answer = tiny_server.ask("GET", path, headers=headers)
            assert answer.status == status, (site, mode, path)


def test_an_origin_that_the_operator_named_may_read(locked: Live) -> None:
    headers = {"Origin": "https://app.example.com", "x-api-key": KEY}
    answer = locked.ask("GET", "/health", headers=headers)
    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] == "https://app.example.com"
    assert "Origin" in answer.headers["vary"]
    other = locked.ask("GET", "/health", headers=headers | {"Origin": "https://example.com"})
    assert other.status == 403


@pytest.mark.parametrize(
    "origin", ["app://obsidian.md", "capacitor://localhost", "chrome-extension://abcdefgh"]
)
def test_apps_and_extensions_that_the_operator_named_may_call(tiny: mm.LM, origin: str) -> None:
    from support.serving import serving

    with serving(tiny, settings={"allowed_origins": (origin,)}) as live:
        asked = {"Origin": origin, "Sec-Fetch-Site": "cross-site"}
        wanted = {"Access-Control-Request-Method": "POST"}
        wanted |= {"Access-Control-Request-Headers": "content-type"}
        answers = [
            live.ask("OPTIONS", "/api/chat", headers=asked | wanted),
            live.ask("GET", "/api/tags", headers=asked),
            live.ask("POST", "/api/show", {"model": "tiny"}, asked),
        ]
        assert [answer.status for answer in answers] == [200] * 3
        for answer in answers:
            assert answer.headers["access-control-allow-origin"] == origin
        assert live.ask("GET", "/api/tags", headers={"Origin": origin + "x"}).status == 403


def test_a_preflight_needs_no_key_and_allows_what_clients_send(locked: Live) -> None:
    headers = {
        "Origin": "https://app.example.com",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, x-stainless-lang",
    }
    answer = locked.ask("OPTIONS", "/v1/chat/completions", headers=headers)
    assert answer.status == 200
    assert answer.headers["access-control-allow-headers"] == "authorization, x-stainless-lang"
    assert "POST" in answer.headers["access-control-allow-methods"]
    evil = headers | {"Origin": "http://evil.com"}
    assert locked.ask("OPTIONS", "/v1/chat/completions", headers=evil).status == 403


# Keys


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"me:{password}".encode()).decode()


def test_the_right_key_is_let_in(locked: Live) -> None:
    for headers in (
        {"Authorization": f"Bearer {KEY}"},
        {"Authorization": f"bearer {KEY}"},
        {"x-api-key": KEY},
        {"Authorization": basic(KEY)},
        {"Authorization": "Bearer other", "x-api-key": KEY},
    ):
        assert locked.ask("GET", "/v1/models", headers=headers).status == 200, headers


def test_no_route_answers_without_the_key(locked: Live) -> None:
    wrong = [
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": f"Digest {KEY}"},
        {"Authorization": basic("wrong")},
        {"Authorization": "Basic !!!"},
        {"Authorization": "Basic " + base64.b64encode(KEY.encode()).decode()},
        {"x-api-key": "\xe9"},
        {"x-api-key": ""},
    ]
    there = routes(locked)
    for (method, path), headers in (*product(there, [{}]), *product(there[:1], wrong)):
        body = None if method in ("GET", "HEAD") else {"a": 1}
        answer = locked.ask(method, path, body, headers)
        assert answer.status == 401, (method, path, headers)
        assert answer.headers["www-authenticate"].startswith("Basic ")


def test_keys_and_prompts_are_not_in_the_log(locked: Live) -> None:
    locked.ask("GET", f"/health?key={KEY}", headers={"x-api-key": KEY})
    locked.ask("POST", "/v1/chat/completions", CHAT, {"Authorization": f"Bearer {KEY}"})
    wait_until(lambda: "completions" in locked.log[-1])
    line = r"127\.0\.0\.1 POST /v1/chat/completions 200 \d+\.\d\d s"
    assert re.fullmatch(line, locked.log[-1])
    assert not [line for line in locked.log if KEY in line or "Hi" in line or "?" in line]


def test_what_is_logged_of_a_path_cannot_forge_a_line(tiny_server: Live) -> None:
    before = len(tiny_server.log)
    tiny_server.ask("GET", "/%0a127.0.0.1%20GET%20/forged%20200\x7f".replace("\x7f", "%1b"))
    wait_until(lambda: len(tiny_server.log) > before)
    assert len(tiny_server.log) == before + 1
    assert tiny_server.log[-1].isprintable()


# What every answer says


def test_every_answer_says_that_it_is_for_nobody_else(tiny_server: Live) -> None:
    for path in ("/", "/docs", "/health", "/nowhere", "/v1/models", "/metrics"):
        headers = tiny_server.ask("GET", path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "access-control-allow-origin" not in headers
        assert "server" not in headers


@pytest.mark.parametrize("path", ["/", "/docs"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_pages_fetch_nothing(tiny_server: Live, path: str, language: str) -> None:
    answer = tiny_server.ask("GET", path, headers={"Accept-Language": f"{language};q=0.9"})
    text = answer.body.decode()
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert not re.search(r"<script|<img|@import|url\(|src=|<link (?!rel=\"icon\")", text)
    assert ("中文" in text) == (language == "en")


def test_the_first_page_names_what_is_served_and_where(tiny_server: Live) -> None:
    text = tiny_server.ask("GET", "/?lang=en", headers={"Host": "localhost:8080"}).body.decode()
    for expected in ("tiny:other", "http://localhost:8080/v1", "OLLAMA_HOST", "4096 tokens"):
        assert expected in text, expected


def test_a_page_does_not_repeat_markup_from_a_request(tiny_server: Live) -> None:
    for path in ("/?lang=<script>", "/docs?lang=%3Cscript%3E"):
        assert b"<script" not in tiny_server.ask("GET", path.replace("<", "%3C")).body


def test_the_document_names_no_status_that_is_not_used(tiny_server: Live) -> None:
    document = tiny_server.ask("GET", "/openapi.json").json
    for methods in document["paths"].values():
        for operation in methods.values():
            assert "422" not in operation["responses"]
            assert "4XX" in operation["responses"]


# Measurements


def measured(live: Live) -> dict[str, float]:
    lines = live.ask("GET", "/metrics").body.decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def test_metrics_count_requests_tokens_and_times(tiny_server: Live) -> None:
    before = measured(tiny_server)
    reply = tiny_server.ask("POST", "/v1/chat/completions", CHAT | {"max_tokens": 4}).json
    tiny_server.ask("GET", "/nowhere/at/all")
    after = measured(tiny_server)

    def more(name: str) -> float:
        return after[name] - before.get(name, 0)

    usage = reply["usage"]
    assert more("minicpm_prompt_tokens_total") == usage["prompt_tokens"]
    assert more("minicpm_completion_tokens_total") == usage["completion_tokens"]
    assert more("minicpm_time_to_first_token_seconds_count") == 1
    assert more("minicpm_inter_token_seconds_count") == usage["completion_tokens"] - 1
    route = 'method="POST",route="/v1/chat/completions",status="200"'
    assert more(f"minicpm_requests_total{{{route}}}") == 1
    assert not [name for name in after if "nowhere" in name]
    assert after["minicpm_mlx_active_memory_bytes"] > 0
    assert after["minicpm_waiting"] == 0


def test_a_body_that_is_compressed_is_refused(tiny_server: Live) -> None:
    answer = tiny_server.ask("POST", "/v1/chat/completions", CHAT, {"Content-Encoding": "gzip"})
    assert answer.status == 415
    assert "Content-Encoding" in answer.json["error"]["message"]
    plain = tiny_server.ask("POST", "/v1/chat/completions", CHAT, {"Content-Encoding": "identity"})
    assert plain.status == 200


# Limits


def test_no_more_requests_are_answered_at_a_time_than_may_be(tiny: mm.LM) -> None:
    from support.serving import serving

    with serving(tiny, settings={"max_requests": 1}) as live:
        slow = http.client.HTTPConnection(*live.place, timeout=60)
        slow.putrequest("POST", "/v1/chat/completions")
        slow.putheader("Content-Type", "application/json")
        slow.putheader("Content-Length", "2")
        slow.endheaders()
        wait_until(lambda: live.ask("GET", "/v1/models").status == 429)
        answer = live.ask("GET", "/v1/models")
        assert answer.headers["retry-after"] == "1"
        assert live.ask("GET", "/health").status == 200
        slow.send(b"{}")
        assert slow.getresponse().status == 400
        slow.close()
        assert live.ask("GET", "/v1/models").status == 200


def test_connections_beyond_the_limit_are_turned_away(tiny: mm.LM) -> None:
    from support.serving import serving

    with serving(tiny, settings={"max_connections": 4}) as live:
        held = [socket.create_connection(live.place) for _ in range(4)]
        try:
            wait_until(lambda: len(live.running.server_state.connections) == 4)
            with socket.create_connection(live.place, timeout=10) as extra:
                assert extra.recv(64).startswith(b"HTTP/1.1 429 ")
        finally:
            for one in held:
                one.close()
        wait_until(lambda: not live.running.server_state.connections)
        assert live.ask("GET", "/health").status == 200


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


# Settings


def test_a_key_that_no_header_could_hold_and_an_origin_of_many_sites_are_refused() -> None:
    for key in ("", " ", "a b", "schlüssel", "a\n"):
        with pytest.raises(InvalidArgumentError, match="API key"):
            Settings(api_key=key)
    for origin in ("*", "null", "example.com", "https://*", "https://a.com/b"):
        with pytest.raises(InvalidArgumentError, match="SCHEME://HOST"):
            Settings(allowed_origins=(origin,))


def test_a_key_is_not_shown_with_the_settings() -> None:
    assert KEY not in repr(Settings(api_key=KEY))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "mac.example.com", ""])
def test_other_machines_may_not_come_without_a_key(host: str) -> None:
    with pytest.raises(InvalidArgumentError, match="API key is needed"):
        run.listen(run.Address(host=host, port=0), None)


def test_a_port_that_is_taken_is_one_clear_line() -> None:
    first = run.listen(run.Address(port=0), None)
    port = first[0].getsockname()[1]
    with pytest.raises(InvalidArgumentError, match=f"port {port} is taken"):
        run.listen(run.Address(port=port), None)
    first[0].close()


def test_a_key_comes_from_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    file.chmod(0o600)
    assert run.load_key(None, file) == KEY
    assert not run.readable_by_others(file)
    file.chmod(0o644)
    assert run.readable_by_others(file)
    monkeypatch.setenv(run.KEY, "from-the-environment")
    assert run.load_key(None, None) == "from-the-environment"
    assert run.load_key("given", None) == "given"
    with pytest.raises(InvalidArgumentError, match="leave one"):
        run.load_key("given", file)
    with pytest.raises(InvalidArgumentError, match="No such file"):
        run.load_key(None, tmp_path / "none")


# The command


@contextmanager
def process(lm: mm.LM, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`minicpm-mlx serve` on a free port, and its URL."""
    model = str(lm.card.path)
    code = "from minicpm_mlx.cli.main import main; main()"
    command = [sys.executable, "-c", code, "serve", "-m", model, "--port", "0", *arguments]
    env = {**os.environ, "LC_ALL": "C.UTF-8"}
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    assert started.stderr
    lines: list[str] = []
    try:
        while not (found := re.search(r"https?://[^ ]+", lines[-1] if lines else "")):
            lines.append(started.stderr.readline())
            assert lines[-1], "".join(lines)
        yield started, found[0]
    finally:
        started.kill()
        started.wait()
        started.stderr.close()


@contextmanager
def stream(url: str, tokens: int) -> Iterator[http.client.HTTPResponse]:
    """A reply that has begun to come."""
    host, _, port = url.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    more = {"stream": True, "ignore_eos": True, "max_tokens": tokens, "n": 16}
    body = json.dumps(CHAT | more)
    kind = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", body, kind)
    response = connection.getresponse()
    try:
        assert response.status == 200
        assert response.readline().startswith(b"data:")
        yield response
    finally:
        response.close()
        connection.close()


def test_the_command_finishes_a_running_reply_when_told_to_end(tiny: mm.LM) -> None:
    with process(tiny) as (server, url), stream(url, tokens=12) as response:
        server.send_signal(signal.SIGTERM)
        assert response.read().endswith(b"data: [DONE]\n\n")
        assert server.wait(40) == 0


def test_the_command_ends_replies_that_take_longer_than_they_may(tiny: mm.LM) -> None:
    with process(tiny, "--grace", "0.5") as (server, url), stream(url, tokens=4000) as response:
        begun = time.monotonic()
        server.send_signal(signal.SIGINT)
        rest = response.read()
        assert b"[DONE]" not in rest
        assert b"error" in rest, "the client is told why"
        assert server.wait(40) == 130
        assert time.monotonic() - begun < 30


@pytest.mark.slow
def test_a_second_signal_ends_at_once(tiny: mm.LM) -> None:
    with process(tiny, "--grace", "60") as (server, url), stream(url, tokens=4000):
        server.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert server.poll() is None
        begun = time.monotonic()
        server.send_signal(signal.SIGINT)
        assert server.wait(40) == 130
        assert time.monotonic() - begun < 30


def test_a_server_for_other_machines_asks_for_its_key_and_says_what_is_less_safe(
    tiny: mm.LM, tmp_path: Path
) -> None:
    file = tmp_path / "key"
    file.write_text(KEY)
    file.chmod(0o644)
    with process(tiny, "--host", "0.0.0.0", "--api-key-file", str(file)) as (server, url):
        assert url.startswith("http://127.0.0.1:")
        host, _, port = url.removeprefix("http://").partition(":")
        for headers, status in (({}, 401), ({"x-api-key": KEY}, 200)):
            connection = http.client.HTTPConnection(host, int(port), timeout=60)
            connection.request("GET", "/v1/models", headers=headers)
            assert connection.getresponse().status == status
            connection.close()
        server.send_signal(signal.SIGTERM)
        assert server.stderr
        said = " ".join(server.stderr.read().split())  # after the line that names the URL
    for words in ("API key", "come unencrypted", "chmod 600"):
        assert words in said
    assert KEY not in said


def test_small_writes_are_sent_at_once() -> None:
    (listening,) = run.listen(run.Address(port=0), None)

    async def connected() -> int:
        accepted = asyncio.get_running_loop().create_future()
        server = await asyncio.start_server(
            lambda _, writer: accepted.set_result(writer), sock=listening
        )
        _, client = await asyncio.open_connection(*listening.getsockname())
        writer = await accepted
        option = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        for one in (client, writer, server):
            one.close()
        return int(option)

    assert asyncio.run(connected())


def test_the_command_refuses_in_one_line(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: mm.LM
) -> None:
    empty = tmp_path / "key"
    empty.touch()
    for arguments, expected in (
        (("--host", "0.0.0.0"), "an API key is needed"),
        (("--adapter", "pirate"), "expected NAME=DIR"),
        (("--adapter", "../x=y"), "expected NAME=DIR"),
        (("--adapter", "a=b", "--adapter", "a=c"), "is taken"),
        (("--allowed-origin", "*"), "expected SCHEME://HOST"),
        (("--port", "99999"), "port must be"),
        (("--adapter", f"odd={tmp_path}"), "--adapter odd: "),
        (("--api-key-file", str(empty)), f"{empty}: the API key must be"),
        (("--max-concurrency", "0"), "--max-concurrency must be 1 or more"),
        (("--max-tokens", "0"), "--max-tokens must be 1 or more"),
        (("--timeout", "nan"), "--timeout must be"),
        (("--api-key", "a b"), "the API key must be"),
        (("--tls-key", str(empty)), "certificate"),
        (("--tls-cert", str(tmp_path / "none.pem")), "--tls-cert"),
    ):
        assert command("serve", "-m", str(tiny.card.path), *arguments) == 1
        said = capsys.readouterr().err.splitlines()
        assert expected in said[-1], arguments
        assert not any("chmod" in line or "unencrypted" in line for line in said), arguments


def test_the_help_tells_the_defaults_that_the_service_has() -> None:
    from dataclasses import fields

    from minicpm_mlx.cli.serve import Limits
    from minicpm_mlx.server.service import QUEUE, WIDTH

    helps = {field.name: field.metadata["typer"].help for field in fields(Limits)}
    assert helps["width"].endswith(f"default {WIDTH}.")
    assert helps["queue"].endswith(f"default {QUEUE}.")


def test_requests_can_come_encrypted(tiny: mm.LM, tmp_path: Path) -> None:
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    make = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -keyout {key} -out {certificate}"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    if (
        not shutil.which("openssl")
        or subprocess.run([*make.split(), *names], capture_output=True).returncode
    ):
        pytest.skip("openssl makes the certificate of this test, and is not there")
    with process(tiny, "--tls-cert", certificate, "--tls-key", key) as (_, url):
        assert url.startswith("https://127.0.0.1:")
        context = ssl.create_default_context(cafile=certificate)
        connection = http.client.HTTPSConnection(
            "127.0.0.1", int(url.rpartition(":")[2]), context=context, timeout=60
        )
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        connection.close()
