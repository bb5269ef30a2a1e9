"""Streams of events, and work that ends when its client disconnects."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse

from .api_error import ApiError

T = TypeVar("T")


class ClientDisconnected(Exception):
    """The client has closed its connection; nobody reads a response."""


async def run_until_disconnect(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`. Cancels it and raises ClientDisconnected when the client leaves."""
    task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        for future in (task, disconnect):
            future.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await future


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def sse(data: Mapping[str, Any] | str) -> bytes:
    """A server-sent event; a string is sent as it is."""
    return f"data: {data if isinstance(data, str) else _compact_json(data)}\n\n".encode()


def named_sse(data: Mapping[str, Any]) -> bytes:
    """A server-sent event named after its `type`."""
    return f"event: {data['type']}\n".encode() + sse(data)


def ndjson(data: Mapping[str, Any]) -> bytes:
    return f"{_compact_json(data)}\n".encode()


def _compact_json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def stream_response(
    events: AsyncGenerator[dict[str, Any], None],
    *,
    encode: Callable[[dict[str, Any]], bytes],
    error_body: Callable[[ApiError], dict[str, Any]],
    last: bytes = b"",
    media_type: str = "text/event-stream",
) -> StreamingResponse:
    """A response of `events` and `last`; closes `events` when the client leaves.

    An error after the first byte can only be sent as an event; `error_body` makes it.
    """

    async def encoded() -> AsyncGenerator[bytes, None]:
        try:
            async for event in events:
                yield encode(event)
            if last:
                yield last
        except ApiError as error:
            yield encode(error_body(error))
        finally:
            await events.aclose()

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(encoded(), media_type=media_type, headers=headers)


def new_id(prefix: str) -> str:
    """A unique name for a response or a part of one, such as "chatcmpl-3f..."."""
    return prefix + uuid.uuid4().hex
