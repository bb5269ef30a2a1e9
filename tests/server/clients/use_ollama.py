"""Ollama's own library."""

from __future__ import annotations

from typing import Any

from ollama import Client
from report import ASKED, JSON, QUESTION, URL, Calls, report

client = Client(host=URL)


def thinking() -> list[str]:
    message = client.chat("scripted", QUESTION, think=True).message
    return [message.thinking, message.content]


def thinking_streamed() -> list[str]:
    thought = answer = ""
    for part in client.chat("scripted", QUESTION, think=True, stream=True):
        thought += part.message.thinking or ""
        answer += part.message.content or ""
    return [thought, answer]


def use_tools(stream: bool) -> list[str]:
    calls, messages = Calls(), list[Any](ASKED)
    while True:
        asked: Any = {"model": "scripted", "messages": messages, "tools": [calls.get_weather]}
        parts = client.chat(**asked, stream=True) if stream else [client.chat(**asked)]
        thought = answer = ""
        called = list[Any]()
        for part in parts:
            thought += part.message.thinking or ""
            answer += part.message.content or ""
            called += part.message.tool_calls or []
        if not called:
            return [*calls, answer]
        messages.append(
            {"role": "assistant", "content": answer, "thinking": thought, "tool_calls": called}
        )
        for call in called:
            result = calls.get_weather(**call.function.arguments)
            messages.append({"role": "tool", "tool_name": call.function.name, "content": result})


def structure() -> Any:
    from pydantic import BaseModel

    class Person(BaseModel):
        name: str
        age: int

    asked = [{"role": "user", "content": JSON}]
    reply = client.chat("scripted", asked, format=Person.model_json_schema())
    return Person.model_validate_json(reply.message.content).model_dump()


report(
    "ollama",
    thinking=thinking,
    thinking_streamed=thinking_streamed,
    tools=lambda: use_tools(False),
    tools_streamed=lambda: use_tools(True),
    structure=structure,
)
