"""Many clients at once: ours against mlx-lm's server, on the same float32 weights of the demo.

    python benchmarks/serving.py [--rounds 3] [--clients 1 4 8 16] [--json results/NAME.json]

Each client sends three chats after another, streamed: a paragraph of 20 to 300 tokens to go on
with, of its own, 48 tokens of reply, greedy. Both servers run all the time and are asked in turn,
round by round; neither has seen a text before. Reported: tokens of replies a second in all, the
time to the first token (median and 95th percentile), and the longest pause within a reply; and
of ours how soon a place is free after its client left.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import report
from compare import llama_format

from minicpm_mlx.loading.store import folder_of
from minicpm_mlx.model_cards import resolve

REQUESTS = 3
"""Of each client, one after another."""
TOKENS = 48
"""Of each reply, at most."""
LEAVERS = 20
WORDS = re.findall(
    r"\w+",
    "time people water river music house light garden winter stone letter morning friend story "
    "window mountain engine paper silver doctor market bridge summer animal question village",
)


@dataclass
class Seen:
    """Measurements of the clients in one round."""

    tokens: int = 0
    seconds: float = 0
    first: list[float] = field(default_factory=list)
    """Seconds to the first token of each reply."""
    pauses: list[float] = field(default_factory=list)
    """Seconds of the longest pause within each reply."""


def main() -> None:
    parser = report.options(__doc__, rounds=3)
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 4, 8, 16])
    options = parser.parse_args()
    found = report.Report(rounds=options.rounds, requests=REQUESTS, tokens=TOKENS)
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        folder = Path(place) / "demo"
        folder.mkdir()
        llama_format(folder_of(resolve("demo")), folder, dense=True)
        ports = {"ours": _free_port(), "mlx-lm": _free_port()}
        commands = {
            "ours": ["-c", "from minicpm_mlx.cli.main import main; main()", "serve"],
            # Ours is imported for the BLAS that it finds.
            "mlx-lm": ["-c", "import minicpm_mlx; from mlx_lm.server import main; main()"],
        }
        commands["mlx-lm"] += ["--decode-concurrency", "16"]
        for name, command in commands.items():
            stack.enter_context(_Server([*command, "--model", str(folder)], ports[name]))
        models = {"ours": "default", "mlx-lm": "default_model"}
        for name, port in ports.items():  # to warm up
            asyncio.run(_round(port, models[name], 2, -1))
        for clients in options.clients:
            seen: dict[str, list[Seen]] = {name: [] for name in ports}
            for number in range(options.rounds):
                for name, port in ports.items():
                    one = asyncio.run(_round(port, models[name], clients, number))
                    seen[name].append(one)
            for name, rounds in seen.items():
                found.add(f"{name} {clients}", [r.tokens / r.seconds for r in rounds], "tok/s")
                for share, word in ((50, "median"), (95, "p95")):
                    values = [_percentile(r.first, share) for r in rounds]
                    found.add(f"{name} {clients} first token {word}", values)
                values = [statistics.median(r.pauses) for r in rounds]
                found.add(f"{name} {clients} longest pause", values)
        left = [asyncio.run(_leave(ports["ours"], models["ours"])) for _ in range(LEAVERS)]
        found.add("ours, a place is free after its client left", left)
    found.save(options.json)


def _percentile(values: list[float], share: int) -> float:
    ranked = sorted(values)
    return ranked[min(len(ranked) * share // 100, len(ranked) - 1)]


async def _round(port: int, model: str, clients: int, number: int) -> Seen:
    seen, start = Seen(), time.perf_counter()
    await asyncio.gather(
        *(_client(port, model, (clients, number, c), seen) for c in range(clients))
    )
    seen.seconds = time.perf_counter() - start
    return seen


async def _client(port: int, model: str, seed: tuple[int, int, int], seen: Seen) -> None:
    draw = random.Random(str((port, *seed)))  # the same text is never sent twice
    for _ in range(REQUESTS):
        words = " ".join(draw.choices(WORDS, k=draw.randint(20, 300)))
        await _chat(port, model, f"Write a story with these words: {words}", seen)


async def _ask(
    port: int, model: str, text: str, tokens: int = TOKENS
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    body = json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": tokens,
            "temperature": 0,
            "repetition_penalty": 1.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + body)
    return reader, writer


async def _chat(port: int, model: str, text: str, seen: Seen) -> None:
    sent = time.perf_counter()
    reader, writer = await _ask(port, model, text)
    times: list[float] = []
    while line := await reader.readline():
        event = _event(line)
        if _speaks(event):
            times.append(time.perf_counter())
        if event.get("usage"):
            seen.tokens += event["usage"]["completion_tokens"]
    writer.close()
    seen.first.append(times[0] - sent)
    seen.pauses.append(max((b - a for a, b in pairwise(times)), default=0))


def _event(line: bytes) -> dict[str, Any]:
    """The event in a line of a stream; nothing for a line between events."""
    if line.startswith(b"HTTP/") and b" 200 " not in line:
        raise RuntimeError(line.decode())
    event: dict[str, Any] = json.loads(line[6:]) if line.startswith(b"data: {") else {}
    return event


def _speaks(event: dict[str, Any]) -> bool:
    return any(choice.get("delta", {}).get("content") for choice in event.get("choices", []))


async def _leave(port: int, model: str) -> float:
    """Seconds from a client's leaving until its place is free, while three others are answered."""
    text = f"Write a story with these words: {' '.join(WORDS)}"
    clients = [await _ask(port, model, f"{number}. {text}", 400) for number in range(4)]
    for reader, _ in clients:
        while not _speaks(_event(line := await reader.readline())):
            if not line:
                raise RuntimeError("the server ended a reply before it began")
    asking = await asyncio.open_connection("127.0.0.1", port)
    await _running(*asking)
    left = time.perf_counter()
    clients[0][1].transport.abort()
    while await _running(*asking) == 4:
        await asyncio.sleep(0.01)  # the server has replies to make
    freed = time.perf_counter() - left
    for _, writer in clients[1:]:
        writer.close()
    while await _running(*asking):
        await asyncio.sleep(0.1)
    asking[1].close()
    return freed


async def _running(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
    """Replies that are being made, by a connection that stays."""
    writer.write(b"GET /server_info HTTP/1.1\r\nHost: localhost\r\n\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    if length is None:
        raise RuntimeError(head.decode())
    (state,) = json.loads(await reader.readexactly(int(length[1])))["internal_states"]
    return int(state["running"])


class _Server:
    """A server process while the block lasts."""

    def __init__(self, command: list[str], port: int):
        self.command = [sys.executable, *command, "--port", str(port)]
        self.port = port

    def __enter__(self) -> None:
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(120):
            time.sleep(1)
            if self.process.poll() is not None:
                raise RuntimeError(f"{' '.join(self.command)} ended with {self.process.returncode}")
            try:
                urlopen(f"http://127.0.0.1:{self.port}/v1/models", timeout=5).close()
                return
            except OSError:
                continue
        raise RuntimeError(f"{' '.join(self.command)} does not answer")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


if __name__ == "__main__":
    main()
