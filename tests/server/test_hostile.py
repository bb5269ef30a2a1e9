"""What nobody should send: each is answered by a clean refusal, and the server goes on."""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("fastapi")

from hypothesis import given, settings
from hypothesis import strategies as st

import minicpm_mlx as mm
from minicpm_mlx.server.http.api_error import ApiError
from minicpm_mlx.server.http.request_body import DEPTH, check_json
from support.apis import SMALL

if TYPE_CHECKING:
    from support.serving import Live

WRONG = [None, True, -1, 2**62, 1.5, "", "x" * 100, "../../etc/passwd", [], [[]], [None], {}]


@pytest.fixture
def alive(tiny_server: Live) -> Iterator[Live]:
    """The server, which must still answer afterwards."""
    yield tiny_server
    assert tiny_server.ask("GET", "/v1/models").status == 200


def exchange(live: Live, data: bytes, end: bool = True) -> bytes:
    """Bytes as they are, on a connection of their own; what came back until it was closed. `end`:
    nothing more will come, which the server takes as leaving."""
    with socket.create_connection(live.place, timeout=60) as connection:
        parts = []
        try:
            connection.sendall(data)
            if end:
                connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                parts.append(part)
        except TimeoutError:
            raise
        except OSError:  # closed by the server, which has heard enough
            pass
        return b"".join(parts)


