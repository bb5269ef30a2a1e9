"""OpenAI's /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from ..http.api_error import ApiError
from ..http.streaming import identifier
from ..parameters import compute, grammar_of_one, refuse_all
from ..reply_stream import wholes
from ..tool_calling import (
    CallReader,
    NamedChoice,
    Tool,
    Toolbox,
    ToolCall,
)
from .common import chat_logprobs, events, usage
from .messages import Message, templated
from .options import OpenAIOptions, ResponseFormat, guide_of

if TYPE_CHECKING:
    from ..service import (
        Chunk,
        FullReply,
        GenerationRequest,
        Replies,
        Service,
    )


class ChatCompletion(OpenAIOptions):
    """A conversation to answer."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """None: as far as the context goes."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """The older name of the same."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None

    # Accepted without effect.
    store: bool | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None

    # Refused where they ask for something.
    audio: dict[str, Any] | None = None
    modalities: list[Literal["text", "audio"]] | None = None
    function_call: str | dict[str, Any] | None = None
    functions: list[dict[str, Any]] | None = None
    moderation: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    web_search_options: dict[str, Any] | None = None

    def check(self) -> None:
        """Refuse what contradicts itself or cannot be done."""
        self.check_stream()
        refuse_all(
            {
                "audio": (self.audio, "this model writes text alone"),
                "modalities": ("audio" in (self.modalities or ()), "this model writes text alone"),
                "function_call": (self.function_call, "use tool_choice"),
                "functions": (self.functions, "use tools"),
                "moderation": (self.moderation, "nothing here moderates"),
                "prediction": (self.prediction, "leave it out"),
                "reasoning_effort": (
                    self.reasoning_effort not in (None, "none"),
                    "this model does not reason before it answers",
                ),
                "verbosity": (
                    self.verbosity not in (None, "medium"),
                    "say in the messages how long the reply should be",
                ),
                "web_search_options": (self.web_search_options, "nothing here searches the web"),
            }
        )
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs goes with logprobs: true", field="top_logprobs")
        if (
            None not in (both := (self.max_tokens, self.max_completion_tokens))
            and len(set(both)) > 1
        ):
            raise ApiError(
                400,
                "max_tokens and max_completion_tokens differ; give one",
                field="max_completion_tokens",
            )

    def toolbox(self, service: Service) -> Toolbox:
        choice = self.tool_choice or "auto"
        return Toolbox(
            service,
            [tool.function for tool in self.tools or ()],
            choice.function.name if isinstance(choice, NamedChoice) else choice,
            parallel=self.parallel_tool_calls is not False,
        )


