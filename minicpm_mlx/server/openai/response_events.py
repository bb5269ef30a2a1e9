"""Output items of OpenAI's responses API, and the events of its streams."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...lm.outputs import Stats
from ...lm.tools.calls import CallDelta, Thought, ToolCall
from ..http.api_error import ApiError
from ..http.streaming import new_id
from ..reply_stream import Chunk
from ..service import Service
from ..tool_calling import RequestTools
from .common import chat_logprobs

ResponseEvent = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """Of items that have text."""

    prefix: str
    """Of their ids."""
    head: dict[str, Any]
    part: str
    """The type of their content."""
    lists: tuple[str, ...] = ()
    """Further fields of their content."""
    place: str = "content"
    """The field that their content is in."""
    part_event: str = "content_part"
    text_event: str = ""
    """The events of their text; none is `part`."""

    def content(self) -> dict[str, Any]:
        """Their content, empty."""
        return {"type": self.part, "text": "", **{name: [] for name in self.lists}}

    def name(self, end: str) -> str:
        """The name of an event of their text."""
        return f"response.{self.text_event or self.part}.{end}"


_MESSAGE = _Kind(
    prefix="msg_",
    head={"type": "message", "role": "assistant"},
    part="output_text",
    lists=("annotations", "logprobs"),
)
_THOUGHT = _Kind(prefix="rs_", head={"type": "reasoning", "summary": []}, part="reasoning_text")
_SUMMARY = _Kind(
    prefix="rs_",
    head={"type": "reasoning", "summary": []},
    part="summary_text",
    place="summary",
    part_event="reasoning_summary_part",
    text_event="reasoning_summary_text",
)
"""A thought where the request wants a summary: its text, since nothing shortens it here."""


class ResponseStream:
    """Turns the chunks of one reply, or the full reply, into events and the response."""

    def __init__(
        self,
        service: Service,
        echoed: dict[str, Any],
        tools: RequestTools,
        logprobs: bool,
        namespaced: Mapping[str, tuple[str | None, str]],
    ):
        """`namespaced` has namespace and name by the name that the model knows."""
        self.namespaced = namespaced
        self.thought = _SUMMARY if echoed["reasoning"]["summary"] else _THOUGHT
        self.service, self.echoed, self.logprobs = service, echoed, logprobs
        self.thinks = service.lm.tokenizer.thinking is not None
        self.reader, self.has_tools = tools.reader(streams=True), tools.active
        self.id, self.created = new_id("resp_"), int(time.time())
        self.output: list[dict[str, Any]] = []
        self.message: dict[str, Any] | None = None
        """The open item, a message or a thought, to which text is added."""
        self.call: dict[str, Any] | None = None
        """The open item that is a call."""
        self.chunk: Chunk | None = None
        self.kind = _MESSAGE
        """Of the open item."""
        self.error: dict[str, Any] | None = None
        self.number = 0

    def begin(self) -> Iterator[ResponseEvent]:
        """The events before the first chunk."""
        for name in ("response.created", "response.in_progress"):
            yield self._event(name, response=self.response())
        if not self.has_tools and not self.thinks:
            yield from self._open(_MESSAGE)

    def add(self, chunk: Chunk) -> Iterator[ResponseEvent]:
        self.chunk = chunk
        pieces = self.reader.read(chunk)
        tokens = chat_logprobs(self.service, chunk.answer_tokens) if self.logprobs else []
        for piece in pieces or ([""] if tokens and not self.has_tools else []):
            if isinstance(piece, CallDelta):
                yield from self._add_arguments(piece)
            elif isinstance(piece, ToolCall):
                yield from self._end_call()
            elif isinstance(piece, Thought):
                yield from self._add_text(self.thought, piece.text)
            else:
                yield from self._add_text(_MESSAGE, piece, tokens)
                tokens = []
        if chunk.finish_reason:
            yield from self._end(chunk.finish_reason)

    def fail(self, refusal: ApiError) -> Iterator[ResponseEvent]:
        """The events of a reply that failed."""
        yield self._event("error", code=refusal.code, message=refusal.message, param=refusal.field)
        self.error = {"code": "server_error", "message": refusal.message}
        yield self._event("response.failed", response=self.response())

    def response(self) -> dict[str, Any]:
        """The response so far."""
        chunk, status = self.chunk, "in_progress"
        if chunk is not None and chunk.finish_reason:
            status = _status(chunk.finish_reason)
        if self.error:
            status = "failed"
        stats = chunk.stats if chunk is not None else None
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

    def _event(self, kind: str, /, **fields: Any) -> ResponseEvent:
        number, self.number = self.number, self.number + 1
        return {"type": kind, "sequence_number": number, **fields}

    def _position(self, item: dict[str, Any]) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": len(self.output) - 1}

    def _place(self, item: dict[str, Any]) -> dict[str, Any]:
        """The position of an item's text."""
        return {**self._position(item), f"{self.kind.place}_index": 0}

    def _item(self, name: str, item: dict[str, Any]) -> ResponseEvent:
        # A copy, because the item changes later.
        return self._event(name, output_index=len(self.output) - 1, item=dict(item))

    def _open(self, kind: _Kind) -> Iterator[ResponseEvent]:
        """Begins a message or a thought."""
        self.kind = kind
        status = {"status": "in_progress"}
        self.message = {"id": new_id(kind.prefix), **kind.head, **status, "content": []}
        self.output.append(self.message)
        yield self._item("response.output_item.added", self.message)
        self.message[kind.place] = [kind.content()]
        yield self._event(
            f"response.{kind.part_event}.added", **self._place(self.message), part=kind.content()
        )

    def _add_text(
        self, kind: _Kind, text: str, tokens: Sequence[dict[str, Any]] = ()
    ) -> Iterator[ResponseEvent]:
        """Adds text with its tokens' log probabilities."""
        if self.message is None or self.kind is not kind:
            yield from self._close()
            yield from self._open(kind)
        assert self.message is not None
        content = self.message[kind.place][0]
        content["text"] += text
        logprobs = {}
        if "logprobs" in content:
            content["logprobs"] += tokens
            logprobs["logprobs"] = list(tokens)
        yield self._event(kind.name("delta"), **self._place(self.message), delta=text, **logprobs)

    def _close(self, status: str = "completed") -> Iterator[ResponseEvent]:
        """Ends the message or the thought, if one is open."""
        if self.message is None:
            return
        message, self.message = self.message, None
        message["status"] = status
        content, position = message[self.kind.place][0], self._place(message)
        fields = {name: content[name] for name in ("text", "logprobs") if name in content}
        yield self._event(self.kind.name("done"), **position, **fields)
        yield self._event(f"response.{self.kind.part_event}.done", **position, part=content)
        yield self._item("response.output_item.done", message)

    def _add_arguments(self, part: CallDelta) -> Iterator[ResponseEvent]:
        if part.begins:
            yield from self._close()
            namespace, name = self.namespaced.get(part.name, (None, part.name))
            self.call = {
                "id": new_id("fc_"),
                "type": "function_call",
                "status": "in_progress",
                "call_id": part.id,
                "name": name,
                **({"namespace": namespace} if namespace else {}),
                "arguments": "",
            }
            self.output.append(self.call)
            yield self._item("response.output_item.added", self.call)
        assert self.call is not None
        self.call["arguments"] += part.arguments
        yield self._event(
            "response.function_call_arguments.delta",
            **self._position(self.call),
            delta=part.arguments,
        )

    def _end_call(self, status: str = "completed") -> Iterator[ResponseEvent]:
        """Ends the call, if one is open."""
        if self.call is None:
            return
        call, self.call = self.call, None
        call["status"] = status
        yield self._event(
            "response.function_call_arguments.done",
            **self._position(call),
            arguments=call["arguments"],
            name=call["name"],
        )
        yield self._item("response.output_item.done", call)

    def _end(self, reason: str) -> Iterator[ResponseEvent]:
        status = _status(reason)
        if not self.output:
            yield from self._open(_MESSAGE)
        yield from self._end_call(status)
        yield from self._close(status)
        yield self._event(f"response.{status}", response=self.response())


def _status(finish_reason: str) -> str:
    return "incomplete" if finish_reason == "length" else "completed"


def _usage(stats: Stats) -> dict[str, Any]:
    return {
        "input_tokens": stats.prompt_tokens,
        "input_tokens_details": {"cached_tokens": stats.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": stats.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": stats.thinking_tokens},
        "total_tokens": stats.prompt_tokens + stats.completion_tokens,
    }
