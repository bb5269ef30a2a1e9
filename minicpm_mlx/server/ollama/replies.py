"""Ollama's /api/generate and /api/chat: a stream of JSON lines, or one object."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from ...engine import TokenLogprob
from ...lm.tools.calls import CallReader, Part, Thought, ToolCall
from ...text.chat_prompt import ChatPrompt
from ..http.api_error import ApiError, unsupported
from ..http.streaming import ndjson, stream_response
from ..openai.common import chat_logprobs
from ..reply_stream import Chunk, GenerationRequest, full_replies
from ..service import Service
from ..tool_calling import RequestTools
from .models import timestamp
from .schema import ChatBody, CommonRequest, GenerateBody, OllamaOptions


def error_body(error: ApiError) -> dict[str, Any]:
    return {"error": error.message}


@dataclass(kw_only=True)
class OllamaReply:
    """Writes one reply."""

    service: Service
    model: str
    """The name that the client sent."""
    chat: bool
    """Text is in a message, not in `response`."""
    logprobs: bool
    start: float = field(default_factory=time.perf_counter)
    context: list[int] | None = None
    """The prompt, which grows to the response's `context`; None leaves that out."""
    reader: CallReader = field(default_factory=lambda: CallReader(None, {}))
    calls: int = 0
    """Calls so far."""

    def line(
        self,
        pieces: Sequence[Part],
        tokens: Sequence[TokenLogprob] = (),
        done: bool = False,
    ) -> dict[str, Any]:
        """A line of the stream; `end` has the further fields of the last one."""
        text = "".join(piece for piece in pieces if isinstance(piece, str))
        thinking = "".join(piece.text for piece in pieces if isinstance(piece, Thought))
        calls = [piece for piece in pieces if isinstance(piece, ToolCall)]
        thought = {"thinking": thinking} if thinking else {}
        message: dict[str, Any] = {"role": "assistant", "content": text, **thought}
        if calls:
            first, self.calls = self.calls, self.calls + len(calls)
            message["tool_calls"] = [_call(call, first + i) for i, call in enumerate(calls)]
        line = {
            "model": self.model,
            "created_at": timestamp(time.time()),
            **({"message": message} if self.chat else {"response": text, **thought}),
            "done": done,
        }
        if self.logprobs and tokens:
            line["logprobs"] = chat_logprobs(self.service, tokens)
        return line

    def end(self, chunk: Chunk) -> dict[str, Any]:
        """The further fields of the last line."""
        stats = chunk.stats
        assert stats is not None
        return {
            "done_reason": chunk.finish_reason,
            **({} if self.context is None else {"context": self.context}),
            "total_duration": nanoseconds(time.perf_counter() - self.start),
            "load_duration": 0,
            "prompt_eval_count": stats.prompt_tokens,
            "prompt_eval_duration": nanoseconds(stats.ttft),
            "eval_count": stats.completion_tokens,
            "eval_duration": nanoseconds(stats.seconds - stats.ttft),
        }

    def read(self, chunk: Chunk) -> list[Part]:
        if self.context is not None:
            self.context.extend(scored.token for scored in chunk.tokens)
        return self.reader.read(chunk)

    def lines(self, chunk: Chunk) -> list[dict[str, Any]]:
        """The lines of a stream for its next chunk."""
        pieces, lines = self.read(chunk), []
        if pieces or (self.logprobs and chunk.tokens):
            lines.append(self.line(pieces, chunk.tokens))
        if chunk.finish_reason is not None:
            lines.append(self.line([], done=True) | self.end(chunk))
        return lines


def add_routes(routes: APIRouter, service: Service) -> None:
    @routes.post("/generate")
    async def generate(body: GenerateBody, request: Request) -> Response:
        """Continue a text or reply to it."""
        reply = _reply(service, body, chat=False)
        if not body.prompt:
            return _loaded(reply)
        prompt = _generate_prompt(service, body)
        reply.context = None if body.raw else list(prompt.ids)
        generation = await _generation(service, body, prompt)
        generation = replace(generation, continues=bool(body.raw))
        return await _respond(request, reply, generation, body.stream is not False)

    @routes.post("/chat")
    async def chat(body: ChatBody, request: Request) -> Response:
        """Continue a conversation."""
        reply = _reply(service, body, chat=True)
        if not body.messages:
            return _loaded(reply)
        tools = RequestTools(service, [tool.function for tool in body.tools or []])
        messages = [message.for_template() for message in body.messages]
        continues = body.continues_reply
        prompt = service.chat_prompt(
            messages, tools.for_template, continues=continues, thinking=body.thinking()
        )
        generation = await _generation(service, body, prompt, tools)
        generation = replace(generation, continues=continues)
        reply.reader = tools.reader()
        return await _respond(request, reply, generation, body.stream is not False)


