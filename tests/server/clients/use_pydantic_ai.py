"""Pydantic AI with the model class for each API: `chat`, `responses`, `anthropic`, `ollama`, the
second argument."""

from __future__ import annotations

import sys
from typing import Any

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, Tool
from pydantic_ai.messages import PartDeltaEvent, PartStartEvent, ThinkingPart, ThinkingPartDelta
from report import JSON, SKY, URL, WEATHER, Calls, report

KIND = sys.argv[2]


def make() -> Any:
    if KIND == "anthropic":
        from anthropic import AsyncAnthropic
        from pydantic_ai.models.anthropic import AnthropicModel
        from pydantic_ai.providers.anthropic import AnthropicProvider

        client = AsyncAnthropic(base_url=URL, api_key="none")
        return AnthropicModel("scripted", provider=AnthropicProvider(anthropic_client=client))
    if KIND == "ollama":
        from pydantic_ai.models.ollama import OllamaModel
        from pydantic_ai.providers.ollama import OllamaProvider

        return OllamaModel("scripted", provider=OllamaProvider(base_url=f"{URL}/v1"))
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{URL}/v1", api_key="none")
    if KIND == "chat":
        return OpenAIChatModel("scripted", provider=provider)
    settings: Any = {"openai_reasoning_effort": "high", "openai_reasoning_summary": "auto"}
    return OpenAIResponsesModel("scripted", provider=provider, settings=settings)


class Person(BaseModel):
    name: str
    age: int


def thinking() -> list[str]:
    run = Agent(make()).run_sync(SKY)
    thought = "".join(
        part.content
        for message in run.all_messages()
        for part in message.parts
        if isinstance(part, ThinkingPart)
    )
    return [thought, run.output]


async def thinking_streamed() -> list[str]:
    thought = ""
    async with Agent(make()).iter(SKY) as run:
        async for node in run:
            if Agent.is_model_request_node(node):
                async with node.stream(run.ctx) as events:
                    async for event in events:
                        if isinstance(event, PartStartEvent):
                            if isinstance(event.part, ThinkingPart):
                                thought += event.part.content
                        elif isinstance(event, PartDeltaEvent) and isinstance(
                            event.delta, ThinkingPartDelta
                        ):
                            thought += event.delta.content_delta or ""
    return [thought, run.result.output]


def tools() -> list[str]:
    calls = Calls()
    answer = Agent(make(), tools=[Tool(calls.get_weather)]).run_sync(WEATHER).output
    return [*calls, answer]


async def tools_streamed() -> list[str]:
    calls, answer = Calls(), ""
    async with Agent(make(), tools=[Tool(calls.get_weather)]).run_stream(WEATHER) as run:
        async for text in run.stream_text(delta=True):
            answer += text
    return [*calls, answer]


def structure() -> Any:
    """A tool holds the output."""
    agent = Agent(make(), output_type=Person)
    return agent.run_sync("Who is Ada, as final_result?").output.model_dump()


def structure_native() -> Any:
    return Agent(make(), output_type=NativeOutput(Person)).run_sync(JSON).output.model_dump()


def structure_with_tools() -> Any:
    """A form of the answer, beside tools."""
    calls = Calls()
    agent = Agent(make(), output_type=NativeOutput(Person), tools=[Tool(calls.get_weather)])
    return agent.run_sync(JSON).output.model_dump()


report(
    "pydantic-ai-slim",
    thinking=thinking,
    thinking_streamed=thinking_streamed,
    tools=tools,
    tools_streamed=tools_streamed,
    structure=structure,
    structure_native=structure_native,
    structure_with_tools=structure_with_tools,
)
