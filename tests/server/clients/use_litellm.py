"""LiteLLM with the prefix for each API: `openai`, `anthropic`, `ollama_chat`, the second
argument."""

from __future__ import annotations

import json
import sys
from typing import Any

import litellm
from pydantic import BaseModel
from report import ASKED, JSON, QUESTION, TOOL, URL, Calls, report

KIND = sys.argv[2]
BASE = {"openai": f"{URL}/v1", "hosted_vllm": f"{URL}/v1"}.get(KIND, URL)
EFFORT: dict[str, Any] = {
    "openai": {},  # the names of OpenAI's own models alone take it
    "anthropic": {
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "max_tokens": 4000,
        "allowed_openai_params": ["thinking"],
    },
}
tools: Any = [{"type": "function", "function": TOOL}]


class Person(BaseModel):
    name: str
    age: int


def ask(messages: Any, **more: Any) -> Any:
    return litellm.completion(f"{KIND}/scripted", messages, api_base=BASE, api_key="none", **more)


def parts(message: Any) -> list[str]:
    return [getattr(message, "reasoning_content", None) or "", message.content]


def thinking() -> list[str]:
    effort: Any = EFFORT.get(KIND, {"reasoning_effort": "low"})
    return parts(ask(QUESTION, **effort).choices[0].message)


def thinking_streamed() -> list[str]:
    thought = answer = ""
    effort: Any = EFFORT.get(KIND, {"reasoning_effort": "low"})
    for chunk in ask(QUESTION, stream=True, **effort):
        delta = chunk.choices[0].delta
        thought += getattr(delta, "reasoning_content", None) or ""
        answer += delta.content or ""
    return [thought, answer]


def use_tools(stream: bool) -> list[str]:
    calls, messages = Calls(), list[Any](ASKED)
    while True:
        reply = ask(messages, tools=tools, stream=stream)
        if stream:
            reply = litellm.stream_chunk_builder(list(reply))
        message = reply.choices[0].message
        if not message.tool_calls:
            return [*calls, message.content]
        messages.append(message)
        for call in message.tool_calls:
            result = calls.get_weather(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})


def structure() -> Any:
    text = "Who is Ada, as json_tool_call?" if KIND == "anthropic" else JSON
    asked = [{"role": "user", "content": text}]
    reply = ask(asked, response_format=Person)
    return Person.model_validate_json(reply.choices[0].message.content).model_dump()


report(
    "litellm",
    thinking=thinking,
    thinking_streamed=thinking_streamed,
    tools=lambda: use_tools(False),
    tools_streamed=lambda: use_tools(True),
    structure=structure,
)