def _reply(service: Service, body: CommonRequest, chat: bool) -> OllamaReply:
    service.find_model(body.model)  # ApiError for an unknown name, even without a prompt
    return OllamaReply(service=service, model=body.model, chat=chat, logprobs=bool(body.logprobs))


def _loaded(reply: OllamaReply) -> Response:
    """The response to a request without a prompt: the model is loaded."""
    return JSONResponse(reply.line([], done=True) | {"done_reason": "load"})


async def _generation(
    service: Service,
    body: CommonRequest,
    prompt: ChatPrompt,
    tools: RequestTools | None = None,
) -> GenerationRequest:
    options = body.options or OllamaOptions()
    tools = tools or RequestTools(service, [])
    return GenerationRequest(
        prompt=prompt,
        served=service.find_model(body.model),
        sampling=options.sampling(service, prompt),
        think_tokens=body.thinking().tokens,
        max_tokens=options.max_tokens(service, prompt.ids),
        stop=[*(options.stop or []), *prompt.stops],
        keep_special=tools.keep_special,
        token_marks=tools.token_marks,
        top_logprobs=body.wanted_logprobs(),
        grammar=await tools.grammar({"format": body.guide()}),
    )


async def _respond(
    request: Request, reply: OllamaReply, generation: GenerationRequest, stream: bool
) -> Response:
    replies = reply.service.start([generation])

    async def lines() -> AsyncGenerator[dict[str, Any], None]:
        async with replies:
            async for chunk in replies:
                for line in reply.lines(chunk):
                    yield line

    if stream:
        return stream_response(
            lines(), encode=ndjson, error_body=error_body, media_type="application/x-ndjson"
        )
    [full] = await full_replies(request, replies)
    return JSONResponse(reply.line(reply.read(full), full.tokens, done=True) | reply.end(full))


def _call(call: ToolCall, number: int) -> dict[str, Any]:
    function = {"index": number, "name": call.name, "arguments": json.loads(call.arguments)}
    return {"id": call.id, "function": function}


def _generate_prompt(service: Service, body: GenerateBody) -> ChatPrompt:
    """The prompt of /api/generate."""
    prompt, thinking = body.prompt or "", body.thinking()
    is_text = body.raw or service.lm.tokenizer.template is None
    if thinking.wanted and (is_text or body.context):
        raise unsupported("think", "it goes with a prompt that the chat template formats")
    if body.raw:
        return ChatPrompt(ids=service.encode(prompt))
    if service.lm.tokenizer.template is None:  # Ollama's default template is the bare prompt
        if body.system:
            raise unsupported("system", "this model has no chat template")
        context = service.check_ids(body.context or [], "context")
        ids = context + service.lm.tokenizer.encode(prompt, add_bos=not context)
        return ChatPrompt(ids=ids)
    if body.context:
        return _continue_context(service, service.check_ids(body.context, "context"), prompt)
    system = [{"role": "system", "content": body.system}] if body.system else []
    question = {"role": "user", "content": prompt}
    return service.chat_prompt([*system, question], field="prompt", thinking=thinking)


def _continue_context(service: Service, context: list[int], prompt: str) -> ChatPrompt:
    """The ids of `context`, which ends in a reply, with the user's next message.

    Renders a short conversation to find the text that the template puts after a reply.
    """
    tokenizer = service.lm.tokenizer
    question, reply = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
    shape = service.chat_prompt([question])
    head = tokenizer.chat_text([question]) + "!"
    whole = tokenizer.render([question, reply, {"role": "user", "content": prompt}])
    if not whole.text.startswith(head):
        raise unsupported("context", "the model's template cannot be continued; use /api/chat")
    ids = context + tokenizer.encode(whole.since(len(head)), add_bos=False)
    return replace(shape, ids=ids)


def nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
