"""OpenAI's /v1/completions: continues text or token ids."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from ...text.chat_prompt import ChatPrompt
from ..http.api_error import ApiError, unsupported
from ..http.schema import refused
from ..http.streaming import new_id
from ..parameters import TopLogprobs, compile_only_grammar
from ..reply_stream import Chunk, FullReply, GenerationRequest, ReplyStream, full_replies
from ..service import Service
from .common import CompletionLogprobs, stream_events, usage
from .options import OpenAIFields
from .prompts import Prompt, Prompts, read_prompts


class CompletionBody(OpenAIFields):
    """Texts to continue."""

    prompt: Prompts
    """Text, token ids, or a list of either."""
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    echo: bool | None = None
    """The prompt comes before its reply, with its log probabilities if `logprobs` is set."""
    logprobs: TopLogprobs | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    suffix: Annotated[str | None, refused("this model does not fill gaps")] = None
    add_special_tokens: bool | None = None
    """Whether a text begins with the model's bos; vLLM's."""

    def check(self) -> None:
        super().check()
        if self.best_of not in (None, self.n or 1):
            raise unsupported("best_of", "it must equal n; ask for more with n, and choose")
        if self.logprobs is not None and self.stop_token_ids:
            raise ApiError(
                "logprobs and stop_token_ids exclude each other; give one", field="logprobs"
            )


class CompletionRun:
    """One request from its body to its response."""

    def __init__(self, service: Service, body: CompletionBody, prompts: Sequence[Prompt]):
        self.service, self.body, self.prompts = service, body, prompts
        self.n, self.guides = body.n or 1, body.guides()
        self.skip_special = body.skip_special_tokens is not False
        self.scores_prompt = body.max_tokens == 1 and bool(body.echo) and body.logprobs is not None
        """The client wants the log probabilities of the prompt. lm-eval asks for one more token and
        drops its entry, so there must be a token even if the text ends."""
        self.head = {
            "id": new_id("cmpl-"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.find_model(body.model).name,
        }

    async def generations(self) -> list[GenerationRequest]:
        body = self.body
        return body.generations(
            self.service,
            [ChatPrompt(ids=list(prompt.ids)) for prompt in self.prompts],
            await compile_only_grammar(self.service, self.guides),
            max_tokens=body.max_tokens,
            continues=True,
            top_logprobs=body.logprobs,
            logprob_start=0 if body.echo and body.logprobs is not None else None,
            ignore_eos=bool(body.ignore_eos) or self.scores_prompt,
        )

    def response(self, replies: Sequence[FullReply]) -> dict[str, Any]:
        groups = [replies[i : i + self.n] for i in range(0, len(replies), self.n)]
        return {
            **self.head,
            "choices": [TextStream(self, reply.index).choice(reply) for reply in replies],
            "usage": usage([[reply.stats for reply in group] for group in groups]),
        }

    async def chunks(self, stream: ReplyStream) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a streamed response."""
        texts = [TextStream(self, index) for index in range(len(self.prompts) * self.n)]
        counts = self.body.stream_usage([len(prompt.ids) for prompt in self.prompts])
        async with stream:
            async for chunk in stream:
                counts.add(chunk)
                choice = texts[chunk.index].choice(chunk)
                if choice["text"] or choice["logprobs"] or chunk.finish_reason:
                    yield self.head | {"choices": [choice]} | counts.fields(chunk.index)
        for fields in counts.last():
            yield self.head | fields


class TextStream:
    """Turns the chunks of one reply, or the full reply, into choices."""

    def __init__(self, run: CompletionRun, index: int):
        self.index = index
        self.eos = run.service.lm.tokenizer.eos_ids if run.scores_prompt else ()
        self.has_ended = False
        self.echo = run.prompts[index // run.n].text() if run.body.echo else ""
        self.logprobs: CompletionLogprobs | None = None
        if run.body.logprobs is not None:
            self.logprobs = CompletionLogprobs(
                run.service, run.skip_special, continues=not (run.body.echo or run.guides)
            )

    def choice(self, chunk: Chunk) -> dict[str, Any]:
        """The first choice begins with the prompt if `echo` is set."""
        text, self.echo = self.echo + chunk.text, ""
        tokens = (*chunk.prompt, *chunk.tokens)
        return {
            "index": self.index,
            "text": text,
            "logprobs": self.logprobs.add(tokens) if self.logprobs and tokens else None,
            "finish_reason": self._finish_reason(chunk),
        }

    def _finish_reason(self, chunk: Chunk) -> str | None:
        self.has_ended |= any(scored.token in self.eos for scored in chunk.tokens)
        return "stop" if chunk.finish_reason and self.has_ended else chunk.finish_reason


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/completions", response_model=None)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue texts."""
        adds_bos = body.add_special_tokens is not False
        prompts = await read_prompts(service, body.prompt, "prompt", adds_bos)
        run = CompletionRun(service, body, prompts)
        stream = service.start(await run.generations())
        if body.stream:
            return stream_events(run.chunks(stream))
        return JSONResponse(run.response(await full_replies(request, stream)))

    return routes
