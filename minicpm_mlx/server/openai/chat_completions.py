"""OpenAI's /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from ...lm.tools.calls import CallReader, Part, Thought, ToolCall
from ...text.thinking import ThinkingForm
from ..http.api_error import ApiError, unsupported
from ..http.schema import TEXT_ONLY_OUTPUT, Ignored, refused
from ..http.streaming import new_id
from ..parameters import LogprobFields, run_in_thread
from ..reply_stream import Chunk, FullReply, GenerationRequest, ReplyStream, full_replies
from ..service import Effort, Service, Thinking, by_effort
from ..tool_calling import NamedChoice, RequestTools, Tool
from .common import chat_logprobs, stream_events, usage
from .messages import AssistantMessage, Message, template_messages
from .options import OpenAIFields

JsonDict = dict[str, Any]


class ChatCompletionBody(LogprobFields, OpenAIFields):
    """A conversation to continue."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """None: as far as the context goes."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """The older name of max_completion_tokens."""
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    continue_final_message: bool | None = None
    """vLLM's and SGLang's: the last message is the assistant's, and the reply continues it."""
    add_generation_prompt: bool | None = None
    """vLLM's: the opposite."""

    store: Ignored[bool] = None
    service_tier: Ignored[Literal["auto", "default", "flex", "scale", "priority", "fast"]] = None
    safety_identifier: Ignored[str] = None
    prompt_cache_key: Ignored[str] = None
    prompt_cache_options: Ignored[JsonDict] = None
    prompt_cache_retention: Ignored[str] = None

    audio: Annotated[JsonDict | None, refused(TEXT_ONLY_OUTPUT)] = None
    modalities: Annotated[
        list[Literal["text", "audio"]] | None, refused(TEXT_ONLY_OUTPUT, ([], ["text"]))
    ] = None
    function_call: Annotated[str | JsonDict | None, refused("use tool_choice")] = None
    functions: Annotated[list[JsonDict] | None, refused("use tools")] = None
    moderation: Annotated[JsonDict | None, refused("this server has no moderation")] = None
    prediction: Annotated[JsonDict | None, refused("leave it out")] = None
    reasoning_effort: Effort | None = None
    """None leaves it to the chat template; "none" is no thought, the others bound its tokens."""
    chat_template_kwargs: JsonDict | None = None
    """vLLM's and SGLang's: `enable_thinking`, and other variables of the chat template."""
    thinking_token_budget: Annotated[int, Field(ge=0)] | None = None
    """vLLM's: the longest thought."""
    separate_reasoning: bool | None = None
    """SGLang's: false leaves the thought in the content, between its marks."""
    stream_reasoning: Ignored[bool] = None
    verbosity: Annotated[
        Literal["low", "medium", "high"] | None,
        refused("ask for the length of the reply in the messages", ("medium",)),
    ] = None
    web_search_options: Annotated[
        JsonDict | None, refused("this server does not search the web")
    ] = None

    def check(self) -> None:
        super().check()
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            raise ApiError(
                "max_tokens and max_completion_tokens differ; give one",
                field="max_completion_tokens",
            )
        last = self.messages[-1]
        if self.add_generation_prompt not in (None, not self.continue_final_message):
            raise unsupported("add_generation_prompt", "it must not equal continue_final_message")
        if self.continue_final_message and (
            not isinstance(last, AssistantMessage) or last.tool_calls
        ):
            raise ApiError(
                "continue_final_message goes with a last message of the assistant, without calls",
                field="continue_final_message",
            )

    def thinking(self) -> Thinking:
        effort = by_effort(self.reasoning_effort, "reasoning_effort")
        tokens = self.thinking_token_budget
        return replace(
            effort,
            tokens=effort.tokens if tokens is None else tokens,
            variables=self.chat_template_kwargs or {},
        )

    def request_tools(self, service: Service) -> RequestTools:
        choice = self.tool_choice or "auto"
        return RequestTools(
            service,
            [tool.function for tool in self.tools or ()],
            choice.function.name if isinstance(choice, NamedChoice) else choice,
            parallel=self.parallel_tool_calls is not False,
        )


