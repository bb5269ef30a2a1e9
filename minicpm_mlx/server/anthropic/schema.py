"""Bodies of Anthropic's Messages API, and their conversion for chat templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from ...text.chat_prompt import ChatPrompt
from ..http.api_error import ApiError
from ..http.schema import (
    Body,
    Echo,
    Ignored,
    OneOf,
    TextOrParts,
    UnsupportedPart,
    join_text,
    refused,
)
from ..parameters import SamplingFields, StopStrings
from ..service import AS_TEMPLATE, EFFORTS, Service, Thinking
from ..tool_calling import Function, Name, RequestTools, template_call


class CacheControl(Body):
    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class CacheableBody(Body):
    cache_control: CacheControl | None = None
    """Accepted without effect: the prefix cache needs no marks."""


class TextBlock(CacheableBody):
    type: Literal["text"]
    text: str
    citations: Annotated[list[Any] | None, refused("leave them out")] = None
    """May be empty, as in the blocks of replies."""


class EchoedTextBlock(TextBlock, Echo):
    """Text of an earlier reply, or of a call's result."""


class ToolUse(Echo):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any] | None = None


class Thoughts(Echo):
    """The thought of an earlier reply; another model's may have no text."""

    type: Literal["thinking", "redacted_thinking"]
    thinking: str = ""


class UnsupportedBlock(UnsupportedPart):
    type: Literal[
        "image",
        "document",
        "search_result",
        "server_tool_use",
        "container_upload",
    ]


class ToolResult(Echo):
    """The result of a call."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: TextOrParts[Annotated[EchoedTextBlock | UnsupportedBlock, OneOf("type")]] | None = None
    is_error: bool | None = None


class AnthropicInput(Body):
    role: Literal["user", "system"]
    content: TextOrParts[
        Annotated[TextBlock | ToolUse | ToolResult | Thoughts | UnsupportedBlock, OneOf("type")]
    ]


class AnthropicReply(Echo):
    """An earlier reply, or the beginning of the one to make."""

    role: Literal["assistant"]
    content: TextOrParts[
        Annotated[
            EchoedTextBlock | ToolUse | ToolResult | Thoughts | UnsupportedBlock, OneOf("type")
        ]
    ]


AnthropicMessage = Annotated[AnthropicInput | AnthropicReply, OneOf("role")]


class CustomTool(CacheableBody):
    """A function of the client."""

    name: Name
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    strict: bool | None = None
    """True: all calls follow their schemas, as those that must come do in any case."""
    eager_input_streaming: Ignored[bool] = None
    defer_loading: Annotated[bool | None, refused("leave it out")] = None
    input_examples: Annotated[list[dict[str, Any]] | None, refused("leave it out")] = None
    allowed_callers: Annotated[
        list[str] | None, refused("only the model calls, directly", (["direct"],))
    ] = None

    def function(self) -> Function:
        return Function(
            name=self.name,
            description=self.description,
            parameters=self.input_schema,
            strict=self.strict,
        )


class ServerTool(Body):
    """A tool that Anthropic's servers run."""

    model_config = ConfigDict(extra="ignore")

    type: str

    def check(self) -> None:
        raise PydanticCustomError("unsupported", "this server runs no tools of its own")


def _tool_tag(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "custom" if kind in (None, "custom") else "other"


AnyTool = Annotated[
    Annotated[CustomTool, Tag("custom")] | Annotated[ServerTool, Tag("other")],
    Discriminator(_tool_tag),
]


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None

    def check(self) -> None:
        if (self.type == "tool") != (self.name is not None):
            raise ApiError('tool_choice: a name goes with type "tool"', field="tool_choice.name")

    def choice(self) -> str:
        """The `choice` of RequestTools."""
        return self.name or {"any": "required"}.get(self.type, self.type)


class ThinkingField(Body):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    """"adaptive" and "between_tools" leave it to the chat template."""
    budget_tokens: Annotated[int, Field(ge=0)] | None = None
    """The longest thought."""
    display: Ignored[str] = None

    def thinking(self) -> Thinking:
        wanted = {"enabled": True, "disabled": False}.get(self.type)
        tokens = None if wanted is False else self.budget_tokens
        return Thinking(wanted=wanted, tokens=tokens, field="thinking.type")


class OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Body):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    """Bounds a thought, as reasoning_effort of OpenAI's API; `thinking.budget_tokens` wins."""
    format: OutputFormat | None = None


class ContextEdit(Body):
    """Leaves old thoughts out, as chat templates do themselves."""

    type: Literal["clear_thinking_20251015"]
    keep: Ignored[Literal["all"] | dict[str, Any]] = None


class ContextManagement(Body):
    edits: list[ContextEdit] | None = None


