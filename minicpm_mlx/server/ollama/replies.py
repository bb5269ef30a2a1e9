"""Ollama's /api/generate and /api/chat: lines of JSON as they come, or one object."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from ...engine.logprobs import TokenLogprob
from ...lm.outputs import Stats
from ..http.api_error import unsupported
from ..http.streaming import ndjson, streamed
from ..openai.common import chat_logprobs
from ..parameters import grammar_of
from ..reply_stream import wholes
from ..tool_calling import CallReader, Toolbox, ToolCall
from .models import moment
from .schema import (
    ChatBody,
    CommonRequest,
    GenerateBody,
    OllamaOptions,
    templated,
)

if TYPE_CHECKING:
    from ..service import (
        Chunk,
        FullReply,
        GenerationRequest,
        Service,
    )


@dataclass(kw_only=True)
class OllamaReply:
    """How one reply is written."""

    service: Service
    model: str
    """As the client named it."""
    chat: bool
    """In a message, not as bare text."""
    logprobs: bool
    begun: float
    """When it was asked for; see time.perf_counter."""
    context: list[int] | None = None
    """The prompt, to grow to the answer's `context`; None leaves that out."""
    reader: CallReader | None = None
    """Finds the calls of functions."""
    calls: int = 0
    """Of functions, so far."""

    def line(
        self,
        said: Sequence[str | ToolCall],
        tokens: Sequence[TokenLogprob] = (),
        done: bool = False,
    ) -> dict[str, Any]:
        """A line, but for what the last one says besides."""
        text = "".join(piece for piece in said if isinstance(piece, str))
        calls = [piece for piece in said if isinstance(piece, ToolCall)]
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            first, self.calls = self.calls, self.calls + len(calls)
            message["tool_calls"] = [_call(call, first + i) for i, call in enumerate(calls)]
        found = {
            "model": self.model,
            "created_at": moment(time.time()),
            **({"message": message} if self.chat else {"response": text}),
            "done": done,
        }
        if self.logprobs and tokens:
            found["logprobs"] = chat_logprobs(self.service, tokens)
        return found

    def end(self, reason: str, stats: Stats) -> dict[str, Any]:
        """What the last line says besides."""
        return {
            "done_reason": reason,
            **({} if self.context is None else {"context": self.context}),
            "total_duration": nanoseconds(time.perf_counter() - self.begun),
            "load_duration": 0,
            "prompt_eval_count": stats.prompt_tokens,
            "prompt_eval_duration": nanoseconds(stats.ttft),
            "eval_count": stats.completion_tokens,
            "eval_duration": nanoseconds(stats.seconds - stats.ttft),
        }

    def read(self, part: Chunk | FullReply) -> list[str | ToolCall]:
        """What is certain of the reply with its next part."""
        if self.context is not None:
            self.context.extend(scored.token for scored in part.tokens)
        if self.reader is None:
            return [part.text] if part.text else []
        found = self.reader.add(part.text)
        if part.finish_reason is not None:
            found += self.reader.finish(part.stopped_by)
        return found

    def lines(self, part: Chunk) -> list[dict[str, Any]]:
        """Those of a stream for its next part."""
        said = self.read(part)
        found = [self.line(said, part.tokens)] if said or (self.logprobs and part.tokens) else []
        if part.finish_reason is not None:
            assert part.stats is not None
            found.append(self.line([], done=True) | self.end(part.finish_reason, part.stats))
        return found