class ChatRun:
    """One request from its body to its response."""

    def __init__(self, service: Service, body: ChatCompletionBody):
        self.service, self.body = service, body
        self.tools = body.request_tools(service)
        self.prompt_tokens = 0
        self.marks: ThinkingForm | None = None
        """Those that a thought has in the content; None: it is apart."""
        self.head = {
            "id": new_id("chatcmpl-"),
            "created": int(time.time()),
            "model": service.find_model(body.model).name,
        }

    async def generations(self) -> list[GenerationRequest]:
        body, tools = self.body, self.tools
        messages, continues = template_messages(body.messages), bool(body.continue_final_message)
        thinking = body.thinking()
        prompt = await run_in_thread(
            lambda: self.service.chat_prompt(
                messages, tools.for_template, continues=continues, thinking=thinking
            ),
            "messages",
        )
        self.prompt_tokens = len(prompt.ids)
        if body.separate_reasoning is False:
            self.marks = prompt.thinking
        return body.generations(
            self.service,
            [prompt],
            await tools.grammar(body.guides()),
            max_tokens=body.max_completion_tokens or body.max_tokens,
            stop=[*body.stops(), *prompt.stops, *tools.stops],
            think_tokens=thinking.tokens,
            top_logprobs=body.wanted_logprobs(),
            continues=continues,
            keep_special=tools.keep_special or body.skip_special_tokens is False,
            token_marks=tools.token_marks,
        )

    def reader(self) -> CallReader:
        return self.tools.reader(self.marks, streams=True)

    def response(self, replies: Sequence[FullReply]) -> dict[str, Any]:
        return {
            **self.head,
            "object": "chat.completion",
            "choices": [self._choice(reply) for reply in replies],
            "usage": usage([[reply.stats for reply in replies]]),
        }

    def _choice(self, reply: FullReply) -> dict[str, Any]:
        reader = self.reader()
        pieces = reader.read(reply)
        calls = [piece for piece in pieces if isinstance(piece, ToolCall)]
        text = "".join(piece for piece in pieces if isinstance(piece, str))
        thinking = "".join(piece.text for piece in pieces if isinstance(piece, Thought))
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if thinking:
            message["reasoning_content"] = thinking
        if written := [*calls, *filter(None, [reader.open])]:
            message["content"] = text if text.strip() else None
            message["tool_calls"] = [_call(call) for call in written]
        logprobs = None
        if self.body.logprobs:
            logprobs = {
                "content": chat_logprobs(self.service, reply.answer_tokens),
                "refusal": None,
            }
        return {
            "index": reply.index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": "tool_calls" if calls else reply.finish_reason,
        }

    async def chunks(self, stream: ReplyStream) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a streamed response."""
        choices = [ChoiceStream(i, self.reader()) for i in range(self.body.n or 1)]
        counts = self.body.stream_usage([self.prompt_tokens])
        head = {**self.head, "object": "chat.completion.chunk"}
        async with stream:
            for choice in choices:
                start = choice.choice({"role": "assistant", "content": ""})
                yield head | {"choices": [start]} | counts.fields(choice.index)
            async for chunk in stream:
                counts.add(chunk)
                logprobs = (
                    chat_logprobs(self.service, chunk.answer_tokens) if self.body.logprobs else None
                )
                for delta in choices[chunk.index].add(chunk, logprobs):
                    yield head | {"choices": [delta]} | counts.fields(chunk.index)
        for fields in counts.last():
            yield head | fields


class ChoiceStream:
    """Turns the chunks of one reply into choices."""

    def __init__(self, index: int, reader: CallReader):
        self.index, self.reader = index, reader
        self.calls = 0
        """Those that have begun."""
        self.has_called = False

    def add(self, chunk: Chunk, logprobs: list[dict[str, Any]] | None) -> Iterable[dict[str, Any]]:
        deltas = [delta for piece in self.reader.read(chunk) for delta in self._deltas(piece)]
        if logprobs and not deltas:
            deltas.append({"content": ""})
        for delta in deltas:
            yield self.choice(delta, logprobs)
            logprobs = None
        if chunk.finish_reason:
            yield self.choice({}, reason="tool_calls" if self.has_called else chunk.finish_reason)

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

    def _deltas(self, piece: Part) -> list[dict[str, Any]]:
        if isinstance(piece, str):
            return [{"content": piece}]
        if isinstance(piece, Thought):
            return [{"reasoning_content": piece.text}]
        if isinstance(piece, ToolCall):
            self.has_called = True
            return []
        self.calls += piece.begins
        position = {"index": self.calls - 1}
        start = position | _call(ToolCall(piece.name, "", piece.id))
        delta = position | {"function": {"arguments": piece.arguments}}
        return [{"tool_calls": [one]} for one in ([start, delta] if piece.begins else [delta])]


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatCompletionBody, request: Request) -> Response:
        """Continue a conversation."""
        chat = ChatRun(service, body)
        stream = service.start(await chat.generations(), "messages")
        if body.stream:
            return stream_events(chat.chunks(stream))
        return JSONResponse(chat.response(await full_replies(request, stream)))

    return routes
