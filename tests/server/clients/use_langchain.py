"""LangChain with the classes for each API: `openai` (chat), `responses`, `deepseek`, `anthropic`,
`ollama`, the second argument."""

from __future__ import annotations

import sys
from typing import Any

from langchain.agents import create_agent
from langchain_core.messages import AIMessageChunk
from langchain_core.tools import tool
from pydantic import BaseModel
from report import JSON, PERSON, SKY, URL, WEATHER, Calls, report

KIND = sys.argv[2]
KEY: Any = "none"


def make() -> Any:
    if KIND == "openai":
        from langchain_openai import ChatOpenAI

        return ChatOpenAI(model="scripted", base_url=f"{URL}/v1", api_key=KEY)
    if KIND == "responses":
        from langchain_openai import ChatOpenAI

        return ChatOpenAI(
            model="scripted",
            base_url=f"{URL}/v1",
            api_key=KEY,
            use_responses_api=True,
            reasoning={"effort": "high", "summary": "auto"},
        )
    if KIND == "deepseek":
        from langchain_deepseek import ChatDeepSeek

        return ChatDeepSeek(model="scripted", api_base=f"{URL}/v1", api_key=KEY)
    if KIND == "anthropic":
        from langchain_anthropic import ChatAnthropic

        return ChatAnthropic(
            model="scripted",
            base_url=URL,
            api_key=KEY,
            max_tokens=4000,
            thinking={"type": "enabled", "budget_tokens": 1024},
        )
    from langchain_ollama import ChatOllama

    return ChatOllama(model="scripted", base_url=URL, reasoning=True)


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def parts(message: Any) -> list[str]:
    thought = "".join(
        block.get("reasoning", "")
        for block in message.content_blocks
        if block["type"] == "reasoning"
    )
    return [thought, message.text]


def thinking() -> list[str]:
    return parts(make().invoke(SKY))


def thinking_streamed() -> list[str]:
    whole: Any = None
    for chunk in make().stream(SKY):
        whole = chunk if whole is None else whole + chunk
    return parts(whole)


def agent(calls: Calls) -> Any:
    return create_agent(make(), [tool(calls.get_weather)])


def tools() -> list[str]:
    calls = Calls()
    asked: Any = {"messages": [("user", WEATHER)]}
    answer = agent(calls).invoke(asked)["messages"][-1].text
    return [*calls, answer]


def tools_streamed() -> list[str]:
    calls, answer = Calls(), ""
    asked: Any = {"messages": [("user", WEATHER)]}
    for message, _ in agent(calls).stream(asked, stream_mode="messages"):
        answer += message.text if isinstance(message, AIMessageChunk) else ""
    return [*calls, answer]


def structure() -> Any:
    model = make().with_structured_output(Person, method="json_schema")
    # DeepSeek's own has no schemas, so its class uses a call.
    return model.invoke(PERSON if KIND == "deepseek" else JSON).model_dump()


def structure_by_call() -> Any:
    model = make().with_structured_output(Person, method="function_calling")
    return model.invoke(PERSON).model_dump()


def structure_with_tools() -> Any:
    """A form of the answer, beside tools."""
    from langchain.agents.structured_output import ProviderStrategy

    calls = Calls()
    one = create_agent(make(), [tool(calls.get_weather)], response_format=ProviderStrategy(Person))
    return one.invoke({"messages": [("user", JSON)]})["structured_response"].model_dump()


PACKAGES = {"responses": "langchain-openai"}
report(
    PACKAGES.get(KIND, f"langchain-{KIND}"),
    thinking=thinking,
    thinking_streamed=thinking_streamed,
    tools=tools,
    tools_streamed=tools_streamed,
    structure=structure,
    structure_by_call=structure_by_call,
    structure_with_tools=structure_with_tools,
)
