"""Anthropic's Messages API: /v1/messages, and /v1/messages/count_tokens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from ...lm.outputs import Stats
from ..http.api_error import ApiError
from ..http.streaming import identifier, sse, streamed
from ..parameters import grammar_of
from ..reply_stream import wholes
from ..tool_calling import ToolCall
from .schema import CountBody, MessagesBody

if TYPE_CHECKING:
    from ..service import (
        Chunk,
        FullReply,
        GenerationRequest,
        Replies,
        Service,
    )

PING = 15.0
"""Seconds without a word after which a stream says that it is still there."""

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def refused(refusal: ApiError) -> dict[str, Any]:
    """The body of an answer that is none."""
    kind = _KINDS.get(refusal.status, "api_error" if refusal.status >= 500 else None)
    error = {"type": kind or "invalid_request_error", "message": refusal.message}
    return {"type": "error", "error": error, "request_id": identifier("req_")}


def router(service: Service) -> APIRouter:
    """The routes of the Messages API."""
    routes = APIRouter()

    @routes.post("/v1/messages")
    async def messages(body: MessagesBody, request: Request) -> Response:
        """Answer a conversation."""
        message = MessageRun(service, body)
        ask = await message.ask()
        replies = service.start([ask], "messages")
        headers = {"request-id": identifier("req_")}
        if body.stream:
            response: Response = streamed(
                _events(message, replies, len(ask.prompt)),
                trouble=lambda refusal: sse(refused(refusal), event="error"),
            )
            response.headers.update(headers)
            return response
        (whole,) = await wholes(request, replies)
        return JSONResponse(message.whole(whole), headers=headers)

    @routes.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountBody) -> Response:
        """How many tokens a conversation is."""
        body.check()
        service.served(body.model)
        prompt, _ = body.prompt(service, body.toolbox(service))
        headers = {"request-id": identifier("req_")}
        return JSONResponse({"input_tokens": len(prompt)}, headers=headers)

    return routes


class MessageRun:
    """One reply, as its content comes."""

    def __init__(self, service: Service, body: MessagesBody):
        body.check()
        self.service, self.body = service, body
        self.served = service.served(body.model)
        self.toolbox = body.toolbox(service)
        self.reader = self.toolbox.reader()
        self.called = False
        """A function, at least once."""

    async def ask(self) -> GenerationRequest:
        from ..service import GenerationRequest

        body, toolbox = self.body, self.toolbox
        prompt, stops = body.prompt(self.service, toolbox)
        grammar = await grammar_of(self.service, body.guide(), "output_config.format")
        return GenerationRequest(
            prompt=prompt,
            served=self.served,
            sampling=self.service.sampling(
                temperature=body.temperature, top_p=body.top_p, top_k=body.top_k
            ),
            max_tokens=body.max_tokens,
            stop=[*(body.stop_sequences or ()), *stops, *toolbox.stops],
            keep_special=toolbox.keep_special,
            grammar=grammar or await toolbox.grammar(),
        )

    def read(self, part: Chunk | FullReply) -> list[str | ToolCall]:
        """What is certain of the content with the next part of the reply."""
        pieces: list[str | ToolCall] = [part.text] if part.text else []
        if self.reader is not None:
            pieces = self.reader.add(part.text)
            if part.finish_reason:
                pieces += self.reader.finish(part.stopped_by)
        self.called = self.called or any(isinstance(piece, ToolCall) for piece in pieces)
        return pieces

    def head(self) -> dict[str, Any]:
        """The message before anything is in it."""
        return {
            "id": identifier("msg_"),
            "type": "message",
            "role": "assistant",
            "model": self.served.name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }

    def whole(self, whole: FullReply) -> dict[str, Any]:
        """The answer that is not streamed."""
        content: list[dict[str, Any]] = []
        for piece in self.read(whole):
            if isinstance(piece, str) and content and content[-1]["type"] == "text":
                content[-1]["text"] += piece
            else:
                content.append(_block(piece))
        return {
            **self.head(),
            "content": content or [_block("")],
            **self.end(whole),
            "usage": usage(whole.stats),
        }

    def end(self, last: Chunk | FullReply) -> dict[str, Any]:
        """Why the reply ended."""
        by_client = last.stopped_by in (self.body.stop_sequences or ())
        reason = "end_turn"
        if self.called:
            reason, by_client = "tool_use", False
        elif last.finish_reason == "length":
            assert last.stats is not None
            full = last.stats.completion_tokens < self.body.max_tokens
            reason = "model_context_window_exceeded" if full else "max_tokens"
        elif by_client:
            reason = "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": last.stopped_by if by_client else None}


def usage(stats: Stats) -> dict[str, int]:
    """Tokens read and written; those that were known already are counted apart."""
    return {
        "input_tokens": stats.prompt_tokens - stats.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": stats.cached_tokens,
        "output_tokens": stats.completion_tokens,
    }


def _block(piece: str | ToolCall) -> dict[str, Any]:
    if isinstance(piece, str):
        return {"type": "text", "text": piece}
    return {**_begun(piece), "input": json.loads(piece.arguments)}


def _begun(call: ToolCall) -> dict[str, Any]:
    """A call before its arguments."""
    name = f"toolu_{call.id.removeprefix('call_')}"
    return {"type": "tool_use", "id": name, "name": call.name, "input": {}}


async def _events(
    message: MessageRun, replies: Replies, prompt_tokens: int
) -> AsyncGenerator[bytes, None]:
    """The answer as it comes."""
    async with replies:
        begun = {"input_tokens": prompt_tokens, "output_tokens": 0}
        yield _event("message_start", message={**message.head(), "usage": begun})
        yield _event("ping")
        blocks = ContentBlockStream()
        async for part in _or_pings(aiter(replies)):
            if part is None:
                yield _event("ping")
                continue
            for piece in message.read(part):
                for event in blocks.add(piece):
                    yield event
            if part.stats is not None:
                for event in blocks.finish():
                    yield event
                yield _event("message_delta", delta=message.end(part), usage=usage(part.stats))
    yield _event("message_stop")


async def _or_pings(parts: AsyncIterator[Chunk]) -> AsyncIterator[Chunk | None]:
    """The parts, and None where none came for a while."""
    coming: asyncio.Future[Chunk] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(parts))
            if not (await asyncio.wait({coming}, timeout=PING))[0]:
                yield None
                continue
            come, coming = coming, None
            try:
                yield come.result()
            except StopAsyncIteration:
                return
    finally:
        if coming:
            coming.cancel()


class ContentBlockStream:
    """The events of the content's blocks: a run of text is one, a call is one."""

    def __init__(self) -> None:
        self.index = 0
        self.open = False
        """A block has begun, and not ended."""

    def add(self, piece: str | ToolCall) -> Iterator[bytes]:
        """Those of the next piece."""
        if isinstance(piece, str):
            if not self.open:
                self.open = True
                yield self._start(_block(""))
            yield self._delta({"type": "text_delta", "text": piece})
            return
        yield from self._stop()
        yield self._start(_begun(piece))
        yield self._delta({"type": "input_json_delta", "partial_json": piece.arguments})
        self.open = True
        yield from self._stop()

    def finish(self) -> Iterator[bytes]:
        """The end; content without anything is one empty text."""
        if self.index == 0 and not self.open:
            self.open = True
            yield self._start(_block(""))
        yield from self._stop()

    def _start(self, block: dict[str, Any]) -> bytes:
        return _event("content_block_start", index=self.index, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self.index, delta=delta)

    def _stop(self) -> Iterator[bytes]:
        """The end of the block that is open, if one is."""
        if self.open:
            yield _event("content_block_stop", index=self.index)
            self.index, self.open = self.index + 1, False


def _event(kind: str, **fields: Any) -> bytes:
    return sse({"type": kind, **fields}, event=kind)
