"""What Anthropic's Messages API is sent, and what of it chat templates take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from ..http.api_error import ApiError, unsupported
from ..http.streaming import TEXT_OR_PARTS, Body
from ..parameters import MAX_STOPS, StopString
from ..tool_calling import Function, Name, Toolbox

if TYPE_CHECKING:
    from ..service import Service


class CacheControl(Body):
    """Accepted without effect: what was read before is reused in any case."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Body):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: list[Any] | None = None
    """Accepted where empty, as an answer's own blocks have it."""


class ToolUse(Body):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: dict[str, Any] | None = None
    """Accepted without effect: who asked for the call."""


class OtherBlock(Body):
    """Declared, so that its refusal can say so; what else is in it does not matter."""

    model_config = ConfigDict(extra="ignore")

    type: Literal[
        "image",
        "document",
        "search_result",
        "thinking",
        "redacted_thinking",
        "server_tool_use",
        "container_upload",
    ]


Block = Annotated[TextBlock | OtherBlock, Field(discriminator="type")]


class ToolResult(Body):
    """What a call came to."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: (
        Annotated[
            Annotated[str, Tag("(text)")] | Annotated[list[Block], Tag("(parts)")],
            TEXT_OR_PARTS,
        ]
        | None
    ) = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


AnyBlock = Annotated[TextBlock | ToolUse | ToolResult | OtherBlock, Field(discriminator="type")]
Content = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[AnyBlock], Tag("(parts)")],
    TEXT_OR_PARTS,
]
System = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[TextBlock], Tag("(parts)")],
    TEXT_OR_PARTS,
]


class Message(Body):
    role: Literal["user", "assistant", "system"]
    content: Content


class CustomTool(Body):
    """A function of the client's."""

    name: Name
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    strict: bool | None = None
    """Accepted: calls that are asked for follow the schema in any case."""
    cache_control: CacheControl | None = None
    eager_input_streaming: bool | None = None
    """Accepted without effect."""
    defer_loading: bool | None = None
    input_examples: list[dict[str, Any]] | None = None
    allowed_callers: list[str] | None = None

    def function(self) -> Function:
        for name in ("defer_loading", "input_examples"):
            if getattr(self, name):
                raise unsupported(f"tools.{name}", "leave it out")
        if self.allowed_callers not in (None, ["direct"]):
            raise unsupported("tools.allowed_callers", "the model alone calls, directly")
        return Function(name=self.name, description=self.description, parameters=self.input_schema)


class OtherTool(Body):
    """One that Anthropic's servers run."""

    model_config = ConfigDict(extra="ignore")

    type: str

    def function(self) -> Function:
        raise unsupported("tools", f"this server runs none of its own, got {self.type[:60]!r}")


def _is_custom(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "custom" if kind in (None, "custom") else "other"


AnyTool = Annotated[
    Annotated[CustomTool, Tag("custom")] | Annotated[OtherTool, Tag("other")],
    Discriminator(_is_custom),
]


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None

    def choice(self) -> str:
        """The same as a Toolbox takes it."""
        if (self.type == "tool") != (self.name is not None):
            raise ApiError(
                400, 'tool_choice: a name goes with type "tool"', field="tool_choice.name"
            )
        return self.name or {"any": "required"}.get(self.type, self.type)


class Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    """Where the model decides, it does not think apart from its reply."""
    budget_tokens: int | None = None
    display: str | None = None


class OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Body):
    effort: str | None = None
    format: OutputFormat | None = None


