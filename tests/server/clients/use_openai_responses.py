"""OpenAI's own library: responses."""

from __future__ import annotations

import json
from typing import Any

from openai import OpenAI
from pydantic import BaseModel
from report import ASKED, JSON, SKY, TOOL, URL, Calls, report

client = OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
tools: Any = [{"type": "function", "strict": False, **TOOL}]


class Person(BaseModel):
    name: str
    age: int


def thinking() -> list[str]:
    reply = client.responses.create(model="scripted", input=SKY, reasoning={"effort": "high"})
    return [reply.output[0].content[0].text, reply.output_text]


def thinking_streamed() -> list[str]:
    thought = answer = ""
    for event in client.responses.create(model="scripted", input=SKY, stream=True):
        if event.type == "response.reasoning_text.delta":
            thought += event.delta
        elif event.type == "response.output_text.delta":
            answer += event.delta
    return [thought, answer]


def use_tools(stream: bool) -> list[str]:
    calls, items = Calls(), list[Any](ASKED)
    while True:
        if stream:
            with client.responses.stream(model="scripted", input=items, tools=tools) as events:
                reply = events.get_final_response()
        else:
            reply = client.responses.create(model="scripted", input=items, tools=tools)
        called = [item for item in reply.output if item.type == "function_call"]
        if not called:
            return [*calls, reply.output_text]
        items += reply.output
        for call in called:
            output = calls.get_weather(**json.loads(call.arguments))
            items.append(
                {"type": "function_call_output", "call_id": call.call_id, "output": output}
            )


def structure() -> Any:
    return client.responses.parse(
        model="scripted", input=JSON, text_format=Person
    ).output_parsed.model_dump()


report(
    "openai",
    thinking=thinking,
    thinking_streamed=thinking_streamed,
    tools=lambda: use_tools(False),
    tools_streamed=lambda: use_tools(True),
    structure=structure,
)