def add(routes: APIRouter, service: Service) -> None:
    """Add both routes."""

    @routes.post("/generate")
    async def generate(body: GenerateBody, request: Request) -> Response:
        """Continue or answer a text."""
        body.check()
        reply = _reply(service, body, chat=False)
        if not body.prompt:
            return _loaded(reply)
        prompt, stops = prompt_of(service, body)
        reply.context = None if body.raw else list(prompt)
        ask = await _ask(service, body, prompt, stops)
        return await _answer(request, reply, ask, body.stream is not False)

    @routes.post("/chat")
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        body.check()
        reply = _reply(service, body, chat=True)
        if not body.messages:
            return _loaded(reply)
        toolbox = Toolbox(service, [tool.function for tool in body.tools or []])
        reply.reader = toolbox.reader()
        messages = templated(body.messages)
        prompt, stops = service.conversation(messages, toolbox.for_template)
        ask = await _ask(service, body, prompt, stops, toolbox.keep_special)
        return await _answer(request, reply, ask, body.stream is not False)


def _reply(service: Service, body: CommonRequest, chat: bool) -> OllamaReply:
    service.served(body.model)  # refuses a name that there is not
    return OllamaReply(
        service=service,
        model=body.model,
        chat=chat,
        logprobs=bool(body.logprobs),
        begun=time.perf_counter(),
    )


def _loaded(reply: OllamaReply) -> Response:
    """The answer to a request for nothing: the model is there."""
    return JSONResponse(reply.line([], done=True) | {"done_reason": "load"})


async def _ask(
    service: Service,
    body: CommonRequest,
    prompt: list[int],
    stops: list[str],
    keep_special: bool = False,
) -> GenerationRequest:
    from ..service import GenerationRequest

    options = body.options or OllamaOptions()
    return GenerationRequest(
        prompt=prompt,
        served=service.served(body.model),
        sampling=options.sampling(service),
        max_tokens=options.max_tokens(service, prompt),
        stop=[*(options.stop or []), *stops],
        keep_special=keep_special,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=await grammar_of(service, body.guide(), "format"),
    )


async def _answer(
    request: Request, reply: OllamaReply, ask: GenerationRequest, stream: bool
) -> Response:
    replies = reply.service.start([ask])

    async def chunks() -> AsyncGenerator[bytes, None]:
        async with replies:
            async for part in replies:
                for line in reply.lines(part):
                    yield ndjson(line)

    if stream:
        return streamed(
            chunks(),
            trouble=lambda refusal: ndjson({"error": refusal.message}),
            media_type="application/x-ndjson",
        )
    (whole,) = await wholes(request, replies)
    line = reply.line(reply.read(whole), whole.tokens, done=True)
    return JSONResponse(line | reply.end(whole.finish_reason, whole.stats))


def _call(call: ToolCall, number: int) -> dict[str, Any]:
    function = {"index": number, "name": call.name, "arguments": json.loads(call.arguments)}
    return {"id": call.id, "function": function}


def prompt_of(service: Service, body: GenerateBody) -> tuple[list[int], list[str]]:
    """Prompt ids of /api/generate, and the template's own stop strings."""
    prompt = body.prompt or ""
    if body.raw:
        return service.encode(prompt), []
    if service.lm.tokenizer.template is None:  # as Ollama's own default, which is the bare prompt
        if body.system:
            raise unsupported("system", "this model has no chat template to say it in")
        before = service.check_ids(body.context or [], "context")
        return before + service.lm.tokenizer.encode(prompt, add_bos=not before), []
    if body.context:
        return _continued(service, service.check_ids(body.context, "context"), prompt)
    system = [{"role": "system", "content": body.system}] if body.system else []
    return service.conversation([*system, {"role": "user", "content": prompt}])


def _continued(service: Service, before: list[int], prompt: str) -> tuple[list[int], list[str]]:
    """The ids `before`, which end in a reply, with the user's next turn.

    The turn is what the template puts behind a reply; it is seen by rendering one.
    """
    tokenizer = service.lm.tokenizer
    question, reply = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
    _, stops = service.conversation([question])
    known = tokenizer.chat_text([question]) + "!"
    text = tokenizer.chat_text([question, reply, {"role": "user", "content": prompt}])
    if not text.startswith(known):
        raise unsupported("context", "the model's template cannot be continued; use /api/chat")
    return before + tokenizer.encode(text.removeprefix(known), add_bos=False), stops


def nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
