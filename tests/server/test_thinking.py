"""Thoughts over HTTP: apart from answers in each API, streamed as whole, with their switches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from support.apis import sse
from support.scripted_model import scripted_lm
from support.serving import Live, serving

THOUGHT, ANSWER = "Rain?\n\nI look: no function", "It is **dry**."
SCRIPT = {
    "weather": f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}",
    "call": '<think>\nI may call <function name="f">.\n</think>\n\n<function name="look">'
    '<param name="place">Paris</param></function>',
    "town": '<function name="mcp__town__look"><param name="place">Paris</param></function>',
    "json": '<think>\nAn object.\n</think>\n\n{"a": 1}',
    "endless": "<think>\n" + "on and on " * 30,
}
LOOK = {
    "name": "look",
    "parameters": {
        "type": "object",
        "properties": {"place": {"type": "string"}},
        "required": ["place"],
    },
}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    pytest.importorskip("fastapi")
    with serving(scripted_lm(tmp_path_factory.mktemp("scripted") / "thinker", SCRIPT)) as live:
        yield live


def asked(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


def post(live: Live, path: str, **body: Any) -> Any:
    answer = live.ask("POST", path, {"model": "thinker", **body})
    assert answer.status == 200, answer.body
    return answer


def chat(live: Live, text: str, **body: Any) -> tuple[str | None, str | None, dict[str, Any]]:
    """Thought, answer and the whole reply of the chat API, which a stream gives alike."""
    whole = post(live, "/v1/chat/completions", **asked(text), **body).json
    message = whole["choices"][0]["message"]
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = sse(post(live, "/v1/chat/completions", **asked(text), **body, **stream).body)
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert (
        chunks[-1]["usage"]["completion_tokens_details"]
        == (whole["usage"]["completion_tokens_details"])
    )
    for name in ("reasoning_content", "content"):
        joined = "".join(delta.get(name) or "" for delta in deltas)
        assert joined == (message.get(name) or ""), name
    return message.get("reasoning_content"), message["content"], whole


@pytest.mark.parametrize(
    "switch",
    [
        {},
        {"reasoning_effort": "high"},
        {"chat_template_kwargs": {"enable_thinking": True}},
        {"thinking_token_budget": 200, "reasoning_effort": "low"},
    ],
)
def test_the_chat_api_gives_the_thought_apart(live: Live, switch: dict[str, Any]) -> None:
    thought, answer, whole = chat(live, "weather", **switch)
    assert (thought, answer) == (THOUGHT, ANSWER)
    counted = whole["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert len(THOUGHT) < counted < whole["usage"]["completion_tokens"]


@pytest.mark.parametrize(
    "switch", [{"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}]
)
def test_the_chat_api_switches_thinking_off(live: Live, switch: dict[str, Any]) -> None:
    thought, answer, whole = chat(live, "weather", **switch)
    assert (thought, answer) == (None, ANSWER)
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}


def test_a_wrong_switch_of_the_template_is_named(live: Live) -> None:
    wrong = {"chat_template_kwargs": {"enable_thinking": "yes"}}
    path, body = "/v1/chat/completions", {"model": "thinker", **asked("weather"), **wrong}
    assert live.ask("POST", path, body).json["error"]["param"] == "chat_template_kwargs"


def test_a_budget_ends_the_thought_and_a_limit_within_it_says_length(live: Live) -> None:
    thought, answer, _ = chat(live, "weather", thinking_token_budget=5, reasoning_effort="high")
    assert (thought, answer) == (THOUGHT[:5], ANSWER)
    thought, answer, whole = chat(live, "endless", max_tokens=30)
    assert thought
    assert (answer, whole["choices"][0]["finish_reason"]) == ("", "length")


def test_a_form_and_log_probabilities_are_the_answer_s(live: Live) -> None:
    form = {"response_format": {"type": "json_object"}}
    thought, answer, whole = chat(live, "json", logprobs=True, **form)
    assert (thought, answer) == ("An object.", '{"a": 1}')
    tokens = [entry["token"] for entry in whole["choices"][0]["logprobs"]["content"]]
    assert "".join(tokens).strip() == answer


def test_several_replies_think_each_for_itself(live: Live) -> None:
    whole = post(live, "/v1/chat/completions", **asked("weather"), n=3).json
    for choice in whole["choices"]:
        assert choice["message"]["reasoning_content"] == THOUGHT
        assert choice["message"]["content"] == ANSWER


def test_sglang_s_field_leaves_the_thought_in_the_content(live: Live) -> None:
    thought, answer, _ = chat(live, "weather", separate_reasoning=False)
    assert thought is None
    assert answer == f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_call_comes_after_the_thought_and_never_from_it(live: Live, choice: str) -> None:
    tools = {"tools": [{"type": "function", "function": LOOK}], "tool_choice": choice}
    thought, answer, whole = chat(live, "call", **tools)
    assert thought == 'I may call <function name="f">.'
    assert answer is None
    [call] = whole["choices"][0]["message"]["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == (
        "look",
        {"place": "Paris"},
    )


FORM = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize("api", ["chat", "responses", "anthropic", "ollama"])
def test_beside_a_form_calls_may_come_instead(live: Live, api: str) -> None:
    """As agents with typed answers ask: a call, or an answer of the form, each after a thought."""
    described = {"name": "json_schema", "schema": FORM}
    tools: list[dict[str, Any]] = [{"type": "function", "function": LOOK}]

    def ask(text: str) -> str:
        body = asked(text)
        if api == "chat":
            form = {"type": "json_schema", "json_schema": described}
            reply = post(
                live, "/v1/chat/completions", **body, tools=tools, response_format=form
            ).json["choices"][0]["message"]
            return str(reply["content"] or reply["tool_calls"][0]["function"]["arguments"])
        if api == "responses":
            flat = [{"type": "function", **LOOK}]
            form = {"format": {"type": "json_schema", **described}}
            item = post(live, "/v1/responses", input=text, tools=flat, text=form).json["output"][-1]
            return str(item["content"][0]["text"] if "content" in item else item["arguments"])
        if api == "anthropic":
            body |= {"output_config": {"format": {"type": "json_schema", "schema": FORM}}}
            body["tools"] = [{"name": "look", "input_schema": LOOK["parameters"]}]
            block = post(live, "/v1/messages", **body, max_tokens=900).json["content"][-1]
            return str(block["text"] if "text" in block else json.dumps(block["input"]))
        whole = post(live, "/api/chat", **body, tools=tools, format=FORM, stream=False).json
        message = whole["message"]
        called = message.get("tool_calls") or [{"function": {"arguments": None}}]
        return str(message["content"] or json.dumps(called[0]["function"]["arguments"]))

    assert json.loads(ask("json")) == {"a": 1}
    assert json.loads(ask("call")) == {"place": "Paris"}


def test_earlier_thoughts_go_to_the_template(live: Live) -> None:
    """Within a turn of calls it shows them, and after the next question not."""
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    turn: list[dict[str, Any]] = [
        {"role": "user", "content": "weather"},
        {"role": "assistant", "content": "", "reasoning_content": "deep", "tool_calls": [call]},
        {"role": "tool", "content": "dry", "tool_call_id": "c"},
    ]

    def prompt(messages: Sequence[dict[str, Any]]) -> str:
        tokens = post(live, "/tokenize", messages=messages).json["tokens"]
        return str(post(live, "/detokenize", tokens=tokens).json["prompt"])

    assert "<think>\ndeep\n</think>" in prompt(turn)
    assert "deep" not in prompt([*turn, {"role": "user", "content": "And?"}])
    turn[1]["reasoning"] = turn[1].pop("reasoning_content")
    assert "<think>\ndeep\n</think>" in prompt(turn)


def test_the_responses_api_has_reasoning_items(live: Live) -> None:
    body = {"input": "weather", "reasoning": {"effort": "medium"}}
    whole = post(live, "/v1/responses", **body).json
    thought, message = whole["output"]
    assert thought["type"] == "reasoning"
    assert thought["content"] == [{"type": "reasoning_text", "text": THOUGHT}]
    assert message["content"][0]["text"] == ANSWER
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] > len(THOUGHT)
    events = sse(post(live, "/v1/responses", **body, stream=True).body)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for name, text in (("reasoning_text", THOUGHT), ("output_text", ANSWER)):
        deltas = [e["delta"] for e in events if e["type"] == f"response.{name}.delta"]
        assert "".join(deltas) == text
        [done] = [e for e in events if e["type"] == f"response.{name}.done"]
        assert done["text"] == text
    streamed = events[-1]["response"]["output"]
    assert [item | {"id": ""} for item in streamed] == [i | {"id": ""} for i in whole["output"]]
    later = [*whole["output"], {"role": "user", "content": "json"}]
    assert post(live, "/v1/responses", input=later).json["output"][-1]["content"][0]["text"]


def test_a_summary_that_is_asked_for_is_the_thought(live: Live) -> None:
    body = {"input": "weather", "reasoning": {"summary": "auto"}}
    whole = post(live, "/v1/responses", **body).json
    thought, _ = whole["output"]
    assert thought["summary"] == [{"type": "summary_text", "text": THOUGHT}]
    assert thought["content"] == []
    assert whole["reasoning"]["summary"] == "auto"
    events = sse(post(live, "/v1/responses", **body, stream=True).body)
    of_summary = [event for event in events if "summary_index" in event]
    deltas = [event for event in of_summary if event["type"].endswith("text.delta")]
    assert "".join(event["delta"] for event in deltas) == THOUGHT
    assert [event["type"] for event in of_summary if event not in deltas] == [
        "response.reasoning_summary_part.added",
        "response.reasoning_summary_text.done",
        "response.reasoning_summary_part.done",
    ]
    streamed = events[-1]["response"]["output"]
    assert [item | {"id": ""} for item in streamed] == [i | {"id": ""} for i in whole["output"]]
    plain = post(live, "/v1/responses", input="weather", reasoning={"summary": "none"}).json
    assert plain["output"][0]["content"][0]["text"] == THOUGHT


def test_anthropic_s_client_learns_that_no_thread_is_kept(live: Live) -> None:
    """Its tool runner sends `thread` first, and again without it after this very error."""
    body = asked("weather") | {"model": "thinker", "max_tokens": 9, "thread": {"type": "create"}}
    answer = live.ask("POST", "/v1/messages", body)
    assert answer.status == 400
    assert answer.json["error"]["details"]["error_code"] == "thread_unsupported_request"
    assert "thread" in answer.json["error"]["message"]


def test_anthropic_s_api_has_thinking_blocks(live: Live) -> None:
    body = asked("weather") | {"max_tokens": 500}
    body["thinking"] = {"type": "enabled", "budget_tokens": 300}
    whole = post(live, "/v1/messages", **body).json
    assert whole["content"] == [
        {"type": "thinking", "thinking": THOUGHT, "signature": ""},
        {"type": "text", "text": ANSWER},
    ]
    events = sse(post(live, "/v1/messages", **body, stream=True).body)
    blocks: list[dict[str, Any]] = []
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(dict(event["content_block"]))
        elif event["type"] == "content_block_delta":
            kind = event["delta"]["type"].removesuffix("_delta")
            blocks[event["index"]][kind] += event["delta"][kind]
    assert blocks == whole["content"]
    body["thinking"] = {"type": "disabled"}
    assert post(live, "/v1/messages", **body).json["content"] == [{"type": "text", "text": ANSWER}]
    turn = [*body["messages"], {"role": "assistant", "content": whole["content"]}]
    later = [*turn, {"role": "user", "content": "weather"}]
    assert post(live, "/v1/messages", **body | {"messages": later}).json["content"][-1]["text"]
    cut = post(live, "/v1/messages", **asked("endless"), max_tokens=20).json
    assert [block["type"] for block in cut["content"]] == ["thinking", "text"]
    assert cut["stop_reason"] == "max_tokens"


def test_anthropic_s_api_takes_what_claude_code_always_sends(live: Live) -> None:
    body = asked("weather") | {"max_tokens": 500, "thinking": {"type": "adaptive"}}
    body["context_management"] = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    body["messages"] += [{"role": "system", "content": "Skills: none."}]
    blocks = post(live, "/v1/messages", **body, output_config={"effort": "high"}).json["content"]
    assert [block["type"] for block in blocks] == ["thinking", "text"]
    body |= asked("endless") | {"max_tokens": 1000}
    bounded = post(live, "/v1/messages", **body, output_config={"effort": "low"}).json
    body["thinking"] = {"type": "adaptive", "budget_tokens": 512}
    assert post(live, "/v1/messages", **body).json["content"] == bounded["content"]


CODEX = {
    "client_metadata": {"session_id": "s"},
    "tools": [
        {"type": "function", "strict": False, **LOOK},
        {
            "type": "namespace",
            "name": "mcp__town",
            "description": "Towns.",
            "tools": [{"type": "function", "defer_loading": True, **LOOK}],
        },
        {"type": "web_search", "external_web_access": True},
    ],
}


@pytest.mark.parametrize("choice", ["auto", {"type": "function", "name": "mcp__town__look"}])
def test_the_responses_api_takes_codex_s_tools(live: Live, choice: object) -> None:
    asked = {"input": [{"role": "user", "content": "town"}], **CODEX, "tool_choice": choice}
    whole = post(live, "/v1/responses", **asked).json
    assert [tool["type"] for tool in whole["tools"]] == ["function", "namespace"]
    [call] = [item for item in whole["output"] if item["type"] == "function_call"]
    assert (call["namespace"], call["name"]) == ("mcp__town", "look")
    events = sse(post(live, "/v1/responses", **asked, stream=True).body)
    items = [event["item"] for event in events if "item" in event]
    assert {item["namespace"] for item in items if "name" in item} == {"mcp__town"}
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "weather"}
    asked |= {"input": [*asked["input"], call, result], "tool_choice": "auto"}
    again = post(live, "/v1/responses", **asked).json
    assert again["output"][-1]["content"][0]["text"] == ANSWER


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tools": [{"type": "mcp", "server_url": "http://h"}]}, "tools[0]: expected type"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tools": [*CODEX["tools"], {**LOOK, "type": "function", "name": "mcp__town__look"}]}, ""),
        ({"tools": [CODEX["tools"][1] | {"name": "n" * 126}]}, "too long together"),
        ({"tools": [CODEX["tools"][1] | {"tools": CODEX["tools"][:1] * 128}] * 2}, "at most 128"),
        ({"tools": [CODEX["tools"][1] | {"tools": CODEX["tools"][1:2]}]}, "tools[0].tools[0]"),
    ],
)
def test_tools_that_cannot_be_left_out_are_refused(
    live: Live, change: dict[str, Any], problem: str
) -> None:
    answer = live.ask("POST", "/v1/responses", {"input": "town", **CODEX, **change})
    assert answer.status == 400
    assert problem in answer.json["error"]["message"]


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
@pytest.mark.parametrize(
    ("think", "thinks"), [(True, True), (False, False), ("low", True), (None, True)]
)
def test_ollama_s_api_has_a_field_for_it(
    live: Live, path: str, think: object, thinks: bool
) -> None:
    body = {"think": think} | ({"prompt": "weather"} if "gen" in path else asked("weather"))

    def read(line: dict[str, Any]) -> tuple[str, str]:
        place = line.get("message", line)
        return place.get("thinking", ""), place.get("content", place.get("response"))

    whole = read(post(live, path, **body, stream=False).json)
    assert whole == (THOUGHT if thinks else "", ANSWER)
    lines = [json.loads(line) for line in post(live, path, **body).body.splitlines()]
    thoughts, answers = zip(*map(read, lines), strict=True)
    assert ("".join(thoughts), "".join(answers)) == whole


def test_ollama_says_that_it_can(live: Live) -> None:
    shown = post(live, "/api/show").json
    assert set(shown["capabilities"]) == {"completion", "tools", "thinking"}
    message = {"role": "assistant", "content": "", "thinking": "deep"}
    turn = [*asked("weather")["messages"], message]
    assert post(live, "/api/chat", messages=turn, stream=False).json["message"]["content"] == ANSWER


def test_many_at_once_are_each_their_own(live: Live) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def one(number: int) -> Any:
        body: Callable[..., Any] = asked
        extra = {"reasoning_effort": ["none", "high", "minimal"][number % 3]}
        whole = post(live, "/v1/chat/completions", **body("weather"), **extra).json
        message = whole["choices"][0]["message"]
        return message.get("reasoning_content"), message["content"]

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(one, range(12)))
    assert found == [(None if i % 3 == 0 else THOUGHT, ANSWER) for i in range(12)]
