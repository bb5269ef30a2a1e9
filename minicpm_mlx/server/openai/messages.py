"""Messages of OpenAI's chat API, and their conversion for chat templates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from ...errors import InvalidArgumentError
from ...text.messages import parse_arguments
from ..http.api_error import ApiError
from ..http.schema import (
    Body,
    Echo,
    OneOf,
    TextOrParts,
    UnsupportedPart,
    join_text,
    refused,
)
from ..tool_calling import template_call


class TextPart(Body):
    type: Literal["text"]
    text: str


class EchoedTextPart(TextPart, Echo):
    """Text of an earlier reply, or of a call's result."""


class RefusalPart(Echo):
    """An assistant's refusal to answer; it is part of the conversation."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


class MediaPart(UnsupportedPart):
    type: Literal["image_url", "input_audio", "file"]


Content = TextOrParts[Annotated[TextPart | RefusalPart | MediaPart, OneOf("type")]]
EchoedContent = TextOrParts[Annotated[EchoedTextPart | RefusalPart | MediaPart, OneOf("type")]]


class CalledFunction(Echo):
    name: str
    arguments: str | None = None
    """JSON, as the model wrote it; none is an empty object."""


class MessageToolCall(Echo):
    id: str
    type: Literal["function"] | None = None
    function: CalledFunction


class SystemOrUserMessage(Body):
    role: Literal["system", "developer", "user"]
    content: Content
    name: str | None = None
    """For templates that write it."""


class AssistantMessage(Echo):
    """A reply as this API returned it."""

    role: Literal["assistant"]
    content: EchoedContent | None = None
    name: str | None = None
    reasoning_content: str | None = None
    """The thought before it."""
    reasoning: str | None = None
    """Another name for it, of newer clients."""
    tool_calls: list[MessageToolCall] | None = None
    refusal: str | None = None
    audio: Annotated[dict[str, Any] | None, refused("expected text or tool_calls", ())] = None
    function_call: Annotated[dict[str, Any] | None, refused("use tool_calls", ())] = None


class ToolMessage(Echo):
    """The result of a call."""

    role: Literal["tool"]
    content: EchoedContent
    tool_call_id: str
    name: str | None = None


Message = Annotated[SystemOrUserMessage | AssistantMessage | ToolMessage, OneOf("role")]


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages for a chat template: text, and calls with their arguments as objects."""
    return [_template_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _template_message(message: Message, field: str) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    converted: dict[str, Any] = {"role": role, "content": join_text(message.content)}
    if message.name is not None:
        converted["name"] = message.name
    if isinstance(message, ToolMessage):
        converted["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage):
        converted["content"] = converted["content"] or message.refusal or ""
        if thought := message.reasoning_content or message.reasoning:
            converted["reasoning_content"] = thought
        if message.tool_calls:
            converted["tool_calls"] = [
                parse_call(
                    call.id,
                    call.function.name,
                    call.function.arguments,
                    f"{field}.tool_calls[{i}].function.arguments",
                )
                for i, call in enumerate(message.tool_calls)
            ]
    return converted


def parse_call(call_id: str, name: str, arguments: str | None, field: str) -> dict[str, Any]:
    """A call for a chat template; ApiError unless `arguments` is the text of a JSON object."""
    try:
        return template_call(call_id, name, parse_arguments(arguments, field))
    except InvalidArgumentError as error:
        raise ApiError(str(error), field=field) from None
