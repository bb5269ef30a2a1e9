"""A request's body: read within its limits, and held to be JSON before anything else sees it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from ...files.strict_json import StrictJson
from .api_error import ApiError
from .streaming import Gone

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

DEPTH = 128
"""Levels of lists and objects; what reads them further on may do so by recursion."""
_LINGER = 8
"""A body of up to this many times the limit is read to its end and thrown away, so that a client
which writes before it reads gets an answer and not a broken pipe."""


async def read(receive: Receive, declared: int, limit: int, seconds: float, wait: bool) -> bytes:
    """The whole body; ApiError 413 if it is longer than `limit` bytes, 408 if it takes longer.

    `declared` is its Content-Length (0: none was given). `wait`: the client sends none before it is
    told to go on (Expect: 100-continue), so one that is refused need not be read.
    """
    too_long = ApiError(
        413, f"the body is longer than {limit} bytes; send a shorter prompt", code="body_too_large"
    )
    if declared > limit and wait:
        raise too_long
    parts, size, until = bytearray(), 0, time.monotonic() + seconds
    more = True
    while more and size <= limit * _LINGER:
        try:
            message = await asyncio.wait_for(receive(), until - time.monotonic())
        except asyncio.TimeoutError:
            raise ApiError(
                408, f"the body did not come within {seconds:g} seconds; send it again"
            ) from None
        if message["type"] == "http.disconnect":
            raise Gone
        piece = message.get("body", b"")
        size += len(piece)
        if max(size, declared) <= limit:
            parts += piece
        more = message.get("more_body", False)
    if size > limit:
        raise too_long
    return bytes(parts)


class _Json(StrictJson):
    def _integer(self, digits: str) -> int:
        number = super()._integer(digits)
        if not -(2**63) <= number < 2**64:
            self._problem = f"expected numbers of 64 bits, found one of {len(digits)} digits"
            return 0
        return number


def check_json(body: bytes) -> None:
    """ApiError 400 for what is not JSON by its standard, or could not be written as JSON again."""
    try:
        value = _Json().whole(body.decode())
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        if _depth(value) > DEPTH:
            raise ValueError(f"lists and objects are nested more than {DEPTH} deep")
    except UnicodeDecodeError as error:
        problem = f"it is not UTF-8 (byte {error.start})"
    except UnicodeEncodeError:
        problem = "a \\u escape stands for half a character (a lone surrogate)"
    except RecursionError:
        problem = f"lists and objects are nested more than {DEPTH} deep"
    except ValueError as error:
        problem = str(error)[:300]
        if problem.startswith("Out of range float"):
            problem = "expected finite numbers, found one beyond 1.8e308"
    else:
        return
    raise ApiError(400, f"the body is no valid JSON: {problem}", code="invalid_json")


def _depth(value: object) -> int:
    """How deep lists and objects are nested, counted without recursion."""
    level, depth = [value], 0
    while level := [one for one in level if isinstance(one, (dict, list))]:
        depth += 1
        level = [
            inner for one in level for inner in (one.values() if isinstance(one, dict) else one)
        ]
    return depth


def given_again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body which was read, and then what comes after it."""
    waiting = [body]

    async def again() -> Message:
        with suppress(IndexError):
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return again
