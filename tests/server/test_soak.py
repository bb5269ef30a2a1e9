"""Thousands of requests of all kinds, many of whose clients leave: nothing is lost or piled up."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

pytest.importorskip("fastapi", reason="the server's packages are not installed: [serve]")

WORDS = ("time", "people", "water", "river", "music", "house", "light", "garden", "winter")
CLIENTS = 12
"""At a time."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, int, int]]:
    """A `minicpm-mlx serve` of its own: host, port and process id."""
    code = "import sys; from minicpm_mlx.cli.main import main; main()"
    command = [sys.executable, "-c", code, "serve", "--model", "demo", "--port", "0"]
    command += ["--cache-memory", "0.2"]  # full before the measurement begins
    # What is freed goes back to the system, so that what stays is what is held.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    with (tmp_path / "log").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
        try:
            deadline = time.monotonic() + 120
            while not (
                found := re.search(r"http://127\.0\.0\.1:(\d+)", Path(log.name).read_text())
            ):
                assert process.poll() is None, Path(log.name).read_text()
                assert time.monotonic() < deadline, "the server did not begin"
                time.sleep(0.2)
            yield "127.0.0.1", int(found[1]), process.pid
        finally:
            process.terminate()
            process.wait(30)
        assert "Traceback" not in Path(log.name).read_text()


def request_of(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """A path and a body, of any kind."""
    text = " ".join(draw.choices(WORDS, k=draw.randint(1, 20)))
    tokens, stream = draw.randint(1, 4), draw.random() < 0.5
    messages = [{"role": "user", "content": text}]
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    chat = {"messages": messages, "max_tokens": tokens, "stream": stream}
    drawn = {"temperature": draw.random() * 2, "top_p": 0.9, "seed": draw.randint(0, 99)}
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    completion = {"prompt": text, "max_tokens": tokens, "stop": ["e", "\n"], "stream": stream}
    scored = {"prompt": [text, "One"], "max_tokens": 1, "echo": True, "logprobs": 1}
    ollama = {"model": "demo", "options": {"num_predict": tokens}}
    sampling = {"max_new_tokens": tokens, "regex": "[ab]+"}
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", chat | drawn | {"n": 2, "logprobs": True, "top_logprobs": 3}),
        ("/v1/chat/completions", chat | {"response_format": form}),
        ("/v1/completions", completion),
        ("/v1/completions", scored),
        ("/v1/responses", {"input": text, "max_output_tokens": 16, "stream": stream}),
        ("/v1/embeddings", {"input": [text, "water"]}),
        ("/v1/messages", chat | {"model": "demo"}),
        ("/api/chat", ollama | {"messages": messages}),
        ("/api/generate", ollama | {"prompt": text}),
        ("/generate", {"text": text, "sampling_params": sampling}),
        ("/v1/chat/completions", {"messages": "wrong"}),
        ("/v1/completions", {"prompt": text, "model": "../../etc/passwd"}),
    ]
    return draw.choice(kinds)


async def send(port: int, draw: random.Random, counts: Counter[str]) -> None:
    path, body = request_of(draw)
    patience = draw.random() * 2 if draw.random() < 0.3 else None
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + content)
        answer = await asyncio.wait_for(reader.read(), patience or 120)
    except TimeoutError:
        assert patience is not None, f"{path} was not answered"
        counts["left"] += 1
        return
    finally:
        if draw.random() < 0.5:
            writer.transport.abort()  # a reset, rather than a polite end
        else:
            writer.close()
    status = int(answer.split(b" ", 2)[1])
    wrong = body.get("messages") == "wrong" or "passwd" in str(body.get("model"))
    assert status == (200 if not wrong else 404 if "model" in body else 400), answer[:2000]
    assert wrong or not re.search(rb'"error": ?[{"]', answer), answer[-2000:]
    counts[str(status)] += 1


async def send_many(port: int, count: int, seed: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    numbers = iter(range(count))

    async def client() -> None:
        for number in numbers:
            await send(port, random.Random(f"{seed} {number}"), counts)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return counts


def resident(pid: int) -> int:
    """Bytes of memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_two_thousand_requests_leave_nothing_behind(server: tuple[str, int, int]) -> None:
    host, port, pid = server
    asyncio.run(send_many(port, 500, seed=1))  # caches fill, and the allocator takes what it wants
    warm = resident(pid)
    counts = asyncio.run(send_many(port, 2000, seed=2))
    assert sum(counts.values()) == 2000
    assert counts["left"] > 50
    assert counts["200"] > 1000
    for _ in range(100):
        with urlopen(f"http://{host}:{port}/server_info", timeout=30) as answer:
            (state,) = json.loads(answer.read())["internal_states"]
        if not (state["running"] or state["waiting"]):
            break
        time.sleep(0.1)
    assert (state["running"], state["waiting"]) == (0, 0)
    assert resident(pid) < 1.05 * warm, f"{warm / 1e6:.0f} MB became {resident(pid) / 1e6:.0f} MB"