class ConversationBody(Body):
    """What is to be answered, or counted."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    system: System | None = None
    tools: Annotated[list[AnyTool], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    # Accepted without effect.
    cache_control: CacheControl | None = None
    speed: Literal["standard", "fast"] | None = None
    user_profile_id: str | None = None

    def check(self) -> None:
        """Refuse what would change the reply and cannot be honoured."""
        if self.thinking and self.thinking.type == "enabled":
            raise unsupported("thinking", "this model has no thinking apart from its reply")
        if self.output_config and self.output_config.effort:
            raise unsupported("output_config.effort", "say in the messages what is wanted")

    def toolbox(self, service: Service) -> Toolbox:
        """The functions that may be called."""
        given = self.tool_choice
        return Toolbox(
            service,
            [tool.function() for tool in self.tools or ()],
            given.choice() if given else "auto",
            parallel=not (given and given.disable_parallel_tool_use),
        )

    def prompt(self, service: Service, toolbox: Toolbox) -> tuple[list[int], list[str]]:
        """Prompt ids, and the template's own stop strings.

        An assistant's message at the end is the beginning of the reply.
        """
        messages = templated(self.system, self.messages)
        begun = _begun(messages)
        if not messages or messages[-1]["role"] == "system":
            raise ApiError(400, "messages must hold one of the user's", field="messages")
        prompt, stops = service.conversation(messages, toolbox.for_template)
        if begun:
            text = service.lm.tokenizer.chat_text(messages, tools=toolbox.for_template)
            prompt = service.encode(text + begun)
        return prompt, stops


class CountBody(ConversationBody):
    pass


class MessagesBody(ConversationBody):
    max_tokens: Annotated[int, Field(ge=0)]
    """0: the prompt is only read."""
    stream: bool | None = None
    stop_sequences: Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    """0 keeps all tokens."""
    container: str | dict[str, Any] | None = None

    # Accepted without effect.
    metadata: dict[str, str | None] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    inference_geo: str | None = None
    diagnostics: dict[str, Any] | None = None

    def check(self) -> None:
        super().check()
        if self.container:
            raise unsupported("container", "no code is run here")
        if self.tools and self.guide():
            raise ApiError(
                400,
                "output_config.format and tools cannot be had together; leave one out",
                field="output_config.format",
            )

    def guide(self) -> dict[str, Any]:
        """The form of the reply as an argument of `grammar_of`."""
        wanted = self.output_config and self.output_config.format
        return {"json_schema": wanted.schema_} if wanted else {}


def templated(
    system: str | list[TextBlock] | None, messages: list[Message]
) -> list[dict[str, Any]]:
    """Messages for a chat template; those of one role that follow each other are one."""
    found: list[dict[str, Any]] = []
    if system:
        found.append({"role": "system", "content": _text(system, "system")})
    for index, message in enumerate(messages):
        for one in _templated(message, f"messages[{index}]"):
            if found and _mergeable(found[-1], one):
                found[-1]["content"] += "\n" + one["content"]
            else:
                found.append(one)
    return found


def _mergeable(last: dict[str, Any], one: dict[str, Any]) -> bool:
    return last.keys() == one.keys() == {"role", "content"} and last["role"] == one["role"]


def _templated(message: Message, field: str) -> list[dict[str, Any]]:
    """A message is several where it holds results of calls."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results, calls, texts = list[dict[str, Any]](), list[dict[str, Any]](), list[Any]()
    for block in message.content:
        if isinstance(block, ToolResult) and message.role == "user":
            results.append(_result(block, field))
        elif isinstance(block, ToolUse) and message.role == "assistant":
            calls.append(_call(block))
        elif isinstance(block, TextBlock | OtherBlock):
            texts.append(block)
        else:
            raise ApiError(
                400, f"{field}: {block.type} is not for role {message.role}", field=field
            )
    said: dict[str, Any] = {"role": message.role, "content": _text(texts, field)}
    if calls:
        said["tool_calls"] = calls
    return results + ([said] if texts or calls or not results else [])


def _call(block: ToolUse) -> dict[str, Any]:
    function = {"name": block.name, "arguments": block.input}
    return {"id": block.id, "type": "function", "function": function}


def _result(block: ToolResult, field: str) -> dict[str, Any]:
    text = _text(block.content or "", f"{field}.tool_result")
    if block.is_error:  # templates have no other place for it
        text = f"Error: {text}"
    return {"role": "tool", "content": text, "tool_call_id": block.tool_use_id}


def _text(content: str | list[TextBlock] | list[Block], field: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for block in content:
        if isinstance(block, OtherBlock):
            raise unsupported(f"{field}.{block.type}", "this model reads text alone")
        if block.citations:
            raise unsupported(f"{field}.citations", "leave them out")
        texts.append(block.text)
    return "\n".join(texts)


def _begun(messages: list[dict[str, Any]]) -> str:
    """The beginning of the reply, which is taken off the end of `messages`."""
    if messages[-1]["role"] != "assistant":
        return ""
    last = messages.pop()
    text: str = last["content"]
    if "tool_calls" in last or text != text.rstrip():
        raise ApiError(
            400,
            "messages: the last one begins the reply, so it must be text that does not end in "
            "white space",
            field="messages",
        )
    return text