class ChatRun:
    """One request on its way."""

    def __init__(self, service: Service, body: ChatCompletion):
        body.check()
        self.service, self.body = service, body
        self.tools = body.toolbox(service)
        self.head = {
            "id": identifier("chatcmpl-"),
            "created": int(time.time()),
            "model": service.served(body.model).name,
        }

    async def asks(self) -> list[GenerationRequest]:
        body = self.body
        messages, tools = templated(body.messages), self.tools.for_template
        prompt, stops = await compute(
            lambda: self.service.conversation(messages, tools=tools), "messages"
        )
        grammar = await grammar_of_one(self.service, self._guides())
        return body.asks(
            self.service,
            [prompt],
            max_tokens=body.max_completion_tokens or body.max_tokens,
            stop=[*body.stops(), *stops, *self.tools.stops],
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            keep_special=self.tools.keep_special or body.skip_special_tokens is False,
            grammar=grammar or await self.tools.grammar(),
        )

    def _guides(self) -> dict[str, dict[str, Any]]:
        """Forms for the reply, by the fields that give them."""
        guides = self.body.guides()
        if guide := guide_of(self.body.response_format):
            guides["response_format"] = guide
        if guides and self.tools.active:
            field = next(iter(guides))
            raise ApiError(400, f"{field} and tools cannot be had together; give one", field=field)
        return guides

    def completion(self, found: Iterable[FullReply]) -> dict[str, Any]:
        """The answer as a whole."""
        replies = list(found)
        return {
            **self.head,
            "object": "chat.completion",
            "choices": [self._choice(index, whole) for index, whole in enumerate(replies)],
            "usage": usage([[whole.stats for whole in replies]]),
        }

    def _choice(self, index: int, whole: FullReply) -> dict[str, Any]:
        text, calls = whole.text, list[ToolCall]()
        if reader := self.tools.reader():
            pieces = [*reader.add(whole.text), *reader.finish(whole.stopped_by)]
            calls = [piece for piece in pieces if isinstance(piece, ToolCall)]
            text = "".join(piece for piece in pieces if isinstance(piece, str))
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message["content"] = text if text.strip() else None
            message["tool_calls"] = [_call(call) for call in calls]
        logprobs = None
        if self.body.logprobs:
            logprobs = {"content": chat_logprobs(self.service, whole.tokens), "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": "tool_calls" if calls else whole.finish_reason,
        }

    async def chunks(self, replies: Replies) -> AsyncGenerator[dict[str, Any], None]:
        """The answer as it comes."""
        streams = [ChoiceStream(i, self.tools.reader()) for i in range(self.body.n or 1)]
        stats = []
        async with replies:
            for stream in streams:
                yield self._chunk(stream.choice({"role": "assistant", "content": ""}))
            async for part in replies:
                logprobs = chat_logprobs(self.service, part.tokens) if self.body.logprobs else None
                for choice in streams[part.index].choices(part, logprobs):
                    yield self._chunk(choice)
                if part.stats is not None:
                    stats.append(part.stats)
        if self.body.wants_usage():
            yield self._chunk(None) | {"usage": usage([stats])}

    def _chunk(self, choice: dict[str, Any] | None) -> dict[str, Any]:
        found = {**self.head, "object": "chat.completion.chunk"}
        found["choices"] = [] if choice is None else [choice]
        return found | ({"usage": None} if self.body.wants_usage() else {})


class ChoiceStream:
    """The chunks of one of the replies."""

    def __init__(self, index: int, reader: CallReader | None):
        self.index, self.reader = index, reader
        self.calls = 0

    def choices(
        self, part: Chunk, logprobs: list[dict[str, Any]] | None
    ) -> Iterable[dict[str, Any]]:
        """What a part of the reply comes to: one delta or several."""
        pieces: list[str | ToolCall] = [part.text] if part.text else []
        if self.reader is not None:
            pieces = self.reader.add(part.text)
            if part.finish_reason:
                pieces += self.reader.finish(part.stopped_by)
        deltas = [delta for piece in pieces for delta in self._deltas(piece)]
        if logprobs and not deltas:
            deltas.append({"content": ""})
        for delta in deltas:
            yield self.choice(delta, logprobs)
            logprobs = None
        if part.finish_reason:
            yield self.choice({}, reason="tool_calls" if self.calls else part.finish_reason)

    def choice(
        self,
        delta: dict[str, Any],
        logprobs: list[dict[str, Any]] | None = None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        return {
            "index": self.index,
            "delta": delta,
            "logprobs": {"content": logprobs, "refusal": None} if logprobs else None,
            "finish_reason": reason,
        }

    def _deltas(self, piece: str | ToolCall) -> list[dict[str, Any]]:
        if isinstance(piece, str):
            return [{"content": piece}]
        index, self.calls = self.calls, self.calls + 1
        begun = _call(piece)
        begun["function"]["arguments"] = ""
        arguments = {"index": index, "function": {"arguments": piece.arguments}}
        return [{"tool_calls": [{"index": index, **begun}]}, {"tool_calls": [arguments]}]


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def router(service: Service) -> APIRouter:
    """The route of the chat API."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatCompletion, request: Request) -> Response:
        """Answer a conversation."""
        chat = ChatRun(service, body)
        replies = service.start(await chat.asks(), "messages")
        if body.stream:
            return events(chat.chunks(replies))
        return JSONResponse(chat.completion(await wholes(request, replies)))

    return routes