class ConversationBody(CacheableBody):
    """A conversation to continue, or to count the tokens of."""

    model: str
    messages: Annotated[list[AnthropicMessage], Field(min_length=1)]
    system: TextOrParts[TextBlock] | None = None
    tools: Annotated[list[AnyTool], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingField | None = None
    output_config: OutputConfig | None = None
    context_management: ContextManagement | None = None
    speed: Ignored[Literal["standard", "fast"]] = None
    user_profile_id: Ignored[str] = None

    def request_tools(self, service: Service) -> RequestTools:
        choice = self.tool_choice
        return RequestTools(
            service,
            [tool.function() for tool in self.tools or () if isinstance(tool, CustomTool)],
            choice.choice() if choice else "auto",
            parallel=not (choice and choice.disable_parallel_tool_use),
        )

    def wanted_thinking(self) -> Thinking:
        thinking = self.thinking.thinking() if self.thinking else AS_TEMPLATE
        effort = self.output_config.effort if self.output_config else None
        if effort is None or thinking.wanted is False or thinking.tokens is not None:
            return thinking
        return replace(thinking, tokens=EFFORTS.get(effort, AS_TEMPLATE).tokens)

    def prompt(self, service: Service, tools: RequestTools) -> ChatPrompt:
        """The prompt. An assistant's message at the end is the beginning of the reply."""
        messages = template_messages(self.system, self.messages)
        continues = self.continues_reply
        _check_order(messages, continues)
        return service.chat_prompt(
            messages, tools.for_template, continues=continues, thinking=self.wanted_thinking()
        )

    @property
    def continues_reply(self) -> bool:
        """Whether the last message is the beginning of the reply."""
        return self.messages[-1].role == "assistant"


class MessagesBody(SamplingFields, ConversationBody):
    max_tokens: Annotated[int, Field(ge=0)]
    """0: the prompt is only read."""
    stream: bool | None = None
    stop_sequences: StopStrings | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    """0 keeps all tokens."""
    container: Annotated[str | dict[str, Any] | None, refused("this server runs no code")] = None
    thread: Annotated[
        dict[str, Any] | None,
        refused("nothing is kept here; send the whole conversation as messages"),
    ] = None
    metadata: Ignored[dict[str, str | None]] = None
    service_tier: Ignored[Literal["auto", "standard_only"]] = None
    inference_geo: Ignored[str] = None
    diagnostics: Ignored[dict[str, Any]] = None

    def guide(self) -> dict[str, Any]:
        """The format of the reply as arguments of `compile_grammar`."""
        output_format = self.output_config and self.output_config.format
        return {"json_schema": output_format.schema_} if output_format else {}


def template_messages(
    system: str | list[TextBlock] | None, messages: Sequence[AnthropicMessage]
) -> list[dict[str, Any]]:
    """Messages for a chat template. Consecutive messages of one role are merged."""
    converted: list[dict[str, Any]] = []
    if system:
        converted.append({"role": "system", "content": join_text(system, "\n")})
    for index, message in enumerate(messages):
        for part in _split_message(message, f"messages[{index}]"):
            last = converted[-1] if converted else {}
            is_text_after_text = last.keys() == part.keys() == {"role", "content"}
            if is_text_after_text and last["role"] == part["role"]:
                last["content"] += "\n" + part["content"]
            else:
                converted.append(part)
    return converted


def _split_message(message: AnthropicMessage, field: str) -> list[dict[str, Any]]:
    """Results of calls are messages of their own in a template."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results, calls, texts = list[dict[str, Any]](), list[dict[str, Any]](), list[Any]()
    thoughts = list[str]()
    for index, block in enumerate(message.content):
        if isinstance(block, ToolResult) and message.role == "user":
            results.append(_template_result(block))
        elif isinstance(block, ToolUse) and message.role == "assistant":
            calls.append(template_call(block.id, block.name, block.input))
        elif isinstance(block, TextBlock):
            texts.append(block)
        elif isinstance(block, Thoughts) and message.role == "assistant":
            thoughts.append(block.thinking)
        else:
            field = f"{field}.content[{index}]"
            raise ApiError(f"{field}: {block.type} is not for role {message.role}", field=field)
    rest: dict[str, Any] = {"role": message.role, "content": join_text(texts, "\n")}
    if any(thoughts):
        rest["reasoning_content"] = "\n".join(filter(None, thoughts))
    if calls:
        rest["tool_calls"] = calls
    return results + ([rest] if texts or calls or not results else [])


def _template_result(block: ToolResult) -> dict[str, Any]:
    text = join_text(block.content, "\n")
    if block.is_error:  # templates have no field for it
        text = f"Error: {text}"
    return {"role": "tool", "content": text, "tool_call_id": block.tool_use_id}


def _check_order(messages: list[dict[str, Any]], continues: bool) -> None:
    """ApiError unless a reply may follow; `continues` says that the last message begins it."""
    before = messages[:-1] if continues else messages
    # Claude Code ends a first request with a system message of its own.
    if all(message["role"] == "system" for message in before):
        raise ApiError("messages must include one of the user", field="messages")
    text: str = messages[-1]["content"]
    if continues and ("tool_calls" in messages[-1] or text != text.rstrip()):
        raise ApiError(
            "messages: the last one begins the reply, so it must be text that does not end in "
            "white space",
            field="messages",
        )
