"""OpenAI's /v1/completions: text, or token ids, to continue."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from ..http.api_error import ApiError
from ..http.streaming import identifier
from ..parameters import grammar_of_one, refuse_all
from ..reply_stream import wholes
from .common import CompletionLogprobs, events, usage
from .options import OpenAIOptions
from .prompts import Prompt, Prompts, read_prompts

if TYPE_CHECKING:
    from ..service import (
        Chunk,
        FullReply,
        GenerationRequest,
        Replies,
        Service,
    )


class CompletionBody(OpenAIOptions):
    """Texts to continue."""

    prompt: Prompts
    """Text, token ids, or a list of either."""
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    echo: bool | None = None
    """The prompt comes before its reply, with its log probabilities where those are asked for."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None
    """Whether a text begins with the model's bos; vLLM's."""

    def check(self) -> None:
        """Refuse what contradicts itself or cannot be done."""
        self.check_stream()
        refuse_all(
            {
                "suffix": (self.suffix, "this model cannot fill in"),
                "best_of": (
                    self.best_of not in (None, self.n or 1),
                    "it must be equal to n; ask for more with n, and choose among them",
                ),
            }
        )
        if self.logprobs is not None and self.stop_token_ids:
            raise ApiError(
                400, "logprobs and stop_token_ids cannot be had together", field="logprobs"
            )


class Continuation:
    """One request on its way."""

    def __init__(self, service: Service, body: CompletionBody, prompts: Sequence[Prompt]):
        self.service, self.body, self.prompts = service, body, prompts
        self.n = body.n or 1
        self.skip_special = body.skip_special_tokens is not False
        self.scores = body.max_tokens == 1 and bool(body.echo) and body.logprobs is not None
        """Log probabilities of the prompt are what is wanted: lm-eval asks for one token more and
        leaves its entry out, so there must be one even where the text ends."""
        self.head = {
            "id": identifier("cmpl-"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.served(body.model).name,
        }

    async def asks(self) -> list[GenerationRequest]:
        body = self.body
        return body.asks(
            self.service,
            [prompt.ids for prompt in self.prompts],
            max_tokens=body.max_tokens,
            stop=body.stops(),
            top_logprobs=body.logprobs,
            score_from=0 if body.echo and body.logprobs is not None else None,
            keep_special=not self.skip_special,
            grammar=await grammar_of_one(self.service, body.guides()),
            ignore_eos=bool(body.ignore_eos) or self.scores,
        )

    def completion(self, found: Sequence[FullReply]) -> dict[str, Any]:
        """The answer as a whole."""
        groups = [found[i : i + self.n] for i in range(0, len(found), self.n)]
        return {
            **self.head,
            "choices": [TextStream(self, index).choice(whole) for index, whole in enumerate(found)],
            "usage": usage([[whole.stats for whole in group] for group in groups]),
        }

    async def chunks(self, replies: Replies) -> AsyncGenerator[dict[str, Any], None]:
        """The answer as it comes."""
        streams = [TextStream(self, index) for index in range(len(self.prompts) * self.n)]
        stats: list[list[Any]] = [[] for _ in self.prompts]
        common = self.head | ({"usage": None} if self.body.wants_usage() else {})
        async with replies:
            async for part in replies:
                choice = streams[part.index].choice(part)
                if choice["text"] or choice["logprobs"] or part.finish_reason:
                    yield common | {"choices": [choice]}
                if part.stats is not None:
                    stats[part.index // self.n].append(part.stats)
        if self.body.wants_usage():
            yield common | {"choices": [], "usage": usage(stats)}


class TextStream:
    """One of the replies, as a whole or as it comes."""

    def __init__(self, asked: Continuation, index: int):
        self.index = index
        self.ends = asked.service.lm.tokenizer.eos_ids if asked.scores else ()
        self.ended = False
        self.echo = asked.prompts[index // asked.n].text() if asked.body.echo else ""
        self.logprobs: CompletionLogprobs | None = None
        if asked.body.logprobs is not None:
            self.logprobs = CompletionLogprobs(asked.service, asked.skip_special)

    def choice(self, part: Chunk | FullReply) -> dict[str, Any]:
        """A part of the reply; the first brings the prompt, where that is wanted."""
        text, self.echo = self.echo + part.text, ""
        tokens = (*part.prompt, *part.tokens)
        return {
            "index": self.index,
            "text": text,
            "logprobs": self.logprobs.of(tokens) if self.logprobs and tokens else None,
            "finish_reason": self._reason(part),
        }

    def _reason(self, part: Chunk | FullReply) -> str | None:
        self.ended |= any(one.token in self.ends for one in part.tokens)
        return "stop" if part.finish_reason and self.ended else part.finish_reason


def router(service: Service) -> APIRouter:
    """The route of the completions API."""
    routes = APIRouter()

    @routes.post("/v1/completions", response_model=None)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue texts."""
        body.check()
        adds_bos = body.add_special_tokens is not False
        prompts = await read_prompts(service, body.prompt, "prompt", adds_bos)
        asked = Continuation(service, body, prompts)
        replies = service.start(await asked.asks())
        if body.stream:
            return events(asked.chunks(replies))
        return JSONResponse(asked.completion(await wholes(request, replies)))

    return routes
