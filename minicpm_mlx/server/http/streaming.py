"""What the routes of all APIs share: strict bodies, streams of events, leaving clients."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Discriminator

from .api_error import ApiError

if TYPE_CHECKING:
    pass

T = TypeVar("T")


class Body(BaseModel):
    """A request's body: what it does not declare is refused, not ignored."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _text_or_parts(value: object) -> str | None:
    if isinstance(value, str):
        return "(text)"
    return "(parts)" if isinstance(value, list) else None


TEXT_OR_PARTS = Discriminator(
    _text_or_parts,
    custom_error_type="text_or_parts",
    custom_error_message="expected text, or a list of parts",
)
"""Tells text, with the tag "(text)", from a list, "(parts)"; what is neither is told of both."""


class Gone(Exception):
    """The client has left; nobody reads an answer."""


async def answered(request: Request, work: Awaitable[T]) -> T:
    """What `work` comes to, which is given up as soon as the client leaves; Gone is raised then."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        for one in (task, leaving):
            one.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await one


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def plain(data: object) -> str:
    """Compact JSON; a model without the fields that are not set."""
    if isinstance(data, BaseModel):
        return data.model_dump_json(exclude_none=True)
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def sse(data: object, event: str | None = None) -> bytes:
    """A server-sent event; a string is sent as it is."""
    text = data if isinstance(data, str) else plain(data)
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {text}\n\n".encode()


def ndjson(data: object) -> bytes:
    """A line of JSON."""
    return f"{plain(data)}\n".encode()


def streamed(
    chunks: AsyncGenerator[bytes, None],
    *,
    trouble: Callable[[ApiError], bytes],
    media_type: str = "text/event-stream",
) -> StreamingResponse:
    """A response of `chunks`, which are closed when the client leaves.

    What goes wrong after the first byte can only be told in the stream: `trouble` writes it.
    """

    async def guarded() -> AsyncGenerator[bytes, None]:
        try:
            async for chunk in chunks:
                yield chunk
        except ApiError as refusal:
            yield trouble(refusal)
        finally:
            await chunks.aclose()

    headers: dict[str, Any] = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(guarded(), media_type=media_type, headers=headers)


def identifier(prefix: str) -> str:
    """A name of its own for an answer or a part of one, such as "chatcmpl-3f..."."""
    return prefix + uuid.uuid4().hex