def message(path: str, body: bytes, *headers: str, method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


@pytest.mark.parametrize("path", SMALL)
def test_the_small_requests_of_these_tests_are_good(tiny_server: Live, path: str) -> None:
    assert tiny_server.ask("POST", path, SMALL[path]).status == 200


# Bodies that are no JSON, or more than JSON


BODIES = {
    "empty": b"",
    "cut": b'{"model": "tiny"',
    "text": b"hello",
    "two": b"{} {}",
    "comma": b'{"model": "tiny",}',
    "nan": b'{"temperature": NaN}',
    "infinity": b'{"temperature": -Infinity}',
    "beyond floats": b'{"temperature": 1e999}',
    "digits": b'{"seed": ' + b"9" * 5000 + b"}",
    "more digits": b'{"seed": ' + b"9" * 1_000_000 + b"}",
    "65 bits": b'{"seed": 36893488147419103232}',
    "brackets": b"[" * 100_000,
    "closed brackets": b"[" * 100_000 + b"]" * 100_000,
    "objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a few too deep": b"[" * (DEPTH + 1) + b"]" * (DEPTH + 1),
    "deep where it may be": b'{"metadata": ' + b"[" * 500 + b"]" * 500 + b"}",
    "latin-1": b'{"model": "caf\xe9"}',
    "half a character": b'{"model": "\\ud83d"}',
    "half a character in a key": b'{"\\udc00": 1}',
    "twice": b'{"model": "tiny", "model": "other"}',
    "a long key twice": b'{"%s": 1, "%s": 2}' % (b"k" * 100_000, b"k" * 100_000),
    "nul": b"\x00",
    "utf-16": '{"model": "tiny"}'.encode("utf-16"),
    "list": b"[]",
    "number": b"5",
    "null": b"null",
    "string": b'"tiny"',
}


@pytest.mark.parametrize("kind", BODIES)
def test_a_body_that_is_no_request_is_refused_in_the_apis_own_form(alive: Live, kind: str) -> None:
    for path in SMALL:
        begun = time.monotonic()
        answer = alive.ask("POST", path, BODIES[kind])
        assert answer.status == 400, (path, answer.body[:300])
        assert len(answer.body) < 2000, "what was sent is not sent back"
        error = answer.json["error"]
        assert isinstance(error, str if path.startswith("/api/") else dict)
        assert time.monotonic() - begun < 10


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
@settings(max_examples=20, deadline=None)
def test_every_value_that_json_has_is_taken(value: object) -> None:
    for ascii_only in (True, False):
        try:
            body = json.dumps(value, ensure_ascii=ascii_only).encode()
        except UnicodeEncodeError:
            continue
        check_json(body)


@given(
    st.binary(max_size=40)
    | st.text(alphabet='{}[]":,\\u0d8NaInfty1e.- ', max_size=40).map(str.encode)
)
@settings(max_examples=100, deadline=None)
def test_what_is_taken_is_json_and_else_there_is_a_refusal(body: bytes) -> None:
    try:
        check_json(body)
    except ApiError as refusal:
        found = refusal
    else:
        json.dumps(json.loads(body), allow_nan=False, ensure_ascii=False).encode()
        return
    assert found.status == 400
    assert len(found.message) < 500


# Fields of wrong types


@pytest.mark.parametrize("path", SMALL)
def test_wrong_types_are_refused_or_answered_but_never_fail(alive: Live, path: str) -> None:
    for field, value in SMALL[path].items():
        for wrong in WRONG:
            # To say all there is room for is no mistake, but takes its time.
            endless = "max" in field or field in ("options", "sampling_params")
            if wrong == value or (endless and wrong in (None, 2**62, {}, [])):
                continue
            answer = alive.ask("POST", path, SMALL[path] | {field: wrong})
            assert answer.status in (200, 400, 404, 413), (field, wrong, answer.body[:300])
            if answer.status != 200:
                assert "error" in answer.json


def test_what_is_wrong_is_said_by_the_field(tiny_server: Live) -> None:
    messages = [{"role": "user", "content": ["a", {"type": "text"}]}]
    either = "stop: Input should be a valid string; or: Input should be a valid list"
    inner = "messages[0].content[1].text"
    for more, field, message in (
        ({"stop": 1}, "stop", either),
        ({"messages": messages}, inner, f"{inner} is missing"),
    ):
        body = {"messages": [{"role": "user", "content": "Hi"}], **more}
        error = tiny_server.ask("POST", "/v1/chat/completions", body).json["error"]
        assert (error["param"], error["message"]) == (field, message)


# Names that are no names

NAMES = [
    "/etc/passwd", "../../../etc/passwd", "tiny/../tiny", "tiny:../other", "tiny:/tmp/adapter",
    "~/model", "C:\\model", "file:///etc/passwd", "http://127.0.0.1:1/x",
    "openbmb/MiniCPM-2B-dpo-bf16", "tiny\x00", "tiny:", ":other", "$(id)", "минипм", "tiny\n"
]  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/api/chat", "/api/show"])
def test_a_model_is_looked_up_among_those_that_are_served(alive: Live, path: str) -> None:
    for name in NAMES:
        answer = alive.ask("POST", path, SMALL[path] | {"model": name})
        assert answer.status == 404, answer.body
        assert b"there is tiny" in answer.body


def test_no_path_leads_to_a_file(alive: Live) -> None:
    paths = [
        "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/models/../../../etc/passwd",
        "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "//etc/passwd", "/..%5c..%5cetc", "/%00",
        "/%ff%fe", "/docs/../../x", "/chat/../../../etc/passwd", "/chat/%2e%2e/%2e%2e/etc/passwd",
        "/chat/gradio_api/file=/etc/passwd"
    ]  # fmt: skip
    for path in paths:
        reply = exchange(alive, message(path, b"", "Connection: close", method="GET"))
        assert re.match(rb"HTTP/1\.1 4\d\d ", reply), (path, reply[:200])
        assert b"root:" not in reply


# Bytes that are no HTTP


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\r\n\r\n",
        b"\r\n" * 1000,
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET " + b"/a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 50_000 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nA: " + b"b" * 1_000_000,
        b"G\xffT / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /\xe4\xb8\xad HTTP/1.1\r\nHost: localhost\r\n\r\n",
        message("/v1/completions", b"{}", "Content-Length: -1"),
        message("/v1/completions", b"{}", "Content-Length: 2, 3"),
        message("/v1/completions", b"{}", "Content-Length: 2", "Content-Length: 3"),
        message("/v1/completions", b"{}", "Content-Length: 9" + "9" * 400),
        message("/v1/completions", b"zz\r\n{}\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
        message("/v1/completions", b"0\r\n\r\n", "Transfer-Encoding: gzip, chunked"),
        message("/v1/completions", b"", "Transfer-Encoding: chunked", "Content-Length: 5"),
        message("/health", b"{}", "Content-Length: 2", method="GET"),
        message("/health", b"2\r\n{}\r\n0\r\n\r\n", "Transfer-Encoding: chunked", method="GET"),
        message("/", b"", "Upgrade: websocket", "Connection: Upgrade", method="PUT"),
        message("*", b"", method="OPTIONS"),
        message("/v1/models", b"", method="TRACE"),
        message("/v1/models", b"", method="A" * 1000),
        message("http://evil.com/", b"", method="GET"),
        message("localhost:80", b"", method="CONNECT"),
    ],
    ids=lambda data: data[:24].decode("latin-1").encode("unicode_escape").decode(),
)
def test_what_is_no_request_is_refused(alive: Live, data: bytes) -> None:
    for part in exchange(alive, data).split(b"HTTP/1.1 ")[1:]:
        assert re.match(rb"4\d\d ", part), part[:200]


