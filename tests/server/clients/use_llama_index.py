"""LlamaIndex with the class for each API: `openai-like`, `anthropic`, `ollama`, the second
argument."""

from __future__ import annotations

import sys
from typing import Any

from llama_index.core.agent.workflow import AgentStream, FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel
from report import JSON, PERSON, SKY, URL, WEATHER, Calls, report

KIND = sys.argv[2]


def make() -> Any:
    if KIND == "openai-like":
        from llama_index.llms.openai_like import OpenAILike

        return OpenAILike(
            model="scripted",
            api_base=f"{URL}/v1",
            api_key="none",
            is_chat_model=True,
            is_function_calling_model=True,
            context_window=100_000,
        )
    if KIND == "anthropic":
        from llama_index.llms.anthropic import Anthropic

        return Anthropic(
            model="scripted",
            base_url=URL,
            api_key="none",
            max_tokens=4000,
            temperature=1.0,
            thinking_dict={"type": "enabled", "budget_tokens": 1024},
        )
    from llama_index.llms.ollama import Ollama

    return Ollama(model="scripted", base_url=URL, thinking=True, context_window=8000)


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def parts(message: Any) -> list[str]:
    thought = "".join(
        block.content or "" for block in message.blocks if block.block_type == "thinking"
    )
    return [thought, message.content or ""]


def thinking() -> list[str]:
    return parts(make().chat([ChatMessage(SKY)]).message)


def thinking_streamed() -> list[str]:
    *_, last = make().stream_chat([ChatMessage(SKY)])
    return parts(last.message)


async def use_tools(stream: bool) -> list[str]:
    calls = Calls()
    agent = FunctionAgent(
        tools=[FunctionTool.from_defaults(calls.get_weather)], llm=make(), streaming=stream
    )
    running, answer = agent.run(WEATHER), ""
    async for event in running.stream_events():
        answer += event.delta if isinstance(event, AgentStream) else ""
    whole = (await running).response.content
    assert not stream or answer == whole, (answer, whole)
    return [*calls, whole]


def structure() -> Any:
    reply = (
        make().as_structured_llm(Person).chat([ChatMessage(JSON if KIND == "ollama" else PERSON)])
    )
    return reply.raw.model_dump()


report(
    f"llama-index-llms-{KIND}",
    thinking=thinking,
    thinking_streamed=thinking_streamed,
    tools=lambda: use_tools(False),
    tools_streamed=lambda: use_tools(True),
    structure=structure,
)
