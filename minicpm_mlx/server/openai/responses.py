"""OpenAI's /v1/responses: text and calls, whole or as events. Nothing is kept between requests."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from ..http.api_error import ApiError
from ..http.streaming import Body, sse, streamed
from ..parameters import compute, grammar_of, refuse_all
from ..reply_stream import GenerationRequest, Replies, wholes
from ..tool_calling import Function, NamedFunction, Toolbox
from .common import refused
from .options import TextOptionsFormat, guide_of
from .response_events import ResponseStream
from .response_items import Item, templated

if TYPE_CHECKING:
    from ..service import Service

_LOGPROBS = "message.output_text.logprobs"


class FlatTool(Function):
    """A function as the responses API describes it."""

    type: Literal["function"]


class FlatChoice(NamedFunction):
    type: Literal["function"]


class TextOptions(Body):
    format: TextOptionsFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Body):
    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponsesStreamOptions(Body):
    include_obfuscation: bool | None = None
    """Accepted: padding against listeners on the way, of which a local server has none."""


class ResponseBody(Body):
    """What to answer, and how."""

    input: str | list[Item]
    model: str | None = None
    instructions: str | None = None
    """What the system says first."""
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[str] | None = None
    text: TextOptions | None = None
    tools: Annotated[list[FlatTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None

    # Accepted without effect.
    store: bool | None = None
    """Nothing is kept, whatever it says."""
    metadata: dict[str, str] | None = None
    max_tool_calls: int | None = None
    """Of tools that the server itself runs; it runs none."""
    user: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None

    # Refused where they ask for something.
    access_programs: dict[str, Any] | None = None
    background: bool | None = None
    background_options: dict[str, Any] | None = None
    context_management: list[dict[str, Any]] | None = None
    conversation: str | dict[str, Any] | None = None
    image: dict[str, Any] | None = None
    moderation: dict[str, Any] | None = None
    previous_response_id: str | None = None
    prompt: dict[str, Any] | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["auto", "disabled"] | None = None

    def check(self) -> None:
        """Refuse what cannot be done."""
        unkept = "nothing is kept here; send the whole conversation as input"
        effort = self.reasoning.effort if self.reasoning else None
        others = set(self.include or ()) - {_LOGPROBS}
        refuse_all(
            {
                "access_programs": (self.access_programs, "leave it out"),
                "background": (self.background, "replies are given at once; leave it out"),
                "background_options": (self.background_options, "leave it out"),
                "context_management": (self.context_management, "shorten the input yourself"),
                "conversation": (self.conversation, unkept),
                "image": (self.image, "this model writes text alone"),
                "include": (others, f"only {_LOGPROBS} can be included"),
                "moderation": (self.moderation, "nothing here moderates"),
                "previous_response_id": (self.previous_response_id, unkept),
                "prompt": (self.prompt, "no prompts are kept here; send instructions and input"),
                "reasoning.effort": (
                    effort not in (None, "none"),
                    "this model does not reason before it answers",
                ),
                "text.verbosity": (
                    self.text is not None and self.text.verbosity not in (None, "medium"),
                    "say in the input how long the reply should be",
                ),
                "truncation": (self.truncation == "auto", "shorten the input yourself"),
            }
        )

    def wants_logprobs(self) -> bool:
        return self.top_logprobs is not None or _LOGPROBS in (self.include or ())

    def toolbox(self, service: Service) -> Toolbox:
        choice = self.tool_choice or "auto"
        return Toolbox(
            service,
            [Function(**tool.model_dump(exclude={"type"})) for tool in self.tools or ()],
            choice.name if isinstance(choice, FlatChoice) else choice,
            parallel=self.parallel_tool_calls is not False,
        )

    async def ask(self, service: Service, tools: Toolbox) -> GenerationRequest:
        messages = templated(self.instructions, self.input)
        prompt, stops = await compute(
            lambda: service.conversation(messages, tools=tools.for_template), "input"
        )
        guide = guide_of(self.text.format if self.text else None)
        if guide and tools.active:
            raise ApiError(
                400, "text.format and tools cannot be had together; leave one out", field="text"
            )
        grammar = await grammar_of(service, guide, "text.format")
        return GenerationRequest(
            prompt=prompt,
            served=service.served(self.model),
            sampling=service.sampling(temperature=self.temperature, top_p=self.top_p),
            max_tokens=self.max_output_tokens,
            stop=[*stops, *tools.stops],
            top_logprobs=(self.top_logprobs or 0) if self.wants_logprobs() else None,
            keep_special=tools.keep_special,
            grammar=grammar or await tools.grammar(),
        )

    def echoed(self, ask: GenerationRequest) -> dict[str, Any]:
        """The fields of an answer that say what was asked."""
        choice = self.tool_choice or "auto"
        wanted = self.text.format if self.text else None
        return {
            "model": ask.served.name,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": ask.sampling.temperature,
            "text": {"format": wanted.model_dump(by_alias=True) if wanted else {"type": "text"}},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump() for tool in self.tools or ()],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": ask.sampling.top_p,
            "truncation": "disabled",
            "user": self.user,
        }


async def _events(replies: Replies, stream: ResponseStream) -> AsyncGenerator[bytes, None]:
    """The answer as it comes."""
    async with replies:
        for event in stream.begin():
            yield sse(event, event["type"])
        try:
            async for part in replies:
                for event in stream.add(part):
                    yield sse(event, event["type"])
        except ApiError as refusal:
            for event in stream.fail(refusal):
                yield sse(event, event["type"])


def router(service: Service) -> APIRouter:
    """The route of the responses API."""
    routes = APIRouter()

    @routes.post("/v1/responses", response_model=None)
    async def responses(body: ResponseBody, request: Request) -> Response:
        """Answer a text, or the items of a conversation."""
        body.check()
        tools = body.toolbox(service)
        ask = await body.ask(service, tools)
        stream = ResponseStream(service, body.echoed(ask), tools, body.wants_logprobs())
        replies = service.start([ask], "input")
        if body.stream:
            return streamed(_events(replies, stream), trouble=lambda error: sse(refused(error)))
        [whole] = await wholes(request, replies)
        for _ in (*stream.begin(), *stream.add(whole)):
            pass
        return JSONResponse(stream.response())

    return routes
