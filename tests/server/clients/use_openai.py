"""OpenAI's own library: chat completions."""

from __future__ import annotations

import json
from typing import Any

from openai import OpenAI
from pydantic import BaseModel
from report import ASKED, JSON, QUESTION, TOOL, URL, Calls, report

client = OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
chat = client.chat.completions
tools: Any = [{"type": "function", "function": TOOL}]


class Person(BaseModel):
    name: str
    age: int


def thinking() -> list[str]:
    message = (
        chat.create(model="scripted", messages=QUESTION, reasoning_effort="high").choices[0].message
    )
    return [message.reasoning_content, message.content]


def thinking_streamed() -> list[str]:
    thought = answer = ""
    for chunk in chat.create(model="scripted", messages=QUESTION, stream=True):
        delta = chunk.choices[0].delta
        thought += getattr(delta, "reasoning_content", None) or ""
        answer += delta.content or ""
    return [thought, answer]


def use_tools(stream: bool) -> list[str]:
    calls, messages = Calls(), list(ASKED)
    while True:
        if stream:
            with chat.stream(model="scripted", messages=messages, tools=tools) as events:
                message = events.get_final_completion().choices[0].message
        else:
            message = (
                chat.create(model="scripted", messages=messages, tools=tools).choices[0].message
            )
        if not message.tool_calls:
            return [*calls, message.content]
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls:
            result = calls.get_weather(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})


def structure() -> Any:
    asked = [{"role": "user", "content": JSON}]
    reply = chat.parse(model="scripted", messages=asked, response_format=Person)
    return reply.choices[0].message.parsed.model_dump()


report(
    "openai",
    thinking=thinking,
    thinking_streamed=thinking_streamed,
    tools=lambda: use_tools(False),
    tools_streamed=lambda: use_tools(True),
    structure=structure,
)
