"""Reads a request's body within its limits and checks that it is JSON before anything else does."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress

from starlette.types import Message, Receive

from ...files.strict_json import StrictJson
from .api_error import ApiError
from .streaming import ClientDisconnected

DEPTH = 128
"""Nested lists and objects, at most: code that reads them later may be recursive."""
_LINGER = 8
"""A body of up to this many times the limit is read to its end and dropped, so that a client that
writes before it reads gets a response and not a broken pipe."""


async def read(receive: Receive, declared: int, limit: int, seconds: float, wait: bool) -> bytes:
    """The body; ApiError 413 above `limit` bytes, 408 after `seconds`.

    `declared` is its Content-Length (0: not given). With `wait` the client sends the body only
    after 100 Continue (Expect: 100-continue), so a refused one is not read at all.
    """
    too_long = ApiError(
        f"the body is longer than {limit} bytes; send a shorter prompt",
        status=413,
        code="body_too_large",
    )
    if declared > limit and wait:
        raise too_long
    body, size, deadline = bytearray(), 0, time.monotonic() + seconds
    more = True
    while more and size <= limit * _LINGER:
        try:
            message = await asyncio.wait_for(receive(), deadline - time.monotonic())
        except asyncio.TimeoutError:
            raise ApiError(
                f"the body did not arrive within {seconds:g} seconds; send it again", status=408
            ) from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        data = message.get("body", b"")
        size += len(data)
        if max(size, declared) <= limit:
            body += data
        more = message.get("more_body", False)
    if size > limit:
        raise too_long
    return bytes(body)


class _BodyJson(StrictJson):
    def _integer(self, digits: str) -> int:
        number = super()._integer(digits)
        if not -(2**63) <= number < 2**64:
            self._problem = f"expected numbers of 64 bits, got one of {len(digits)} digits"
            return 0
        return number


def check_json(body: bytes) -> None:
    """ApiError 400 for a body that is not standard JSON or could not be written as JSON again."""
    try:
        value = _BodyJson().whole(body.decode())
        try:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        except ValueError:
            raise ValueError("expected finite numbers, got one beyond 1.8e308") from None
        text.encode()
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
    else:
        return
    raise ApiError(f"the body is not valid JSON: {problem}", code="invalid_json")


def _depth(value: object) -> int:
    """The depth of nested lists and objects, counted without recursion."""
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        level = [
            inner for item in level for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return depth


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns the body that was read, and then later messages."""
    unread = [body]

    async def receive_again() -> Message:
        with suppress(IndexError):
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        return await receive()

    return receive_again
