"""Calls that the APIs stream while the model writes them; whole replies have the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from support.apis import TOOL_TEMPLATE, sse
from support.calls import as_json, as_xml
from support.scripted_model import SPECIAL, TEMPLATE, scripted_lm
from support.serving import Live, serving

GIVEN = {"path": "a.py", "text": "if a < b:\n  c[0] = '</tool_call>'", "mode": 6}
SCHEMA = {
    "type": "object",
    "properties": {
        "path": {"type": "string"},
        "text": {"type": "string"},
        "mode": {"type": "integer"},
    },
    "required": ["path", "text", "mode"],
}
Run = tuple[Live, int]
"""The server, and the tokens of a reply that ends within the text."""


@pytest.fixture(scope="module", params=["json", "xml"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    pytest.importorskip("fastapi")
    pytest.importorskip("llguidance")
    template, write = {"json": (TOOL_TEMPLATE, as_json), "xml": (TEMPLATE, as_xml)}[request.param]
    special = SPECIAL if request.param == "xml" else ("<|im_start|>", "<|im_end|>")
    call = write([("write", GIVEN)])
    script = {"save": call, "botch": write([("right", {"path": 1, "mode": "x"})])}
    lm = scripted_lm(tmp_path_factory.mktemp("calls") / "m", script, template, special)
    until = call[: call.index("< b")]
    with serving(lm) as live:
        yield live, len(lm.tokenizer.encode(until, add_bos=False))


def post(live: Live, path: str, body: dict[str, Any]) -> Any:
    answer = live.ask("POST", path, {"model": "m", **body})
    assert answer.status == 200, answer.body
    return answer


MESSAGES = [{"role": "user", "content": "save"}]


def test_chat_streams_arguments_as_they_are_written(run: Run) -> None:
    live, cut = run
    tool = {"type": "function", "function": {"name": "write", "parameters": SCHEMA}}
    body: dict[str, Any] = {"messages": MESSAGES, "tools": [tool], "tool_choice": "required"}
    for limit, reason in ((400, "tool_calls"), (cut, "length")):
        asked = body | {"max_tokens": limit, "parallel_tool_calls": False}
        [choice] = post(live, "/v1/chat/completions", asked).json["choices"]
        [call] = choice["message"]["tool_calls"]
        chunks = sse(post(live, "/v1/chat/completions", asked | {"stream": True}).body)
        deltas = [
            call
            for chunk in chunks
            for choice in chunk["choices"]
            for call in choice["delta"].get("tool_calls", ())
        ]
        assert deltas[0]["function"] == {"name": "write", "arguments": ""}
        assert len(deltas) > 10
        joined = "".join(delta["function"]["arguments"] for delta in deltas)
        assert joined == call["function"]["arguments"]
        reasons = chunks[-1]["choices"][0]["finish_reason"], choice["finish_reason"]
        assert reasons == (reason, reason)
        assert json.dumps(GIVEN).startswith(joined)
        assert (joined == json.dumps(GIVEN)) == (reason == "tool_calls")


def test_calls_of_strict_tools_are_streamed_as_they_are_written(run: Run) -> None:
    live, _ = run
    function = {"name": "write", "parameters": SCHEMA, "strict": True}
    tool = {"type": "function", "function": function}
    body = {"messages": MESSAGES, "tools": [tool], "stream": True}
    chunks = sse(post(live, "/v1/chat/completions", body).body)
    parts = [
        call["function"]["arguments"]
        for chunk in chunks
        for choice in chunk["choices"]
        for call in choice["delta"].get("tool_calls", ())
    ]
    assert len(parts) > 10
    assert json.loads("".join(parts)) == GIVEN


def test_a_call_is_valid_where_a_special_token_opens_it(run: Run) -> None:
    live, _ = run
    schema = {**SCHEMA, "properties": {**SCHEMA["properties"], "text": {"const": "x"}}}
    tool = {"type": "function", "function": {"name": "write", "parameters": schema}}
    messages = [{"role": "user", "content": "botch"}]
    body: dict[str, Any] = {"messages": messages, "tools": [tool], "max_tokens": 200}
    more: list[dict[str, Any]] = [{"n": 2}, {"ignore_eos": True}, {"parallel_tool_calls": False}]
    for extra in more:
        choices = post(live, "/v1/chat/completions", body | extra).json["choices"]
        assert len(choices) == extra.get("n", 1)
        for message in (choice["message"] for choice in choices):
            if "<function" not in live.service.lm.tokenizer.special_tokens:
                assert '"right"' in message["content"]
                continue
            [call] = message["tool_calls"]
            given = json.loads(call["function"]["arguments"])
            assert (given["text"], type(given["mode"])) == ("x", int)


def test_responses_stream_arguments_as_they_are_written(run: Run) -> None:
    live, cut = run
    tool = {"type": "function", "name": "write", "parameters": SCHEMA}
    body: dict[str, Any] = {"input": "save", "tools": [tool], "tool_choice": "required"}
    for limit, status in ((400, "completed"), (cut, "incomplete")):
        asked = body | {"max_output_tokens": limit, "parallel_tool_calls": False}
        [call] = post(live, "/v1/responses", asked).json["output"]
        events = sse(post(live, "/v1/responses", asked | {"stream": True}).body)
        deltas = [one["delta"] for one in events if one["type"].endswith("arguments.delta")]
        assert "".join(deltas) == call["arguments"]
        [done] = [one for one in events if one["type"] == "response.output_item.done"]
        same = {key: call[key] for key in ("status", "name", "arguments")}
        assert same == {key: done["item"][key] for key in same}
        assert call["status"] == status == events[-1]["response"]["status"]


def test_messages_stream_arguments_as_they_are_written(run: Run) -> None:
    live, cut = run
    choice = {"type": "any", "disable_parallel_tool_use": True}
    body: dict[str, Any] = {"messages": MESSAGES, "tool_choice": choice}
    body["tools"] = [{"name": "write", "input_schema": SCHEMA}]
    for limit, reason in ((400, "tool_use"), (cut, "max_tokens")):
        asked = body | {"max_tokens": limit}
        whole = post(live, "/v1/messages", asked).json
        [call] = whole["content"]
        events = sse(post(live, "/v1/messages", asked | {"stream": True}).body)
        deltas = [
            one["delta"]["partial_json"] for one in events if one["type"] == "content_block_delta"
        ]
        assert len(deltas) > 10
        joined = "".join(deltas)
        assert json.dumps(GIVEN).startswith(joined)
        expected = GIVEN if reason == "tool_use" else {"path": "a.py"}
        assert (call["input"], whole["stop_reason"]) == (expected, reason)
        assert [one["type"] for one in events[-3:]] == [
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
        assert events[-2]["delta"]["stop_reason"] == reason
