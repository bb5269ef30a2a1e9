"""Input items of OpenAI's responses API: messages, calls and their results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag

from ..http.api_error import ApiError
from ..http.schema import Body, Echo, Ignored, OneOf, TextOrParts, UnsupportedPart, join_text
from .messages import RefusalPart, parse_call


class InputText(Body):
    type: Literal["input_text"]
    text: str
    prompt_cache_breakpoint: Ignored[dict[str, Any]] = None


class OutputText(Echo):
    """Text of an earlier reply, as this API returned it."""

    type: Literal["output_text"]
    text: str


class InputMedia(UnsupportedPart):
    type: Literal["input_image", "input_file", "input_audio"]


Content = TextOrParts[Annotated[InputText | OutputText | RefusalPart | InputMedia, OneOf("type")]]


class MessageItem(Body):
    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: Ignored[str] = None
    status: Ignored[Literal["in_progress", "completed", "incomplete"]] = None

    @classmethod
    def is_echo(cls, values: Mapping[str, Any]) -> bool:
        return values.get("role") == "assistant"


class CallItem(Echo):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    namespace: str | None = None
    arguments: str | None = None
    """JSON, as the model wrote it; none is an empty object."""


class ResultItem(Echo):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content


class ReasoningText(Echo):
    text: str = ""


class ReasoningItem(Echo):
    """The thought of an earlier reply; another model's may have no text."""

    type: Literal["reasoning"]
    content: list[ReasoningText] | None = None
    summary: list[ReasoningText] | None = None

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.content or self.summary or ())


def flat_name(namespace: str, name: str) -> str:
    """The name by which the model is told of a function in a namespace."""
    return f"{namespace.removesuffix('__')}__{name}"


def _tag(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"({kind})" if kind in _KINDS else "(message)"


_KINDS = ("function_call", "function_call_output", "reasoning")

Item = Annotated[
    Annotated[MessageItem, Tag("(message)")]
    | Annotated[CallItem, Tag("(function_call)")]
    | Annotated[ResultItem, Tag("(function_call_output)")]
    | Annotated[ReasoningItem, Tag("(reasoning)")],
    Discriminator(_tag),
]


def template_messages(
    instructions: str | None, items: str | Sequence[Item]
) -> list[dict[str, Any]]:
    """Instructions and items as messages for a chat template."""
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    if isinstance(items, str):
        return [*messages, {"role": "user", "content": items}]
    for index, item in enumerate(items):
        _add_item(messages, item, f"input[{index}]")
    if not messages:
        raise ApiError("input: expected text or items, got none", field="input")
    return messages


def _is_thought(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last message is a thought, to which no answer has come."""
    last = messages[-1] if messages else {}
    return "reasoning_content" in last and not last["content"] and "tool_calls" not in last


def _add_item(messages: list[dict[str, Any]], item: Item, field: str) -> None:
    if isinstance(item, MessageItem):
        role = "system" if item.role == "developer" else item.role
        text = join_text(item.content)
        if role == "assistant" and _is_thought(messages):
            messages[-1]["content"] = text
        else:
            messages.append({"role": role, "content": text})
    elif isinstance(item, ReasoningItem):
        if item.text:
            messages.append({"role": "assistant", "content": "", "reasoning_content": item.text})
    elif isinstance(item, ResultItem):
        content = join_text(item.output)
        messages.append({"role": "tool", "content": content, "tool_call_id": item.call_id})
    elif isinstance(item, CallItem):
        name = flat_name(item.namespace, item.name) if item.namespace else item.name
        # Each call is an item here; in a template all calls of a reply belong to its message.
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        call = parse_call(item.call_id, name, item.arguments, f"{field}.arguments")
        messages[-1].setdefault("tool_calls", []).append(call)
