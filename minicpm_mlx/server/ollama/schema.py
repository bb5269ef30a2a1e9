"""What Ollama's /api/generate and /api/chat are sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from ..http.api_error import Refusal, unsupported
from ..http.streaming import Body
from ..ollama_options import Options
from ..tool_calling import Tool


class Wanted(Body):
    """What both routes take."""

    model: str
    stream: bool | None = None
    """True unless it is said to be false."""
    format: str | dict[str, Any] | None = None
    """"json", or a JSON schema that the reply follows."""
    options: Options | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    keep_alive: float | str | None = None
    """Accepted without effect: the model stays."""
    truncate: bool | None = None
    """Accepted without effect: a prompt that is too long is refused, not cut."""
    shift: bool | None = None
    """Accepted without effect: a reply ends where the context does."""

    def check(self) -> None:
        """Refuse what would change the reply and cannot be honoured."""
        if self.think:
            raise unsupported("think", "this model has no thinking apart from its reply")
        if isinstance(self.format, str) and self.format not in ("", "json"):
            raise Refusal(400, 'format must be "json" or a JSON schema, got text', field="format")
        if self.top_logprobs and not self.logprobs:
            raise Refusal(
                400, "top_logprobs goes with logprobs: true; set that too", field="top_logprobs"
            )

    def guide(self) -> dict[str, Any]:
        """`format` as an argument of `grammar_of`."""
        if self.format is None or self.format == "":
            return {}
        return {"json_object": True} if self.format == "json" else {"json_schema": self.format}


class GenerateBody(Wanted):
    prompt: str | None = None
    """None or empty: only see that the model is there."""
    system: str | None = None
    raw: bool | None = None
    """The prompt goes to the model as it is."""
    context: list[int] | None = None
    """Token ids of what was said before: that of an earlier answer."""
    suffix: str | None = None
    template: str | None = None
    images: list[str] | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None

    def check(self) -> None:
        super().check()
        for name, why in (
            ("suffix", "this model does not fill gaps"),
            ("template", "the model's own is used; raw: true sends the prompt as it is"),
            ("images", "this model reads text alone"),
            ("width", "this model writes text alone"),
            ("height", "this model writes text alone"),
            ("steps", "this model writes text alone"),
        ):
            if getattr(self, name):
                raise unsupported(name, why)
        for name in ("system", "context"):
            if self.raw and getattr(self, name):
                raise unsupported(name, "raw: true leaves nothing but the prompt")
        if self.system and self.context:
            raise unsupported("system", "what was said before (context) has its own")


class Function(Body):
    name: str
    arguments: dict[str, Any]
    index: int | None = None
    """Accepted without effect."""


class Call(Body):
    id: str | None = None
    type: Literal["function"] | None = None
    function: Function


class Message(Body):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    tool_calls: list[Call] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    thinking: str | None = None
    images: list[str] | None = None


class ChatBody(Wanted):
    messages: list[Message] | None = None
    """None or empty: only see that the model is there."""
    tools: list[Tool] | None = None


def templated(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages for a chat template."""
    return [_templated(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _templated(message: Message, field: str) -> dict[str, Any]:
    if message.images:
        raise unsupported(f"{field}.images", "this model reads text alone")
    if message.thinking:
        raise unsupported(f"{field}.thinking", "this model has no thinking apart from its reply")
    found: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "id": call.id or f"call_{number}",
                "type": "function",
                "function": {"name": call.function.name, "arguments": call.function.arguments},
            }
            for number, call in enumerate(message.tool_calls)
        ]
    if message.tool_name:
        found["name"] = message.tool_name
    if message.tool_call_id:
        found["tool_call_id"] = message.tool_call_id
    return found
