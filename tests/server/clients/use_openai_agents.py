"""OpenAI Agents with the model class for each API: `chat`, `responses`, the second argument."""

from __future__ import annotations

import sys
from typing import Any

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from openai.types.shared import Reasoning
from pydantic import BaseModel
from report import JSON, SKY, URL, WEATHER, Calls, report

set_tracing_disabled(True)
KIND = sys.argv[2]


class Person(BaseModel):
    name: str
    age: int


def agent(**more: Any) -> Any:
    client = AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
    kind: Any = OpenAIChatCompletionsModel if KIND == "chat" else OpenAIResponsesModel
    settings = ModelSettings(
        reasoning=Reasoning(effort="high", summary=None if KIND == "chat" else "auto")
    )
    model = kind("scripted", openai_client=client)
    return Agent(name="a", model=model, model_settings=settings, **more)


def thought_of(items: Any) -> str:
    found = [item.raw_item for item in items if item.type == "reasoning_item"]
    parts = [part for item in found for part in item.summary or item.content or ()]
    return "".join(part.text for part in parts)


async def thinking() -> list[str]:
    result = await Runner.run(agent(), SKY)
    return [thought_of(result.new_items), result.final_output]


async def thinking_streamed() -> list[str]:
    thought = answer = ""
    result = Runner.run_streamed(agent(), SKY)
    async for event in result.stream_events():
        if event.type == "raw_response_event":
            kind = event.data.type
            if kind in (
                "response.reasoning_summary_text.delta",
                "response.reasoning_text.delta",
            ):
                thought += event.data.delta
            answer += event.data.delta if kind == "response.output_text.delta" else ""
    assert [thought_of(result.new_items), result.final_output] == [thought, answer], (
        thought,
        answer,
    )
    return [thought, answer]


async def tools() -> list[str]:
    calls = Calls()
    result = await Runner.run(agent(tools=[function_tool(calls.get_weather)]), WEATHER)
    return [*calls, result.final_output]


async def tools_streamed() -> list[str]:
    calls = Calls()
    result = Runner.run_streamed(agent(tools=[function_tool(calls.get_weather)]), WEATHER)
    async for _ in result.stream_events():
        pass
    return [*calls, result.final_output]


async def structure() -> Any:
    return (await Runner.run(agent(output_type=Person), JSON)).final_output.model_dump()


async def structure_with_tools() -> Any:
    calls = Calls()
    one = agent(output_type=Person, tools=[function_tool(calls.get_weather)])
    return (await Runner.run(one, JSON)).final_output.model_dump()


report(
    "openai-agents",
    thinking=thinking,
    thinking_streamed=thinking_streamed,
    tools=tools,
    tools_streamed=tools_streamed,
    structure=structure,
    structure_with_tools=structure_with_tools,
)
