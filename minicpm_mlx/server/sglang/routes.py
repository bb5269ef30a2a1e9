"""SGLang's own API: /generate, and the routes that its frontend needs."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from ... import __version__
from ...engine import TokenLogprob
from ...lm.outputs import Stats
from ...text.chat_prompt import ChatPrompt
from ..http.api_error import ApiError
from ..http.streaming import new_id, sse, stream_response
from ..reply_stream import Chunk, GenerationRequest, ReplyStream, full_replies
from ..service import Service
from .schema import SGLangGenerateBody, SGLangPrompt


def error_body(error: ApiError) -> dict[str, Any]:
    return {"error": {"message": error.message}}


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.put("/generate")
    @routes.post("/generate")
    async def generate(body: SGLangGenerateBody, request: Request) -> Response:
        """Continue texts. The response is a list if there are several texts or replies."""
        prompts = await body.prompts(service)
        replies = [CumulativeReply(service, prompt) for prompt in prompts]
        single = body.is_single
        stream = service.start([prompt.generation for prompt in prompts], body.prompt_field)
        if body.stream:
            events = _events(stream, replies, single)
            return stream_response(events, encode=sse, error_body=error_body, last=sse("[DONE]"))
        responses = [replies[full.index].add(full) for full in await full_replies(request, stream)]
        return JSONResponse(responses[0] if single else responses)

    @routes.get("/get_model_info")
    async def model_info() -> dict[str, Any]:
        """Show the model."""
        name = service.models[0].name
        return {"model_path": name, "tokenizer_path": name, "is_generation": True}

    @routes.get("/get_server_info")
    @routes.get("/server_info")
    async def server_info() -> dict[str, Any]:
        """Show the model and the load of the server."""
        return {
            **await model_info(),
            "served_model_name": service.models[0].name,
            "context_length": service.context_length,
            "version": __version__,
            "internal_states": [service.state()],
        }

    @routes.post("/flush_cache")
    @routes.get("/flush_cache")
    async def flush_cache() -> Response:
        """Empty the prefix cache."""
        await service.flush()
        return PlainTextResponse("Cache flushed.\n")

    @routes.get("/health_generate")
    async def health_generate(request: Request) -> Response:
        """Check that the model generates, with one token."""
        bos = service.lm.tokenizer.bos_id
        one_token = GenerationRequest(
            prompt=ChatPrompt(ids=[0 if bos is None else bos]),
            served=service.find_model(None),
            sampling=service.sampling(temperature=0.0),
            max_tokens=1,
        )
        await full_replies(request, service.start([one_token]))
        return Response(status_code=200)

    return routes


async def _events(
    stream: ReplyStream, replies: Sequence[CumulativeReply], single: bool
) -> AsyncGenerator[dict[str, Any], None]:
    async with stream:
        async for chunk in stream:
            event = replies[chunk.index].add(chunk)
            yield event if single else {**event, "index": chunk.index}


@dataclass
class CumulativeReply:
    """One reply; each event of a stream repeats all of it so far."""

    service: Service
    prompt: SGLangPrompt
    start: float = field(default_factory=time.perf_counter)
    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)
    prompt_tokens: list[TokenLogprob] = field(default_factory=list)
    """Tokens of the prompt with log probabilities."""

    def __post_init__(self) -> None:
        self.id = self.prompt.id or new_id("")

    def add(self, chunk: Chunk) -> dict[str, Any]:
        """The event for the next chunk; for a full reply, the response."""
        self.text += chunk.text
        self.tokens.extend(chunk.tokens)
        self.prompt_tokens.extend(chunk.prompt)
        return self._event(self._finish(chunk) if chunk.finish_reason else None, chunk.stats)

    def _finish(self, chunk: Chunk) -> dict[str, Any]:
        if chunk.finish_reason == "length":
            return {"type": "length", "length": len(self.tokens)}
        return {"type": "stop", "matched": chunk.stopped_by or self._only_eos()}

    def _only_eos(self) -> int | None:
        """The token that ends a reply; None if there are several."""
        generation = self.prompt.generation
        own = () if generation.ignore_eos else self.service.lm.tokenizer.eos_ids
        eos = {*own, *generation.stop_tokens}
        return eos.pop() if len(eos) == 1 else None

    def _event(self, finish: dict[str, Any] | None, stats: Stats | None) -> dict[str, Any]:
        meta: dict[str, Any] = {
            "id": self.id,
            "finish_reason": finish,
            "prompt_tokens": len(self.prompt.generation.prompt.ids),
            **self._logprobs(),
            "completion_tokens": len(self.tokens),
            "cached_tokens": stats.cached_tokens if stats else None,  # known only at the end
        }
        if finish is not None:
            meta["e2e_latency"] = time.perf_counter() - self.start
        return {"text": self.text, "meta_info": meta}

    def _logprobs(self) -> dict[str, Any]:
        top = self.prompt.generation.top_logprobs
        fields: dict[str, Any] = {}
        for name, tokens in (("input", self.prompt_tokens), ("output", self.tokens)):
            if top is not None:
                fields[f"{name}_token_logprobs"] = [
                    self._entry(scored.logprob, scored.token) for scored in tokens
                ]
            if top:
                fields[f"{name}_top_logprobs"] = [self._top(scored) for scored in tokens]
        return fields

    def _entry(self, logprob: float | None, token: int) -> list[Any]:
        return [logprob, token, self.service.token_text(token) if self.prompt.with_text else None]

    def _top(self, scored: TokenLogprob) -> list[list[Any]] | None:
        return [self._entry(logprob, token) for token, logprob in scored.top] or None
