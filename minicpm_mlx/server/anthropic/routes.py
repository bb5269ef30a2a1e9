"""Anthropic's Messages API: /v1/messages, and /v1/messages/count_tokens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from ...lm.outputs import Stats
from ...lm.tools.calls import CallDelta, CallReader, Part, Thought, ToolCall
from ...lm.tools.growing_json import whole_members
from ..http.api_error import ERROR_TYPES, ApiError
from ..http.streaming import named_sse, new_id, stream_response
from ..reply_stream import Chunk, FullReply, GenerationRequest, ReplyStream, full_replies
from ..service import Service
from .schema import ConversationBody, MessagesBody

Event = dict[str, Any]

PING = 15.0
"""Seconds without a chunk after which a stream sends a ping."""

_ERROR_TYPES = {**ERROR_TYPES, 413: "request_too_large", 503: "overloaded_error"}


def error_body(error: ApiError) -> dict[str, Any]:
    kind = _ERROR_TYPES.get(error.status, "api_error" if error.status >= 500 else None)
    details: dict[str, Any] = {"type": kind or "invalid_request_error", "message": error.message}
    if error.field == "thread":  # Anthropic's clients send the request again without it
        details["details"] = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    return {"type": "error", "error": details, "request_id": new_id("req_")}


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/messages")
    async def messages(body: MessagesBody, request: Request) -> Response:
        """Continue a conversation."""
        run = MessageRun(service, body)
        generation = await run.generation()
        stream = service.start([generation], "messages")
        if body.stream:
            events = _events(run, stream, len(generation.prompt.ids))
            response: Response = stream_response(events, encode=named_sse, error_body=error_body)
        else:
            [reply] = await full_replies(request, stream)
            response = JSONResponse(run.response(reply))
        response.headers["request-id"] = new_id("req_")
        return response

    @routes.post("/v1/messages/count_tokens")
    async def count_tokens(body: ConversationBody) -> Response:
        """Count the tokens of a conversation."""
        service.find_model(body.model)
        prompt = body.prompt(service, body.request_tools(service))
        headers = {"request-id": new_id("req_")}
        return JSONResponse({"input_tokens": len(prompt.ids)}, headers=headers)

    return routes


class MessageRun:
    """One request from its body to its response."""

    def __init__(self, service: Service, body: MessagesBody):
        self.service, self.body = service, body
        self.served = service.find_model(body.model)
        self.tools = body.request_tools(service)
        self.reader = CallReader(None, {})
        """That of the tools once it is known whether their calls are held."""
        self.has_called = False

    async def generation(self) -> GenerationRequest:
        body, tools = self.body, self.tools
        prompt = body.prompt(self.service, tools)
        grammar = await tools.grammar({"output_config.format": body.guide()})
        self.reader = tools.reader(streams=True)
        return GenerationRequest(
            prompt=prompt,
            continues=body.continues_reply,
            served=self.served,
            sampling=body.sampling(self.service, prompt),
            think_tokens=body.wanted_thinking().tokens,
            max_tokens=body.max_tokens,
            stop=[*(body.stop_sequences or ()), *prompt.stops, *tools.stops],
            keep_special=tools.keep_special,
            token_marks=tools.token_marks,
            grammar=grammar,
        )

    def read(self, chunk: Chunk) -> list[Part]:
        pieces = self.reader.read(chunk)
        self.has_called = self.has_called or any(isinstance(piece, ToolCall) for piece in pieces)
        return pieces

    def head(self) -> dict[str, Any]:
        """The message without content."""
        return {
            "id": new_id("msg_"),
            "type": "message",
            "role": "assistant",
            "model": self.served.name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }

    def response(self, reply: FullReply) -> dict[str, Any]:
        content: list[dict[str, Any]] = []
        for piece in self.read(reply):
            if isinstance(piece, str) and content and content[-1]["type"] == "text":
                content[-1]["text"] += piece
            elif not isinstance(piece, CallDelta):
                content.append(_block(piece))
        if call := self.reader.open:  # cut off
            content.append({**_call_head(call), "input": whole_members(call.arguments)})
        if content[-1:] and content[-1]["type"] == "thinking":
            content.append(_block(""))
        return {
            **self.head(),
            "content": content or [_block("")],
            **self.end(reply),
            "usage": usage(reply.stats),
        }

    def end(self, last: Chunk) -> dict[str, Any]:
        """The reason why the reply ended."""
        by_client = last.stopped_by in (self.body.stop_sequences or ())
        reason = "end_turn"
        if self.has_called:
            reason, by_client = "tool_use", False
        elif last.finish_reason == "length":
            assert last.stats is not None
            full = last.stats.completion_tokens < self.body.max_tokens
            reason = "model_context_window_exceeded" if full else "max_tokens"
        elif by_client:
            reason = "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": last.stopped_by if by_client else None}


def usage(stats: Stats) -> dict[str, int]:
    """Token counts; cached tokens of the prompt are counted apart."""
    return {
        "input_tokens": stats.prompt_tokens - stats.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": stats.cached_tokens,
        "output_tokens": stats.completion_tokens,
    }


def _block(piece: str | Thought | ToolCall) -> dict[str, Any]:
    if isinstance(piece, str):
        return {"type": "text", "text": piece}
    if isinstance(piece, Thought):
        return {"type": "thinking", "thinking": piece.text, "signature": ""}
    return {**_call_head(piece), "input": json.loads(piece.arguments)}


def _call_head(call: ToolCall | CallDelta) -> dict[str, Any]:
    """A call without its arguments."""
    name = f"toolu_{call.id.removeprefix('call_')}"
    return {"type": "tool_use", "id": name, "name": call.name, "input": {}}


async def _events(
    run: MessageRun, stream: ReplyStream, prompt_tokens: int
) -> AsyncGenerator[Event, None]:
    async with stream:
        first_usage = {"input_tokens": prompt_tokens, "output_tokens": 0}
        yield _event("message_start", message={**run.head(), "usage": first_usage})
        yield _event("ping")
        blocks = ContentBlockStream()
        async for chunk in _with_pings(aiter(stream)):
            if chunk is None:
                yield _event("ping")
                continue
            for piece in run.read(chunk):
                for event in blocks.add(piece):
                    yield event
            if chunk.stats is not None:
                for event in blocks.finish():
                    yield event
                yield _event("message_delta", delta=run.end(chunk), usage=usage(chunk.stats))
    yield _event("message_stop")


async def _with_pings(chunks: AsyncIterator[Chunk]) -> AsyncIterator[Chunk | None]:
    """The chunks, and None whenever PING seconds pass without one."""
    following: asyncio.Future[Chunk] | None = None
    try:
        while True:
            following = following or asyncio.ensure_future(anext(chunks))
            if not (await asyncio.wait({following}, timeout=PING))[0]:
                yield None
                continue
            done, following = following, None
            try:
                yield done.result()
            except StopAsyncIteration:
                return
    finally:
        if following:
            following.cancel()


class ContentBlockStream:
    """Events of content blocks: consecutive text or thought is one block, each call is one."""

    def __init__(self) -> None:
        self.index = 0
        self.open: str | None = None
        """The type of the block that has begun and not ended."""

    def add(self, piece: Part) -> Iterator[Event]:
        if isinstance(piece, Thought):
            yield from self._begin(_block(Thought("")))
            yield self._delta({"type": "thinking_delta", "thinking": piece.text})
            return
        if isinstance(piece, str):
            yield from self._begin(_block(""))
            yield self._delta({"type": "text_delta", "text": piece})
            return
        if isinstance(piece, ToolCall):
            yield from self._stop()
            return
        if piece.begins:
            yield from self._stop()
            yield self._start(_call_head(piece))
        yield self._delta({"type": "input_json_delta", "partial_json": piece.arguments})

    def finish(self) -> Iterator[Event]:
        """Ends the last block; content without an answer ends in an empty text."""
        if self.open == "thinking" or (self.index == 0 and not self.open):
            yield from self._begin(_block(""))
        yield from self._stop()

    def _begin(self, block: dict[str, Any]) -> Iterator[Event]:
        """Begins a block, unless one of its type is open."""
        if self.open != block["type"]:
            yield from self._stop()
            yield self._start(block)

    def _start(self, block: dict[str, Any]) -> Event:
        self.open = block["type"]
        return _event("content_block_start", index=self.index, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> Event:
        return _event("content_block_delta", index=self.index, delta=delta)

    def _stop(self) -> Iterator[Event]:
        if self.open == "thinking":  # of Anthropic's own; here nothing is signed
            yield self._delta({"type": "signature_delta", "signature": ""})
        if self.open:
            yield _event("content_block_stop", index=self.index)
            self.index, self.open = self.index + 1, None


def _event(kind: str, **fields: Any) -> Event:
    return {"type": kind, **fields}
