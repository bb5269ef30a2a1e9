"""OpenAI's /v1/responses. Nothing is kept between requests."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Field
from pydantic_core import PydanticCustomError

from ..http.api_error import ApiError
from ..http.schema import TEXT_ONLY_OUTPUT, Body, Ignored, OneOf, refused
from ..http.streaming import named_sse, stream_response
from ..parameters import SamplingFields, TopLogprobs, run_in_thread
from ..reply_stream import GenerationRequest, ReplyStream, full_replies
from ..service import Effort, Service, by_effort
from ..tool_calling import Function, Name, NamedFunction, RequestTools
from .common import error_body
from .options import StreamOptions
from .reply_forms import TextFormat, TextOptionsFormat
from .response_events import ResponseEvent, ResponseStream
from .response_items import Item, flat_name, template_messages

JsonDict = dict[str, Any]

_LOGPROBS = "message.output_text.logprobs"
_ENCRYPTED = "reasoning.encrypted_content"
_INCLUDABLE: tuple[list[str], ...] = (
    [],
    [_LOGPROBS],
    [_ENCRYPTED],
    [_LOGPROBS, _ENCRYPTED],
    [_ENCRYPTED, _LOGPROBS],
)
_NOT_KEPT = "nothing is kept here; send the whole conversation as input"


MOST_TOOLS = LONGEST_NAME = 128


class FlatTool(Function):
    """A function as the responses API describes it."""

    type: Literal["function"]
    defer_loading: Ignored[bool] = None
    """The model is told of every function at once; none is looked for."""

    def named(self, name: str, description: str | None) -> Function:
        return Function(
            name=name, description=description, parameters=self.parameters, strict=self.strict
        )


class Namespace(Body):
    """Functions under a common name, as those of an MCP server."""

    type: Literal["namespace"]
    name: Name
    description: str | None = None
    tools: Annotated[list[FlatTool], Field(max_length=MOST_TOOLS)]

    def check(self) -> None:
        for tool in self.tools:
            if len(flat_name(self.name, tool.name)) > LONGEST_NAME:
                raise PydanticCustomError(
                    "name", f"the names of {tool.name} and its namespace are too long together"
                )

    def functions(self) -> Iterator[tuple[str, Function]]:
        """Each function's own name, and the function as the model is told of it.

        The description of the namespace stands before that of its first function.
        """
        about = self.description
        for tool in self.tools:
            text = "\n\n".join(filter(None, (about, tool.description))) or None
            yield tool.name, tool.named(flat_name(self.name, tool.name), text)
            about = None


class HostedTool(Body):
    """A tool that OpenAI's service runs and a reply can do without: it is left out.

    Agents list them in every request. Those with data of the user's (file_search, mcp,
    code_interpreter) are refused, as a reply without that data would be wrong.
    """

    model_config = ConfigDict(extra="ignore")

    type: Literal[
        "web_search",
        "web_search_2025_08_26",
        "web_search_preview",
        "web_search_preview_2025_03_11",
        "image_generation",
    ]


class FlatChoice(NamedFunction):
    type: Literal["function"]


class TextOptions(Body):
    format: TextOptionsFormat | None = None
    verbosity: Annotated[
        Literal["low", "medium", "high"] | None,
        refused("ask for the length of the reply in the input", ("medium",)),
    ] = None


Summary = Literal["auto", "concise", "detailed", "none"]


class Reasoning(Body):
    effort: Effort | None = None
    """As reasoning_effort of the chat API."""
    summary: Summary | None = None
    """A thought is in `summary` of its item, where most clients look, instead of `content`; it is
    not shortened."""
    generate_summary: Summary | None = None
    """The older name of `summary`."""


class ResponseBody(SamplingFields):
    """Text or items to reply to."""

    input: str | list[Item]
    model: str | None = None
    instructions: str | None = None
    """The system message."""
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    top_logprobs: TopLogprobs | None = None
    include: Annotated[
        list[str] | None, refused(f"only {_LOGPROBS} can be included", _INCLUDABLE)
    ] = None
    """A thought's text is in its item; nothing of it is encrypted."""
    text: TextOptions | None = None
    tools: (
        Annotated[
            list[Annotated[FlatTool | Namespace | HostedTool, OneOf("type")]],
            Field(max_length=MOST_TOOLS),
        ]
        | None
    ) = None
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    store: bool | None = None
    """Accepted without effect: nothing is kept."""
    metadata: dict[str, str] | None = None
    """Accepted without effect; the response repeats it."""
    max_tool_calls: int | None = None
    """Accepted without effect: it limits tools that the server runs, and this one runs none."""
    user: str | None = None
    """Accepted without effect; the response repeats it."""
    safety_identifier: Ignored[str] = None
    service_tier: Ignored[str] = None
    client_metadata: Ignored[JsonDict] = None
    prompt_cache_key: Ignored[str] = None
    prompt_cache_options: Ignored[JsonDict] = None
    prompt_cache_retention: Ignored[str] = None

    access_programs: Annotated[JsonDict | None, refused("leave it out")] = None
    background: Annotated[bool | None, refused("replies are given at once; leave it out")] = None
    background_options: Annotated[JsonDict | None, refused("leave it out")] = None
    context_management: Annotated[list[JsonDict] | None, refused("shorten the input")] = None
    conversation: Annotated[str | JsonDict | None, refused(_NOT_KEPT)] = None
    image: Annotated[JsonDict | None, refused(TEXT_ONLY_OUTPUT)] = None
    moderation: Annotated[JsonDict | None, refused("this server has no moderation")] = None
    previous_response_id: Annotated[str | None, refused(_NOT_KEPT)] = None
    prompt: Annotated[
        JsonDict | None, refused("no prompts are kept here; send instructions and input")
    ] = None
    reasoning: Reasoning | None = None
    truncation: Annotated[
        Literal["auto", "disabled"] | None, refused("shorten the input", ("disabled",))
    ] = None

    @property
    def effort(self) -> Effort | None:
        return self.reasoning.effort if self.reasoning else None

    @property
    def summary(self) -> Summary | None:
        asked = self.reasoning or Reasoning()
        wanted = asked.summary or asked.generate_summary
        return None if wanted == "none" else wanted

    def wants_logprobs(self) -> bool:
        return self.top_logprobs is not None or _LOGPROBS in (self.include or ())

    @property
    def text_format(self) -> TextOptionsFormat:
        return (self.text and self.text.format) or TextFormat(type="text")

    def check(self) -> None:
        if len(self.functions()) > MOST_TOOLS:
            raise ApiError(f"tools: expected at most {MOST_TOOLS} functions", field="tools")

    def functions(self) -> list[tuple[tuple[str | None, str], Function]]:
        """Namespace and name of each function, and the function as the model is told of it."""
        found: list[tuple[tuple[str | None, str], Function]] = []
        for tool in self.tools or ():
            if isinstance(tool, Namespace):
                found += [((tool.name, name), function) for name, function in tool.functions()]
            elif isinstance(tool, FlatTool):
                found.append(((None, tool.name), tool.named(tool.name, tool.description)))
        return found

    def request_tools(self, service: Service) -> RequestTools:
        functions = self.functions()
        choice: str
        if isinstance(self.tool_choice, FlatChoice):
            choice = self.tool_choice.name  # in a namespace, if only one has it
            known = [function.name for (_, name), function in functions if name == choice]
            choice = known[0] if len(known) == 1 else choice
        else:
            choice = self.tool_choice or "auto"
        return RequestTools(
            service,
            [function for _, function in functions],
            choice,
            parallel=self.parallel_tool_calls is not False,
        )

    async def generation(self, service: Service, tools: RequestTools) -> GenerationRequest:
        messages = template_messages(self.instructions, self.input)
        thinking = by_effort(self.effort, "reasoning.effort")
        prompt = await run_in_thread(
            lambda: service.chat_prompt(messages, tools.for_template, "input", thinking=thinking),
            "input",
        )
        grammar = await tools.grammar({"text.format": self.text_format.guide()})
        return GenerationRequest(
            prompt=prompt,
            served=service.find_model(self.model),
            sampling=self.sampling(service, prompt),
            think_tokens=thinking.tokens,
            max_tokens=self.max_output_tokens,
            stop=[*prompt.stops, *tools.stops],
            top_logprobs=(self.top_logprobs or 0) if self.wants_logprobs() else None,
            keep_special=tools.keep_special,
            token_marks=tools.token_marks,
            grammar=grammar,
        )

    def echoed(self, generation: GenerationRequest) -> dict[str, Any]:
        """The fields of a response that repeat the request."""
        choice = self.tool_choice or "auto"
        return {
            "model": generation.served.name,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": self.effort, "summary": self.summary},
            "service_tier": "default",
            "store": False,
            "temperature": generation.sampling.temperature,
            "text": {"format": self.text_format.model_dump(by_alias=True)},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [
                tool.model_dump() for tool in self.tools or () if not isinstance(tool, HostedTool)
            ],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": generation.sampling.top_p,
            "truncation": "disabled",
            "user": self.user,
        }


async def _events(
    replies: ReplyStream, response: ResponseStream
) -> AsyncGenerator[ResponseEvent, None]:
    async with replies:
        for event in response.begin():
            yield event
        try:
            async for chunk in replies:
                for event in response.add(chunk):
                    yield event
        except ApiError as error:
            for event in response.fail(error):
                yield event


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/responses", response_model=None)
    async def responses(body: ResponseBody, request: Request) -> Response:
        """Reply to a text, or to the items of a conversation."""
        tools = body.request_tools(service)
        generation = await body.generation(service, tools)
        namespaced = {
            function.name: path for path, function in body.functions() if path[0] is not None
        }
        response = ResponseStream(
            service, body.echoed(generation), tools, body.wants_logprobs(), namespaced
        )
        replies = service.start([generation], "input")
        if body.stream:
            events = _events(replies, response)
            return stream_response(events, encode=named_sse, error_body=error_body)
        [reply] = await full_replies(request, replies)
        for _ in (*response.begin(), *response.add(reply)):
            pass
        return JSONResponse(response.response())

    return routes
