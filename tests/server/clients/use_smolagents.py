"""smolagents: a ToolCallingAgent, and a CodeAgent whose calls are Python in the answer."""

from __future__ import annotations

from typing import Any

from report import SKY, URL, Calls, report
from smolagents import ChatMessage, CodeAgent, OpenAIModel, ToolCallingAgent, tool
from smolagents.models import agglomerate_stream_deltas


def make() -> Any:
    return OpenAIModel("scripted", api_base=f"{URL}/v1", api_key="none")


def asked(text: str) -> Any:
    return [ChatMessage(role="user", content=[{"type": "text", "text": text}])]


def thinking() -> list[str]:
    reply = make().generate(asked(SKY))
    return [reply.raw.choices[0].message.reasoning_content, reply.content]


def thinking_streamed() -> list[str]:
    whole = agglomerate_stream_deltas(list(make().generate_stream(asked(SKY))))
    return [getattr(whole, "reasoning_content", ""), whole.content]


def use_tools(kind: Any, stream: bool, question: str = "What is the weather in Rome?") -> list[str]:
    calls = Calls()

    @tool
    def get_weather(city: str) -> str:
        """Looks up the weather.

        Args:
            city: The name of the city.
        """
        return calls.get_weather(city)

    agent = kind([get_weather], make(), max_steps=3, stream_outputs=stream)
    answer = agent.run(question)
    return [*calls, answer]


def code() -> list[str]:
    return use_tools(CodeAgent, False, "What is the weather in Oslo?")


report(
    "smolagents",
    thinking=thinking,
    thinking_streamed=thinking_streamed,
    tools=lambda: use_tools(ToolCallingAgent, False),
    tools_streamed=lambda: use_tools(ToolCallingAgent, True),
    code=code,
)
