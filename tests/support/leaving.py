"""A client that leaves before its answer is there."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from support.serving import Live


def leaves(server: Live, path: str, body: dict[str, Any]) -> None:
    """Ask for a long reply, leave as soon as it is being made, and see that it is given up."""
    finished: list[str] = []

    def watch(part: Any) -> None:
        finished.extend([part.finish_reason] if part.finish_reason else [])

    def running() -> bool:
        return server.service.state()["running"] > 0

    server.service.observers.append(watch)
    connection = http.client.HTTPConnection(*server.place, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    _wait(running, 30, "the reply did not begin")
    connection.close()
    _wait(lambda: not running(), 5, "the reply was not given up")
    server.service.observers.remove(watch)
    assert not finished, "the reply was finished, not given up"


def _wait(done: Callable[[], bool], seconds: float, otherwise: str) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, otherwise
        time.sleep(0.01)
