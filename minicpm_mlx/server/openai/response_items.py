"""What goes into OpenAI's responses API: messages, calls and their results, as items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from ..http.api_error import ApiError, unsupported
from ..http.streaming import TEXT_OR_PARTS, Body
from .messages import called

State = Literal["in_progress", "completed", "incomplete"]


class InputText(Body):
    type: Literal["input_text"]
    text: str
    prompt_cache_breakpoint: dict[str, Any] | None = None
    """Accepted without effect."""


class OutputText(Body):
    """What the model said, as this API returned it."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class RefusalText(Body):
    type: Literal["refusal"]
    refusal: str


class OtherInput(Body):
    """An image or a file: declared, so that its refusal can say so."""

    type: Literal["input_image", "input_file", "input_audio"]
    detail: str | None = None
    file_id: str | None = None
    image_url: str | None = None
    file_data: str | None = None
    file_url: str | None = None
    filename: str | None = None
    input_audio: dict[str, Any] | None = None


Part = Annotated[InputText | OutputText | RefusalText | OtherInput, Field(discriminator="type")]
Content = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[Part], Tag("(parts)")],
    TEXT_OR_PARTS,
]


class MessageItem(Body):
    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: str | None = None
    status: State | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class CallItem(Body):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    """JSON, as the model wrote it."""
    id: str | None = None
    status: State | None = None


class ResultItem(Body):
    """What the function answered."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content
    id: str | None = None
    status: State | None = None


def _kind(value: Any) -> str:
    found = value.get("type") if isinstance(value, dict) else None
    return f"({found})" if found in ("function_call", "function_call_output") else "(message)"


Item = Annotated[
    Annotated[MessageItem, Tag("(message)")]
    | Annotated[CallItem, Tag("(function_call)")]
    | Annotated[ResultItem, Tag("(function_call_output)")],
    Discriminator(_kind),
]


def templated(instructions: str | None, given: str | Sequence[Item]) -> list[dict[str, Any]]:
    """Items as messages for a chat template."""
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    for index, item in enumerate(given):
        _add(messages, item, f"input[{index}]")
    if not messages:
        raise ApiError(400, "input: expected a text or items, got none", field="input")
    return messages


def _add(messages: list[dict[str, Any]], item: Item, field: str) -> None:
    if isinstance(item, MessageItem):
        role = "system" if item.role == "developer" else item.role
        messages.append({"role": role, "content": _text(item.content, field)})
    elif isinstance(item, ResultItem):
        content = _text(item.output, field)
        messages.append({"role": "tool", "content": content, "tool_call_id": item.call_id})
    else:
        # The calls of one reply are items of their own here, and one message there.
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        found = called(item.call_id, item.name, item.arguments, f"{field}.arguments")
        messages[-1].setdefault("tool_calls", []).append(found)


def _text(content: str | Sequence[Part], field: str) -> str:
    if isinstance(content, str):
        return content
    return "".join(_part_text(part, field) for part in content)


def _part_text(part: Part, field: str) -> str:
    if isinstance(part, OtherInput):
        raise unsupported(f"{field}.content", f"this model reads text alone, got {part.type}")
    return part.refusal if isinstance(part, RefusalText) else part.text
