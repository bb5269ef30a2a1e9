"""Messages as OpenAI's chat API has them, and as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from ..http.api_error import ApiError, unsupported
from ..http.streaming import TEXT_OR_PARTS, Body


class TextPart(Body):
    type: Literal["text"]
    text: str


class RefusalPart(Body):
    """What an assistant would not say; it is part of the conversation."""

    type: Literal["refusal"]
    refusal: str


class OtherPart(Body):
    """An image, a sound, a file: declared, so that its refusal can say so."""

    type: Literal["image_url", "input_audio", "file"]
    image_url: dict[str, Any] | None = None
    input_audio: dict[str, Any] | None = None
    file: dict[str, Any] | None = None


Part = Annotated[TextPart | RefusalPart | OtherPart, Field(discriminator="type")]
Content = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[Part], Tag("(parts)")],
    TEXT_OR_PARTS,
]


class CalledFunction(Body):
    name: str
    arguments: str
    """JSON, as the model wrote it."""


class MessageToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None
    """Accepted without effect: some clients keep it from the stream."""


class SystemOrUserMessage(Body):
    """What the system, the developer or the user says."""

    role: Literal["system", "developer", "user"]
    content: Content
    name: str | None = None
    """For templates that write it."""


class AssistantMessage(Body):
    """What the model said, as this API returned it."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    """Accepted without effect."""
    audio: dict[str, Any] | None = None
    function_call: dict[str, Any] | None = None


class ToolMessage(Body):
    """What a tool answered."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


Message = Annotated[
    SystemOrUserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


def templated(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages for a chat template: text, and calls with their arguments as objects."""
    return [_templated(message, f"messages[{i}]") for i, message in enumerate(messages)]


def text_of(content: str | Sequence[Part] | None, field: str) -> str:
    """The text of parts, one after the other; ApiError for parts of another kind."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(_text(part, field) for part in content)


def _text(part: Part, field: str) -> str:
    if isinstance(part, OtherPart):
        raise unsupported(f"{field}.content", f"this model reads text alone, got {part.type}")
    return part.text if isinstance(part, TextPart) else part.refusal


def _templated(message: Message, field: str) -> dict[str, Any]:
    if isinstance(message, AssistantMessage):
        return _said(message, field)
    role = "system" if message.role == "developer" else message.role
    found = {"role": role, "content": text_of(message.content, field)}
    if message.name is not None:
        found["name"] = message.name
    if isinstance(message, ToolMessage):
        found["tool_call_id"] = message.tool_call_id
    return found


def _said(message: AssistantMessage, field: str) -> dict[str, Any]:
    for name in ("audio", "function_call"):
        if getattr(message, name) is not None:
            raise unsupported(f"{field}.{name}", "expected text or tool_calls")
    text = text_of(message.content, field) or message.refusal or ""
    found: dict[str, Any] = {"role": "assistant", "content": text}
    if message.name is not None:
        found["name"] = message.name
    if message.tool_calls:
        found["tool_calls"] = [
            called(call.id, call.function.name, call.function.arguments, f"{field}.tool_calls")
            for call in message.tool_calls
        ]
    return found


def called(call_id: str, name: str, arguments: str, field: str) -> dict[str, Any]:
    """A call for a chat template, which wants the arguments as an object."""
    try:
        given = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise ApiError(400, f"{field}: arguments must be a JSON object as text", field=field)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": given}}