def test_a_second_request_hidden_in_a_body_is_not_answered(alive: Live) -> None:
    hidden = message("/v1/models", b"", method="GET")
    for body, header in (
        (b"0\r\n\r\n" + hidden, "Transfer-Encoding: chunked\r\nContent-Length: 4"),
        (b"0\r\n\r\n" + hidden, "Transfer-Encoding : chunked"),
    ):
        reply = exchange(alive, message("/v1/completions", body, header))
        assert b'"object":"list"' not in reply


def test_what_is_not_called_json_is_refused_but_by_ollamas_routes(alive: Live) -> None:
    for content in ("text/plain", "multipart/form-data; boundary=x", "", "application/xml"):
        for path, status in (("/v1/completions", 415), ("/api/chat", 200)):
            body = json.dumps(SMALL[path]).encode()
            assert alive.ask("POST", path, body, {"Content-Type": content}).status == status


# Too much, too slow, gone


def test_a_body_of_20_mb_is_refused(alive: Live) -> None:
    body = b'{"prompt": "' + b"x" * 20_000_000 + b'"}'
    for path in ("/v1/completions", "/v1/messages", "/api/chat", "/generate"):
        answer = alive.ask("POST", path, body)
        assert answer.status == 413
        assert "error" in answer.json


def test_a_body_of_20_mb_in_chunks_is_refused(alive: Live) -> None:
    chunk = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
    body = chunk * 20 + b"0\r\n\r\n"
    kind = ("Content-Type: application/json", "Transfer-Encoding: chunked")
    reply = exchange(alive, message("/v1/completions", body, *kind), end=False)
    assert reply.startswith(b"HTTP/1.1 413 ")


def test_a_body_that_is_announced_too_long_need_not_be_sent(alive: Live) -> None:
    headers = (
        "Content-Type: application/json",
        "Content-Length: 99999999999",
        "Expect: 100-continue",
    )
    reply = exchange(alive, message("/v1/completions", b"", *headers))
    assert reply.startswith(b"HTTP/1.1 413 ")
    assert b"100 Continue" not in reply


@pytest.fixture(scope="module")
def hasty(tiny: mm.LM) -> Iterator[Live]:
    """A server that waits for nobody."""
    from support.serving import serving

    with serving(
        tiny, settings={"header_seconds": 0.5, "body_seconds": 0.7, "max_body": 4096}
    ) as live:
        yield live


def dripped(live: Live, begun: bytes, drop: bytes) -> tuple[bytes, float]:
    """What a client gets that sends a little at a time, and after how long."""
    start = time.monotonic()
    with closing(socket.create_connection(live.place, timeout=0.1)) as connection:
        connection.sendall(begun)
        while time.monotonic() - start < 20:
            try:
                if drop:
                    connection.sendall(drop)
                return connection.recv(4096), time.monotonic() - start
            except TimeoutError:
                continue
            except (ConnectionResetError, BrokenPipeError):
                return b"", time.monotonic() - start
    raise AssertionError("the connection was left open")


def test_headers_that_come_slowly_are_not_waited_for(hasty: Live) -> None:
    for begun, drop in ((b"", b""), (b"GET / HT", b""), (b"GET / HTTP/1.1\r\n", b"X: y\r\n")):
        reply, seconds = dripped(hasty, begun, drop)
        assert reply.startswith(b"HTTP/1.1 408 ")
        assert seconds < 5
    assert hasty.ask("GET", "/health").status == 200


