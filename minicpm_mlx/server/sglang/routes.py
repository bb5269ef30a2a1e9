"""SGLang's own API: /generate, and what its frontend asks of a server besides."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from ... import __version__
from ...engine.logprobs import TokenLogprob
from ...lm.outputs import Stats
from ..http.api_error import ApiError
from ..http.streaming import identifier, sse, streamed
from ..reply_stream import wholes
from .schema import SGLangGenerateBody, SGLangPrompt

if TYPE_CHECKING:
    from ..service import (
        Chunk,
        FullReply,
        GenerationRequest,
        Replies,
        Service,
    )


def refused(refusal: ApiError) -> dict[str, Any]:
    """The body of an answer that is none."""
    return {"error": {"message": refusal.message}}


def router(service: Service) -> APIRouter:
    """The routes of SGLang."""
    routes = APIRouter()

    @routes.put("/generate")
    @routes.post("/generate")
    async def generate(body: SGLangGenerateBody, request: Request) -> Response:
        """Continue texts; answers are a list where texts are, or where each has several."""
        prompts = await body.prompts(service)
        answers = [CumulativeReply(service, prompt) for prompt in prompts]
        single = body.is_single
        replies = service.start([prompt.ask for prompt in prompts], body.prompt_field)
        if body.stream:
            return streamed(
                _events(replies, answers, single), trouble=lambda refusal: sse(refused(refusal))
            )
        found = [
            answer.whole(whole)
            for answer, whole in zip(answers, await wholes(request, replies), strict=True)
        ]
        return JSONResponse(found[0] if single else found)

    @routes.get("/get_model_info")
    async def model_info() -> dict[str, Any]:
        """What is served."""
        name = service.names[0].name
        return {"model_path": name, "tokenizer_path": name, "is_generation": True}

    @routes.get("/get_server_info")
    @routes.get("/server_info")
    async def server_info() -> dict[str, Any]:
        """What is served, and how busy the server is."""
        return {
            **await model_info(),
            "served_model_name": service.names[0].name,
            "context_length": service.context_length,
            "version": __version__,
            "internal_states": [service.state()],
        }

    @routes.post("/flush_cache")
    @routes.get("/flush_cache")
    async def flush_cache() -> Response:
        """Forget what was read."""
        await service.flush()
        return PlainTextResponse("Cache flushed.\n")

    @routes.get("/health_generate")
    async def health_generate(request: Request) -> Response:
        """Whether the model makes tokens: one is made."""
        await wholes(request, service.start([_one_token(service)]))
        return Response(status_code=200)

    return routes


def _one_token(service: Service) -> GenerationRequest:
    from ..service import GenerationRequest

    bos = service.lm.tokenizer.bos_id
    return GenerationRequest(
        prompt=[0 if bos is None else bos],
        served=service.served(None),
        sampling=service.sampling(temperature=0.0),
        max_tokens=1,
    )


async def _events(
    replies: Replies, answers: Sequence[CumulativeReply], single: bool
) -> AsyncGenerator[bytes, None]:
    async with replies:
        async for part in replies:
            found = answers[part.index].add(part)
            yield sse(found if single else {**found, "index": part.index})
    yield sse("[DONE]")


@dataclass
class CumulativeReply:
    """One reply: all of it that has come, as each event of a stream says again."""

    service: Service
    prompt: SGLangPrompt
    begun: float = field(default_factory=time.perf_counter)
    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)
    before: list[TokenLogprob] = field(default_factory=list)
    """Tokens of the prompt that are scored."""

    def __post_init__(self) -> None:
        self.id = self.prompt.id or identifier("")

    def add(self, part: Chunk) -> dict[str, Any]:
        """The event for the next part."""
        self.text += part.text
        self.tokens.extend(part.tokens)
        self.before.extend(part.prompt)
        return self._said(self._finish(part) if part.finish_reason else None, part.stats)

    def whole(self, whole: FullReply) -> dict[str, Any]:
        """The answer that is not streamed."""
        self.text, self.tokens, self.before = whole.text, list(whole.tokens), list(whole.prompt)
        return self._said(self._finish(whole), whole.stats)

    def _finish(self, part: Chunk | FullReply) -> dict[str, Any]:
        if part.finish_reason == "length":
            return {"type": "length", "length": len(self.tokens)}
        return {"type": "stop", "matched": part.stopped_by or self._only_end()}

    def _only_end(self) -> int | None:
        """The token that ends a reply; None where it may be one of several."""
        ask = self.prompt.ask
        own = () if ask.ignore_eos else self.service.lm.tokenizer.eos_ids
        ends = {*own, *ask.stop_tokens}
        return ends.pop() if len(ends) == 1 else None

    def _said(self, finish: dict[str, Any] | None, stats: Stats | None) -> dict[str, Any]:
        meta: dict[str, Any] = {
            "id": self.id,
            "finish_reason": finish,
            "prompt_tokens": len(self.prompt.ask.prompt),
            **self._logprobs(),
            "completion_tokens": len(self.tokens),
            "cached_tokens": stats.cached_tokens if stats else None,  # not known before the end
        }
        if finish is not None:
            meta["e2e_latency"] = time.perf_counter() - self.begun
        return {"text": self.text, "meta_info": meta}

    def _logprobs(self) -> dict[str, Any]:
        wanted = self.prompt.ask.top_logprobs
        if wanted is None:
            return {}
        found: dict[str, Any] = {
            "input_token_logprobs": [self._entry(one.logprob, one.token) for one in self.before],
            "output_token_logprobs": [self._entry(one.logprob, one.token) for one in self.tokens],
        }
        if wanted:
            found["input_top_logprobs"] = [self._top(one) for one in self.before]
            found["output_top_logprobs"] = [self._top(one) for one in self.tokens]
        return found

    def _entry(self, logprob: float | None, token: int) -> list[Any]:
        text = self.service.text_of(token) if self.prompt.with_text else None
        return [logprob, token, text]

    def _top(self, one: TokenLogprob) -> list[list[Any]] | None:
        return [self._entry(logprob, token) for token, logprob in one.top] or None
