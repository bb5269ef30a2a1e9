"""Anthropic's own library."""

from __future__ import annotations

from typing import Any

from anthropic import Anthropic, beta_tool
from report import ASKED, PARAMETERS, QUESTION, URL, Calls, report

client = Anthropic(base_url=URL, api_key="none", max_retries=0)
tools: Any = [{"name": "get_weather", "input_schema": PARAMETERS}]
thinks: Any = {"type": "enabled", "budget_tokens": 1024}


def blocks(message: Any) -> list[str]:
    thought, text = message.content
    return [thought.thinking, text.text]


def thinking() -> list[str]:
    asked: Any = {"model": "scripted", "max_tokens": 2000, "messages": QUESTION}
    return blocks(client.messages.create(**asked, thinking=thinks))


def thinking_streamed() -> list[str]:
    asked: Any = {"model": "scripted", "max_tokens": 2000, "messages": QUESTION}
    thought = answer = ""
    with client.messages.stream(**asked, thinking=thinks) as stream:
        for event in stream:
            thought += event.thinking if event.type == "thinking" else ""
            answer += event.text if event.type == "text" else ""
        assert blocks(stream.get_final_message()) == [thought, answer]
    return [thought, answer]


def use_tools(stream: bool) -> list[str]:
    calls, messages = Calls(), list[Any](ASKED)
    while True:
        asked: Any = {"model": "scripted", "max_tokens": 2000, "messages": messages, "tools": tools}
        if stream:
            with client.messages.stream(**asked) as events:
                reply = events.get_final_message()
        else:
            reply = client.messages.create(**asked)
        used = [block for block in reply.content if block.type == "tool_use"]
        if not used:
            return [*calls, reply.content[-1].text]
        messages.append({"role": "assistant", "content": reply.content})
        results = [
            {"type": "tool_result", "tool_use_id": b.id, "content": calls.get_weather(**b.input)}
            for b in used
        ]
        messages.append({"role": "user", "content": results})


def tool_runner() -> list[str]:
    """The library's own loop of calls."""
    calls = Calls()
    runner = client.beta.messages.tool_runner(
        model="scripted", max_tokens=2000, messages=ASKED, tools=[beta_tool(calls.get_weather)]
    )
    answer = runner.until_done().content[-1].text
    return [*calls, answer]


report(
    "anthropic",
    thinking=thinking,
    thinking_streamed=thinking_streamed,
    tools=lambda: use_tools(False),
    tools_streamed=lambda: use_tools(True),
    tool_runner=tool_runner,
)