def test_a_body_that_comes_slowly_is_not_waited_for(hasty: Live) -> None:
    head = message("/v1/completions", b"{", "Content-Type: application/json", "Content-Length: 900")
    for drop in (b"", b" "):
        reply, seconds = dripped(hasty, head, drop)
        assert reply.startswith(b"HTTP/1.1 408 ")
        assert seconds < 5
    assert hasty.ask("GET", "/health").status == 200


def test_a_body_that_goes_on_after_its_refusal_is_cut_off(hasty: Live) -> None:
    kind = ("Content-Type: application/json", "Transfer-Encoding: chunked")
    start = time.monotonic()
    with closing(socket.create_connection(hasty.place, timeout=10)) as connection:
        connection.sendall(message("/nowhere", b"", *kind))
        with suppress(ConnectionError):
            while time.monotonic() - start < 20:
                connection.sendall(b"1\r\nx\r\n")
                time.sleep(0.01)
    assert time.monotonic() - start < 10
    assert hasty.ask("GET", "/health").status == 200


def test_a_connection_that_waits_for_its_next_request_is_kept(hasty: Live) -> None:
    with closing(socket.create_connection(hasty.place, timeout=10)) as connection:
        for _ in range(2):
            connection.sendall(message("/health", b"", method="GET"))
            reply = b""
            while not reply.endswith(b'{"status":"ok"}'):
                reply += connection.recv(4096)
                assert reply
            time.sleep(1.0)  # longer than headers may take once they have begun


def test_clients_that_leave_in_the_middle_are_forgotten(alive: Live) -> None:
    body = json.dumps(
        SMALL["/v1/completions"] | {"max_tokens": 4000, "ignore_eos": True, "stream": True}
    ).encode()
    head = message(
        "/v1/completions", body, "Content-Type: application/json", f"Content-Length: {len(body)}"
    )
    for read in (0, 1, 200):
        connection = socket.create_connection(alive.place, timeout=30)
        connection.sendall(head)
        if read:
            connection.recv(read)
        # A reset, not a polite end.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    until = time.monotonic() + 30
    while alive.service.state()["running"] + alive.service.state()["waiting"]:
        assert time.monotonic() < until, alive.service.state()
        time.sleep(0.05)


def test_500_connections_at_once_are_answered_or_refused(alive: Live) -> None:
    replies: list[bytes] = []
    request = message("/v1/models", b"", "Connection: close", method="GET")

    def one() -> None:
        replies.append(exchange(alive, request, end=False)[:12])

    threads = [threading.Thread(target=one) for _ in range(500)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(replies) == 500
    assert set(replies) <= {b"HTTP/1.1 200", b"HTTP/1.1 429"}
    assert replies.count(b"HTTP/1.1 200") > 400


def test_the_server_said_nothing_of_failures(tiny_server: Live) -> None:
    """Runs last in this file: no request of it was answered by an error of the server's own."""
    assert tiny_server.ask("POST", "/v1/completions", SMALL["/v1/completions"]).status == 200
    assert not [line for line in tiny_server.log if re.search(r" 5\d\d \d", line)]


def test_a_body_that_is_no_http_is_told_once_and_leaves_no_trace(
    tiny_server: Live, caplog: pytest.LogCaptureFixture
) -> None:
    body = json.dumps(SMALL["/v1/completions"])
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        "Transfer-Encoding: chunked\r\n"
    )
    for framing in ("", f"Content-Length: {len(body)}\r\n"):
        sent = f"{head}{framing}\r\n{body}GET /metrics HTTP/1.1\r\n\r\n"
        answer = exchange(tiny_server, sent.encode(), end=False)
        assert answer.count(b"HTTP/1.1 ") == 1
        assert answer.startswith(b"HTTP/1.1 400")
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_base_url_without_v1_or_with_two_is_explained(tiny_server: Live) -> None:
    for path, meant in (
        ("/chat/completions", "/v1/chat/completions"),
        ("/messages", "/v1/messages"),
        ("/v1/v1/completions", "/v1/completions"),
        ("/v1/api/chat", "/api/chat"),
    ):
        answer = tiny_server.ask("POST", path, {"model": "tiny"})
        assert answer.status == 404
        assert f"did you mean {meant}?" in answer.body.decode()
