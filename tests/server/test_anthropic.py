"""Anthropic's Messages API, asked by Anthropic's own client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

import minicpm_mlx as mm
from support.leaving import leaves

anthropic = pytest.importorskip("anthropic")
pytest.importorskip("fastapi")

from minicpm_mlx.text.chat_template import Template  # noqa: E402

if TYPE_CHECKING:
    from support.serving import Live

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
STORY = [{"role": "user", "content": "Tell me a story about a fox."}]
SYSTEM = {"role": "system", "content": "You are a pirate."}


@pytest.fixture
def client(server: Live) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content)


def read(message: Any) -> int:
    """Tokens of the prompt, whether they were known before or not."""
    return message.usage.input_tokens + message.usage.cache_read_input_tokens


def test_a_greedy_reply_is_what_generate_says(client, demo):
    message = client.messages.create(model="demo", messages=FRANCE, max_tokens=24)
    expected = demo.generate(FRANCE, max_tokens=24)
    assert text_of(message) == expected.text
    assert (message.role, message.model, message.type) == ("assistant", "demo", "message")
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert read(message) == expected.stats.prompt_tokens
    assert message.usage.output_tokens == expected.stats.completion_tokens
    assert message.id.startswith("msg_")
    assert message._request_id.startswith("req_")


def test_a_reply_is_cut_at_the_length_asked_for(client, demo):
    message = client.messages.create(model="demo", messages=STORY, max_tokens=5)
    assert text_of(message) == demo.generate(STORY, max_tokens=5).text
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 5


def test_a_prompt_can_be_read_and_nothing_said(client):
    message = client.messages.create(model="demo", messages=STORY, max_tokens=0)
    assert text_of(message) == ""
    assert message.stop_reason == "max_tokens"


def test_the_stop_sequence_that_came_is_named(client, demo):
    whole = demo.generate(STORY, max_tokens=20).text
    stop = whole.split()[4]
    message = client.messages.create(
        model="demo", messages=STORY, max_tokens=20, stop_sequences=["¤", stop]
    )
    assert text_of(message) == whole[: whole.index(stop)]
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)


def test_a_context_that_is_full_is_told_from_a_limit(demo, serving):
    with serving() as server:
        server.service.context_length = 60
        with anthropic.Anthropic(base_url=server.url, api_key="none") as client:
            message = client.messages.create(model="demo", messages=STORY, max_tokens=4000)
            assert message.stop_reason == "model_context_window_exceeded"
            assert read(message) + message.usage.output_tokens == 60


@pytest.mark.parametrize("asked", [FRANCE, STORY])
def test_a_stream_is_the_reply_in_pieces(client, asked):
    whole = client.messages.create(model="demo", messages=asked, max_tokens=16)
    with client.messages.stream(model="demo", messages=asked, max_tokens=16) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert len(pieces) > 3
    assert "".join(pieces) == text_of(whole) == text_of(final)
    assert (final.stop_reason, read(final)) == (whole.stop_reason, read(whole))
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_a_stream_has_its_events_in_order(client):
    stream = client.messages.create(model="demo", messages=STORY, max_tokens=3, stream=True)
    kinds = [event.type for event in stream]
    assert kinds == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * 3,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


def test_a_stream_says_that_it_is_there_while_nothing_comes(server, monkeypatch):
    monkeypatch.setattr("minicpm_mlx.server.anthropic.routes.PING", 0.001)
    body = {"model": "demo", "messages": STORY, "max_tokens": 4, "stream": True}
    found = server.ask("POST", "/v1/messages", body).body.decode()
    assert found.count("event: ping") > 1
    assert found.count("text_delta") == 4


def test_a_stream_without_text_has_an_empty_block(client):
    with client.messages.stream(model="demo", messages=STORY, max_tokens=0) as stream:
        assert text_of(stream.get_final_message()) == ""


def test_system_is_text_or_blocks(client, demo):
    expected = demo.generate([SYSTEM, *STORY], max_tokens=8).text
    assert expected != demo.generate(STORY, max_tokens=8).text
    block = {"type": "text", "text": SYSTEM["content"], "cache_control": {"type": "ephemeral"}}
    for system in (SYSTEM["content"], [block]):
        message = client.messages.create(model="demo", messages=STORY, max_tokens=8, system=system)
        assert text_of(message) == expected


def test_blocks_and_messages_of_one_role_are_one_message(client, demo):
    joined = [{"role": "user", "content": "The capital of France?\nAnd of Spain?\nAnswer both."}]
    apart = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "The capital of France?"},
                {"type": "text", "text": "And of Spain?"},
            ],
        },
        {"role": "user", "content": "Answer both."},
    ]
    message = client.messages.create(model="demo", messages=apart, max_tokens=8)
    assert text_of(message) == demo.generate(joined, max_tokens=8).text


def test_a_reply_can_be_sent_back_as_it_came(client, demo):
    first = client.messages.create(model="demo", messages=FRANCE, max_tokens=24)
    more = {"role": "user", "content": "And of Spain?"}
    second = client.messages.create(
        model="demo", messages=[*FRANCE, first.to_param(), more], max_tokens=12
    )
    said = {"role": "assistant", "content": text_of(first)}
    assert text_of(second) == demo.generate([*FRANCE, said, more], max_tokens=12).text


def test_an_assistants_message_at_the_end_is_continued(client, demo):
    begun = {"role": "assistant", "content": "The capital of Spain is"}
    message = client.messages.create(model="demo", messages=[*FRANCE, begun], max_tokens=6)
    prompt = demo.tokenizer.chat_text(FRANCE) + begun["content"]
    assert text_of(message) == demo.generate(prompt, max_tokens=6).text


def test_temperature_draws_and_top_k_holds_it(client, demo):
    expected = demo.generate(STORY, max_tokens=8).text
    held = client.messages.create(
        model="demo", messages=STORY, max_tokens=8, extra_body={"temperature": 1.0, "top_k": 1}
    )
    assert text_of(held) == expected
    drawn = {
        text_of(
            client.messages.create(
                model="demo", messages=STORY, max_tokens=8, extra_body={"temperature": 1.5}
            )
        )
        for _ in range(3)
    }
    assert len(drawn) > 1


def test_tokens_are_counted_without_a_reply(client, demo):
    expected = len(demo.encode([SYSTEM, *STORY]))
    counted = client.messages.count_tokens(model="demo", messages=STORY, system=SYSTEM["content"])
    assert counted.input_tokens == expected


def test_an_adapter_answers_to_its_name(client):
    asked = {"messages": STORY, "max_tokens": 8}
    plain = client.messages.create(model="demo", **asked)
    pirate = client.messages.create(model="demo:pirate", **asked)
    assert pirate.model == "demo:pirate"
    assert text_of(pirate) != text_of(plain)


def test_the_async_client_streams_several_at_once(server, demo):
    async def one(question: str) -> str:
        messages = [{"role": "user", "content": question}]
        async with client.messages.stream(model="demo", messages=messages, max_tokens=8) as stream:
            return "".join([piece async for piece in stream.text_stream])

    async def all_of_them() -> list[str]:
        async with client:
            return await asyncio.gather(*(one(question) for question in questions))

    client = anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0)
    questions = ["What is 1 + 1?", "Name a color.", "Who wrote Hamlet?"]
    found = asyncio.run(all_of_them())
    expected = [
        demo.generate([{"role": "user", "content": question}], max_tokens=8).text
        for question in questions
    ]
    assert found == expected


def test_what_changes_nothing_is_accepted(client, demo):
    message = client.messages.create(
        model="demo",
        messages=STORY,
        max_tokens=4,
        metadata={"user_id": "somebody"},
        service_tier="auto",
        thinking={"type": "disabled"},
        cache_control={"type": "ephemeral", "ttl": "1h"},
        tools=[],
    )
    assert text_of(message) == demo.generate(STORY, max_tokens=4).text


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://example.invalid/a.png"}}
PDF = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "a"}}
BEGUN = [*FRANCE, {"role": "assistant", "content": "Paris "}]


@pytest.mark.parametrize(
    ("field", "more"),
    [
        ("image", {"messages": [{"role": "user", "content": [IMAGE]}]}),
        ("document", {"messages": [{"role": "user", "content": [PDF]}]}),
        ("thinking", {"thinking": {"type": "enabled", "budget_tokens": 1024}}),
        ("output_config.effort", {"output_config": {"effort": "high"}}),
        ("container", {"container": "somewhere"}),
        ("tools", {"tools": [{"name": "look", "input_schema": {"type": "object"}}]}),
        ("tools", {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}),
        ("white space", {"messages": BEGUN}),
        ("stop_sequences", {"stop_sequences": [""]}),
        ("max_tokens", {"max_tokens": -1}),
        ("temperature", {"extra_body": {"temperature": -1}}),
        ("top_k", {"extra_body": {"top_k": "many"}}),
        ("beam_width", {"extra_body": {"beam_width": 4}}),
        ("messages", {"messages": []}),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(client, field, more):
    asked = {"model": "demo", "messages": FRANCE, "max_tokens": 4, **more}
    with pytest.raises(anthropic.BadRequestError, match=field) as refused:
        client.messages.create(**asked)
    assert refused.value.body["type"] == "error"
    assert refused.value.body["error"]["type"] == "invalid_request_error"
    assert refused.value.body["request_id"].startswith("req_")


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(anthropic.NotFoundError, match="demo:pirate") as refused:
        client.messages.create(model="claude-3", messages=FRANCE, max_tokens=4)
    assert refused.value.body["error"]["type"] == "not_found_error"


def test_a_prompt_that_is_too_long_is_refused(client):
    long = [{"role": "user", "content": "word " * 9000}]
    with pytest.raises(anthropic.BadRequestError, match="context"):
        client.messages.create(model="demo", messages=long, max_tokens=4)


def test_keys_and_queues_are_refused_as_the_client_knows_it(serving):
    with serving(settings={"api_key": "secret"}, width=1, queue=1) as server:
        with (
            anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0) as client,
            pytest.raises(anthropic.AuthenticationError),
        ):
            client.messages.create(model="demo", messages=FRANCE, max_tokens=4)
        with anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0) as client:
            asked = {"model": "demo", "messages": STORY, "max_tokens": 200, "stream": True}
            streams = [client.messages.create(**asked) for _ in range(2)]
            with pytest.raises(anthropic.RateLimitError):
                client.messages.create(**asked)
            for stream in streams:
                stream.close()


def test_a_schema_is_followed(client):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    message = client.messages.create(
        model="demo",
        messages=FRANCE,
        max_tokens=24,
        output_config={"format": {"type": "json_schema", "schema": schema}},
    )
    assert json.loads(text_of(message)) == {"city": "Paris"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_not_answered_on(server, stream):
    body = {"model": "demo", "messages": STORY, "max_tokens": 2000, "stream": stream}
    leaves(server, "/v1/messages", body)


# Tools need a template that has a place for them; the demo's own has none.

TOOLS = """{% if tools %}<|im_start|>system
Answer with <tool_call> and </tool_call> around JSON. {{ tools | tojson }}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def with_tools(
    demo: mm.LM, demo_folder: Any, serving: Callable[..., AbstractContextManager[Live]]
) -> Iterator[Any]:
    """A client of a server whose model has a template with tools."""
    from support.serving import serving as serve

    pytest.importorskip("llguidance")
    tokenizer = mm.load_tokenizer(demo_folder)
    tokenizer.template = Template(TOOLS)
    with (
        serve(replace(demo, tokenizer=tokenizer)) as live,
        anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0) as client,
    ):
        yield client


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_must_be_called_is_called(with_tools, choice, stream):
    asked = {
        "model": "demo",
        "messages": [{"role": "user", "content": "How is the weather in Paris?"}],
        "tools": [WEATHER],
        "tool_choice": {**choice, "disable_parallel_tool_use": True},
        "max_tokens": 48,
    }
    if stream:
        with with_tools.messages.stream(**asked) as events:
            message = events.get_final_message()
    else:
        message = with_tools.messages.create(**asked)
    assert message.stop_reason == "tool_use"
    (block,) = message.content
    assert (block.type, block.name) == ("tool_use", "get_weather")
    assert block.id.startswith("toolu_")
    assert block.input["city"] in ("Paris", "Rome")


def test_results_of_calls_are_part_of_the_conversation(with_tools, demo):
    question = {"role": "user", "content": "How is the weather in Paris?"}
    call = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Paris"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "Snow."}
    messages = [
        question,
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result, {"type": "text", "text": "In one word, then?"}]},
    ]
    counted = with_tools.messages.count_tokens(model="demo", messages=messages)
    function = {"name": "get_weather", "arguments": {"city": "Paris"}}
    expected = Template(TOOLS).render(
        [
            question,
            {"role": "assistant", "content": "", "tool_calls": [{"function": function}]},
            {"role": "tool", "content": "Snow."},
            {"role": "user", "content": "In one word, then?"},
        ]
    )
    assert counted.input_tokens == len(demo.encode(expected))


def test_a_result_is_not_the_assistants(client):
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "Snow."}
    messages = [*FRANCE, {"role": "assistant", "content": [result]}]
    with pytest.raises(anthropic.BadRequestError, match="tool_result"):
        client.messages.create(model="demo", messages=messages, max_tokens=4)
