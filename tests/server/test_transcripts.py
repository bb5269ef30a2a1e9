"""What each API sends, byte for byte, for conversations of every kind, whole and streamed.

The transcripts are in tests/data/transcripts, one file for each API. To write them anew:
`WRITE_TRANSCRIPTS=1 pytest tests/server/test_transcripts.py`, and review the difference.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from support.scripted_model import scripted_lm
from support.serving import Answer, Live, serving
from support.transcripts import assemble, compact, comparable, shown

TRANSCRIPTS = Path(__file__).parents[1] / "data" / "transcripts"

LOOK = '<function name="look"><param name="at">{}</param></function>'
SCRIPT = {
    "Hello": "Good day, 晴!",
    "Weather?": "<think>\nIs it dry?\n</think>\n\nIt is dry today.",
    "Object?": '<think>\nAn object.\n</think>\n\n{"dry": true}',
    "Look": LOOK.format("Rome"),
    "Say, look": "It is: " + LOOK.format("Rome"),
    "Both": LOOK.format("Rome") + "\n" + LOOK.format("<![CDATA[a<b]]>"),
    "Think, look": f'<think>\nIs it <function name="look">?\n</think>\n\n{LOOK.format("Rome")}',
    "18 °C": "<think>\nIt is warm.\n</think>\n\nIt is dry today.",
}
WORDS = ["Good", " day", "Is", " it", "It", " is", " dry", " today", " warm", "An", " object"]
WORDS += ['"dry"', "true", " name", "look", '="', '">', "at", "Rome"]
"""Tokens of more than a character, so that the transcripts are short."""

SCHEMA = {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]}
DRY = {"type": "object", "properties": {"dry": {"type": "boolean"}}, "required": ["dry"]}

Body = dict[str, Any]


def said(text: str, role: str = "user") -> Body:
    return {"messages": [{"role": role, "content": text}]}


def openai_chat() -> dict[str, Body]:
    tools = {"tools": [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}]}
    high, form = {"reasoning_effort": "high"}, {"name": "dry", "schema": DRY}
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "look", "arguments": '{"at":"Rome"}'},
    }
    turn = [
        {"role": "user", "content": "Look"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "I look.",
            "tool_calls": [call],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "18 °C"},
    ]
    named = {"type": "function", "function": {"name": "look"}}
    return {
        "no thinking": said("Hello"),
        "thinking on": said("Weather?") | high,
        "thinking off": said("Weather?") | {"reasoning_effort": "none"},
        "a budget closes the thought": said("Weather?") | high | {"thinking_token_budget": 3},
        "the limit comes inside the thought": said("Weather?") | {"max_tokens": 5},
        "the limit comes in the answer": said("Weather?") | {"max_tokens": 11},
        "a stop string": said("Weather?") | {"stop": " today"},
        "a stop string that the thought has too": said("Weather?") | {"stop": " dry"},
        "a JSON schema": said("Object?")
        | {"response_format": {"type": "json_schema", "json_schema": form}},
        "log probabilities": said("Weather?") | {"logprobs": True, "max_tokens": 11},
        "two replies": said("Weather?") | {"n": 2},
        "the thought in the content": said("Weather?") | {"separate_reasoning": False},
        "a call": said("Look") | tools,
        "a required call": said("Look") | tools | {"tool_choice": "required"},
        "a named call": said("Look") | tools | {"tool_choice": named},
        "two calls": said("Both") | tools,
        "two required calls": said("Both") | tools | {"tool_choice": "required"},
        "two calls where one is allowed": said("Both") | tools | {"parallel_tool_calls": False},
        "text, then a call": said("Say, look") | tools,
        "a thought, then a call": said("Think, look") | tools,
        "the limit comes inside a call": said("Look") | tools | {"max_tokens": 8},
        "the limit comes inside it": said("Look")
        | tools
        | {"tool_choice": "required", "max_tokens": 10},
        "no call": said("Hello") | tools | {"tool_choice": "none"},
        "the turn after a result": {"messages": turn} | tools,
    }


def openai_completions() -> dict[str, Body]:
    def prompt(text: str, before: str = "") -> Body:
        return {"prompt": f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{before}"}

    return {
        "no thinking": prompt("Hello"),
        "a thought is text": prompt("Weather?") | {"max_tokens": 40},
        "with its marks": prompt("Weather?") | {"max_tokens": 40, "skip_special_tokens": False},
        "the prompt closes it": prompt("Weather?", "<think>\n\n</think>\n\n") | {"max_tokens": 40},
        "the limit": prompt("Weather?") | {"max_tokens": 3},
        "a stop string": prompt("Weather?") | {"stop": " dry"},
        "a JSON schema": prompt("Object?", "<think>\n\n</think>\n\n") | {"guided_json": DRY},
        "two replies": prompt("Hello") | {"n": 2, "echo": True, "max_tokens": 2},
        "log probabilities": prompt("Hello") | {"logprobs": 0, "max_tokens": 3},
    }


def openai_responses() -> dict[str, Body]:
    tools = {"tools": [{"type": "function", "name": "look", "parameters": SCHEMA}]}
    high = {"reasoning": {"effort": "high"}}
    turn = [
        {"role": "user", "content": "Look"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"at":"Rome"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "18 °C"},
    ]
    form = {"format": {"type": "json_schema", "name": "dry", "schema": DRY}}
    return {
        "no thinking": {"input": "Hello"},
        "thinking on": {"input": "Weather?"} | high,
        "thinking off": {"input": "Weather?", "reasoning": {"effort": "none"}},
        "the limit comes inside the thought": {"input": "Weather?", "max_output_tokens": 5},
        "the limit comes in the answer": {"input": "Weather?", "max_output_tokens": 11},
        "a JSON schema": {"input": "Object?", "text": form},
        "a call": {"input": "Look"} | tools,
        "a required call": {"input": "Look", "tool_choice": "required"} | tools,
        "the limit comes inside it": {"input": "Look", "tool_choice": "required"}
        | tools
        | {"max_output_tokens": 10},
        "a named call": {"input": "Look", "tool_choice": {"type": "function", "name": "look"}}
        | tools,
        "two calls": {"input": "Both"} | tools,
        "text, then a call": {"input": "Say, look"} | tools,
        "a thought, then a call": {"input": "Think, look"} | tools,
        "the turn after a result": {"input": turn} | tools,
    }


def anthropic_messages() -> dict[str, Body]:
    tools = {"tools": [{"name": "look", "input_schema": SCHEMA}]}
    limit = {"max_tokens": 99}

    def thinking(kind: str, **more: Any) -> Body:
        return {"thinking": {"type": kind, **more}}

    turn = [
        {"role": "user", "content": "Look"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I look.", "signature": ""},
                {"type": "tool_use", "id": "c1", "name": "look", "input": {"at": "Rome"}},
            ],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "18 °C"}],
        },
    ]
    form = {"format": {"type": "json_schema", "schema": DRY}}
    on = thinking("enabled", budget_tokens=50)
    bodies = {
        "no thinking": said("Hello"),
        "thinking on": said("Weather?") | on,
        "thinking off": said("Weather?") | thinking("disabled"),
        "a budget closes the thought": said("Weather?") | thinking("enabled", budget_tokens=3),
        "the limit comes inside the thought": said("Weather?") | {"max_tokens": 5},
        "the limit comes in the answer": said("Weather?") | {"max_tokens": 11},
        "a stop string": said("Weather?") | {"stop_sequences": [" today"]},
        "a JSON schema": said("Object?") | {"output_config": form},
        "a call": said("Look") | tools,
        "a required call": said("Look") | tools | {"tool_choice": {"type": "any"}},
        "the limit comes inside it": said("Look")
        | tools
        | {"tool_choice": {"type": "any"}, "max_tokens": 10},
        "a named call": said("Look") | tools | {"tool_choice": {"type": "tool", "name": "look"}},
        "two calls": said("Both") | tools,
        "text, then a call": said("Say, look") | tools,
        "a thought, then a call": said("Think, look") | tools | on,
        "the turn after a result": {"messages": turn} | tools | on,
    }
    return {name: limit | body for name, body in bodies.items()}


def ollama_chat() -> dict[str, Body]:
    tools = {"tools": [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}]}
    call = {"function": {"name": "look", "arguments": {"at": "Rome"}}}
    turn = [
        {"role": "user", "content": "Look"},
        {"role": "assistant", "content": "", "thinking": "I look.", "tool_calls": [call]},
        {"role": "tool", "tool_name": "look", "content": "18 °C"},
    ]
    return {
        "no thinking": said("Hello"),
        "thinking on": said("Weather?") | {"think": True},
        "thinking off": said("Weather?") | {"think": False},
        "the limit comes inside the thought": said("Weather?") | {"options": {"num_predict": 5}},
        "the limit comes in the answer": said("Weather?") | {"options": {"num_predict": 11}},
        "a stop string": said("Weather?") | {"options": {"stop": [" today"]}},
        "a JSON schema": said("Object?") | {"format": DRY},
        "log probabilities": said("Weather?") | {"logprobs": True, "options": {"num_predict": 11}},
        "a call": said("Look") | tools,
        "two calls": said("Both") | tools,
        "text, then a call": said("Say, look") | tools,
        "a thought, then a call": said("Think, look") | tools | {"think": True},
        "the turn after a result": {"messages": turn} | tools,
    }


def ollama_generate() -> dict[str, Body]:
    raw = "<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n"
    return {
        "no thinking": {"prompt": "Hello"},
        "thinking on": {"prompt": "Weather?", "think": True},
        "thinking off": {"prompt": "Weather?", "think": False},
        "the limit comes inside the thought": {
            "prompt": "Weather?",
            "options": {"num_predict": 5},
        },
        "a stop string": {"prompt": "Weather?", "options": {"stop": [" today"]}},
        "a JSON schema": {"prompt": "Object?", "format": DRY},
        "no template": {"prompt": raw, "raw": True},
    }


def sglang() -> dict[str, Body]:
    def prompt(text: str, before: str = "", **params: Any) -> Body:
        text = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{before}"
        return {"text": text, "sampling_params": params}

    return {
        "no thinking": prompt("Hello"),
        "a thought is text": prompt("Weather?"),
        "with its marks": prompt("Weather?", skip_special_tokens=False),
        "the prompt closes it": prompt("Weather?", "<think>\n\n</think>\n\n"),
        "the limit": prompt("Weather?", max_new_tokens=3),
        "a stop string": prompt("Weather?", stop=[" dry"]),
        "a regular expression": prompt("Hello", regex="Good.*"),
        "two replies": prompt("Hello", n=2, max_new_tokens=2),
        "log probabilities": prompt("Hello", max_new_tokens=2)
        | {"return_logprob": True, "return_text_in_logprobs": True},
    }


USAGE = {"stream_options": {"include_usage": True}}
APIS: Mapping[str, tuple[str, Mapping[str, Body], Body]] = {
    "openai_chat": ("/v1/chat/completions", openai_chat(), USAGE),
    "openai_completions": ("/v1/completions", openai_completions(), USAGE),
    "openai_responses": ("/v1/responses", openai_responses(), {}),
    "anthropic": ("/v1/messages", anthropic_messages(), {}),
    "ollama_chat": ("/api/chat", ollama_chat(), {}),
    "ollama_generate": ("/api/generate", ollama_generate(), {}),
    "sglang": ("/generate", sglang(), {}),
}
"""Path, requests by what they are about, and the fields that a stream adds."""


@dataclass(frozen=True)
class Exchange:
    """A request and its responses."""

    body: Body
    whole: Answer
    stream: Answer

    def transcript(self) -> str:
        """All bytes, but for ids and times."""
        whole, stream = map(shown, (self.whole, self.stream))
        return f"{compact(self.body)}\n{whole}\nstreamed: {stream}\n"


Exchanges = Callable[[str], Mapping[str, Exchange]]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("scripted") / "thinker"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minicpm_mlx.server.anthropic.routes.PING", 600.0)  # on a busy machine too
        # Without a prefix cache no reply knows of those before it.
        with serving(scripted_lm(folder, SCRIPT, words=WORDS), cache_bytes=0) as live:
            yield live


@pytest.fixture(scope="module")
def exchanges(live: Live) -> Exchanges:
    """Those of an API, by what they are about."""

    @cache
    def of(api: str) -> Mapping[str, Exchange]:
        path, bodies, streams = APIS[api]
        found = {}
        for name, body in bodies.items():
            body = body if path == "/generate" else {"model": "thinker", **body}
            whole = live.ask("POST", path, {**body, "stream": False})
            stream = live.ask("POST", path, {**body, "stream": True, **streams})
            found[name] = Exchange(body, whole, stream)
        return found

    return of


over_apis = pytest.mark.parametrize("api", APIS)


@over_apis
def test_an_api_sends_what_its_transcript_has(exchanges: Exchanges, api: str) -> None:
    parts = [f"POST {APIS[api][0]}\n"]
    parts += [f"# {name}\n{found.transcript()}" for name, found in exchanges(api).items()]
    found, file = "\n".join(parts), TRANSCRIPTS / f"{api}.txt"
    if os.environ.get("WRITE_TRANSCRIPTS"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(found.encode())
    kept = file.read_bytes().decode()
    difference = difflib.unified_diff(kept.split("\n"), found.split("\n"), file.name, "now", n=1)
    if kept != found:
        pytest.fail("\n".join(difference), pytrace=False)


@over_apis
def test_a_stream_put_together_is_the_whole_reply(exchanges: Exchanges, api: str) -> None:
    for name, found in exchanges(api).items():
        assert (found.whole.status, found.stream.status) == (200, 200), name
        assembled = assemble(APIS[api][0], found.stream.body)
        assert simple(assembled) == simple(found.whole.json), name


def simple(reply: Any) -> Any:
    """A reply for ==: ids and times normalised, and no fields of messages that say nothing."""
    reply = comparable(reply)
    if isinstance(reply, dict):
        for choice in reply.get("choices", ()):
            if message := choice.get("message"):
                choice["message"] = {name: value for name, value in message.items() if value}
    return reply


@pytest.mark.slow
def test_openai_s_client_reads_each_stream_as_the_whole_reply(live: Live) -> None:
    openai = pytest.importorskip("openai")
    from openai.types.chat import ChatCompletion, ChatCompletionChunk
    from openai.types.responses import Response, ResponseStreamEvent

    with openai.OpenAI(api_key="x", base_url=f"{live.url}/v1") as client:
        chats, responses = client.chat.completions, client.responses
        for name, body in openai_chat().items():
            how: Body = {"model": "thinker", "messages": [], "extra_body": body}
            with chats.stream(**how, **USAGE) as parts:
                chunks = [part.chunk for part in parts if part.type == "chunk"]
                try:
                    final = parts.get_final_completion()
                except openai.LengthFinishReasonError as cut:
                    final = cut.completion
            whole = chats.create(**how)
            assert filled(final) == filled(whole), name
            check(ChatCompletion, whole)
            check(ChatCompletionChunk, *chunks)
        for name, body in openai_responses().items():
            how = {"model": "thinker", "input": "", "extra_body": body}
            events, whole = [*responses.create(**how, stream=True)], responses.create(**how)
            assert filled(events[-1].response) == filled(whole), name
            check(Response, whole)
            check(ResponseStreamEvent, *events)


@pytest.mark.slow
def test_anthropic_s_client_reads_each_stream_as_the_whole_reply(live: Live) -> None:
    anthropic = pytest.importorskip("anthropic")
    from anthropic.types import Message, RawMessageStreamEvent

    with anthropic.Anthropic(api_key="x", base_url=live.url) as client:
        for name, body in anthropic_messages().items():
            how: Body = {"model": "thinker", "messages": [], "max_tokens": 9, "extra_body": body}
            with client.messages.stream(**how) as stream:
                final = stream.get_final_message()
            whole = client.messages.create(**how)
            assert filled(final) == filled(whole), name
            check(Message, whole)
            check(RawMessageStreamEvent, *client.messages.create(**how, stream=True))


@pytest.mark.slow
@pytest.mark.parametrize("api", ["ollama_chat", "ollama_generate"])
def test_ollama_s_client_reads_each_stream_as_the_whole_reply(live: Live, api: str) -> None:
    ollama = pytest.importorskip("ollama")
    path, bodies, _ = APIS[api]
    with ollama.Client(live.url) as client:
        ask = client.chat if api == "ollama_chat" else client.generate
        for name, body in bodies.items():
            lines = [filled(line.model_dump()) for line in ask("thinker", **body, stream=True)]
            stream = assemble(path, "\n".join(map(json.dumps, lines)).encode())
            whole = ask("thinker", **body).model_dump()
            assert filled(stream) == filled(whole), name


def check(kind: Any, *objects: Any) -> None:
    """Asserts that a client's objects, which it does not check itself, are of a type of its."""
    from pydantic import TypeAdapter

    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    for found in objects:
        adapter.validate_python(found.to_dict())


def filled(reply: Any) -> Any:
    """What a client's object says: all but what is empty, or differs from run to run."""
    reply = reply.to_dict() if hasattr(reply, "to_dict") else reply

    def rest(value: Any) -> Any:
        if isinstance(value, list):
            return [rest(inner) for inner in value]
        if not isinstance(value, dict):
            return value
        inner = {name: rest(inner) for name, inner in value.items() if name != "index"}
        return {name: value for name, value in inner.items() if value not in (None, "", [], {})}

    return rest(comparable(reply))
