"""A reply as the responses API tells it: output items, and the events that build them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..http.api_error import ApiError
from ..http.streaming import identifier
from ..tool_calling import Toolbox, ToolCall
from .common import chat_logprobs

if TYPE_CHECKING:
    from ...lm.outputs import Stats
    from ..service import Chunk, FullReply, Service

Event = dict[str, Any]


class ResponseStream:
    """Takes the parts of one reply, or the whole of it, and gives events; then the response."""

    def __init__(self, service: Service, echoed: dict[str, Any], tools: Toolbox, logprobs: bool):
        self.service, self.echoed, self.logprobs = service, echoed, logprobs
        self.reader = tools.reader()
        self.id, self.created = identifier("resp_"), int(time.time())
        self.output: list[dict[str, Any]] = []
        self.message: dict[str, Any] | None = None
        """The item that text goes to, while it is open."""
        self.part: Chunk | FullReply | None = None
        self.error: dict[str, Any] | None = None
        self.number = 0

    def begin(self) -> Iterator[Event]:
        """Before anything is known of the reply."""
        for name in ("response.created", "response.in_progress"):
            yield self._event(name, response=self.response())
        if self.reader is None:
            yield from self._open()

    def add(self, part: Chunk | FullReply) -> Iterator[Event]:
        """What a part of the reply comes to."""
        self.part = part
        pieces: list[str | ToolCall] = [part.text]
        if self.reader is not None:
            pieces = self.reader.add(part.text)
            if part.finish_reason:
                pieces += self.reader.finish(part.stopped_by)
        tokens = chat_logprobs(self.service, part.tokens) if self.logprobs else []
        for piece in pieces:
            if isinstance(piece, ToolCall):
                yield from self._close()
                yield from self._call(piece)
            elif piece or tokens:
                yield from self._say(piece, tokens)
                tokens = []
        if part.finish_reason:
            yield from self._end(part.finish_reason)

    def fail(self, refusal: ApiError) -> Iterator[Event]:
        """The reply broke off."""
        yield self._event("error", code=refusal.code, message=refusal.message, param=refusal.field)
        self.error = {"code": "server_error", "message": refusal.message}
        yield self._event("response.failed", response=self.response())

    def response(self) -> dict[str, Any]:
        """The answer as far as it is known."""
        part, status = self.part, "in_progress"
        if part is not None and part.finish_reason:
            status = "incomplete" if part.finish_reason == "length" else "completed"
        if self.error:
            status = "failed"
        stats = part.stats if part is not None else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": self.error,
            "incomplete_details": (
                {"reason": "max_output_tokens"} if status == "incomplete" else None
            ),
            "output": self.output,
            "usage": None if stats is None else _usage(stats),
            **self.echoed,
        }

    def _event(self, kind: str, /, **fields: Any) -> Event:
        number, self.number = self.number, self.number + 1
        return {"type": kind, "sequence_number": number, **fields}

    def _place(self, item: dict[str, Any]) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": len(self.output) - 1}

    def _item(self, name: str, item: dict[str, Any]) -> Event:
        # A copy, as the item goes on changing.
        return self._event(name, output_index=len(self.output) - 1, item=dict(item))

    def _open(self) -> Iterator[Event]:
        """A message begins."""
        self.message = {
            "id": identifier("msg_"),
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        self.output.append(self.message)
        yield self._item("response.output_item.added", self.message | {"content": []})
        self.message["content"].append(_text("", []))
        place = self._place(self.message) | {"content_index": 0}
        yield self._event("response.content_part.added", **place, part=_text("", []))

    def _say(self, text: str, tokens: list[dict[str, Any]]) -> Iterator[Event]:
        """More text, with its tokens' log probabilities."""
        if self.message is None:
            yield from self._open()
        assert self.message is not None
        content = self.message["content"][0]
        content["text"] += text
        content["logprobs"] += tokens
        yield self._event(
            "response.output_text.delta",
            **self._place(self.message),
            content_index=0,
            delta=text,
            logprobs=tokens,
        )

    def _close(self, status: str = "completed") -> Iterator[Event]:
        """The message ends, if one is open."""
        if self.message is None:
            return
        message, self.message = self.message, None
        message["status"] = status
        content = message["content"][0]
        place = self._place(message) | {"content_index": 0}
        yield self._event(
            "response.output_text.done",
            **place,
            text=content["text"],
            logprobs=content["logprobs"],
        )
        yield self._event("response.content_part.done", **place, part=content)
        yield self._item("response.output_item.done", message)

    def _call(self, call: ToolCall) -> Iterator[Event]:
        item = {
            "id": identifier("fc_"),
            "type": "function_call",
            "status": "in_progress",
            "call_id": call.id,
            "name": call.name,
            "arguments": "",
        }
        self.output.append(item)
        yield self._item("response.output_item.added", item)
        place, arguments = self._place(item), call.arguments
        yield self._event("response.function_call_arguments.delta", **place, delta=arguments)
        item |= {"arguments": arguments, "status": "completed"}
        yield self._event(
            "response.function_call_arguments.done", **place, arguments=arguments, name=call.name
        )
        yield self._item("response.output_item.done", item)

    def _end(self, reason: str) -> Iterator[Event]:
        status = "incomplete" if reason == "length" else "completed"
        if not self.output:
            yield from self._open()
        yield from self._close(status)
        yield self._event(f"response.{status}", response=self.response())


def _text(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _usage(stats: Stats) -> dict[str, Any]:
    return {
        "input_tokens": stats.prompt_tokens,
        "input_tokens_details": {"cached_tokens": stats.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": stats.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": stats.prompt_tokens + stats.completion_tokens,
    }
