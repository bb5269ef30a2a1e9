"""What is peculiar to Anthropic's Messages API; Anthropic's own client reads it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("fastapi")

if TYPE_CHECKING:
    from support.serving import Live

STORY = [{"role": "user", "content": "Tell me a story about a fox."}]


@pytest.fixture
def client(tiny_server: Live) -> Iterator[Any]:
    anthropic = pytest.importorskip("anthropic")
    with anthropic.Anthropic(base_url=tiny_server.url, api_key="none", max_retries=0) as client:
        yield client


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content)


def test_the_client_reads_wholes_streams_and_refusals(client, tiny, tiny_server):
    import anthropic

    asked = {"model": "tiny", "messages": STORY, "max_tokens": 12}
    expected = tiny.generate(STORY, max_tokens=12).text

    async def ask() -> str:
        async with (
            anthropic.AsyncAnthropic(base_url=tiny_server.url, api_key="none") as there,
            there.messages.stream(**asked) as stream,
        ):
            return "".join([piece async for piece in stream.text_stream])

    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        pieces = [*stream.text_stream]
        final = stream.get_final_message()
    assert "".join(pieces) == text_of(whole) == text_of(final) == asyncio.run(ask()) == expected
    assert len(pieces) > 3
    assert whole.id.startswith("msg_")
    assert whole._request_id.startswith("req_")
    with pytest.raises(anthropic.NotFoundError, match="tiny:other"):
        client.messages.create(**asked | {"model": "claude-3"})
    # An answer can be sent back as it came.
    more = {"role": "user", "content": "And?"}
    second = client.messages.create(
        model="tiny", messages=[*STORY, whole.to_param(), more], max_tokens=6
    )
    turns = [*STORY, {"role": "assistant", "content": expected}, more]
    assert text_of(second) == tiny.generate(turns, max_tokens=6).text


@pytest.mark.parametrize("count", [0, 3])
def test_a_stream_has_its_events_in_order(client, count):
    stream = client.messages.create(model="tiny", messages=STORY, max_tokens=count, stream=True)
    kinds = [event.type for event in stream]
    begin, end = ["message_start", "content_block_start"], ["content_block_stop", "message_delta"]
    assert kinds == [*begin, *["content_block_delta"] * count, *end, "message_stop"]


def test_a_stream_says_that_it_is_there_while_nothing_comes(tiny_server, monkeypatch):
    monkeypatch.setattr("minicpm_mlx.server.anthropic.routes.PING", 0)
    body = {"model": "tiny", "messages": STORY, "max_tokens": 4, "stream": True}
    found = tiny_server.ask("POST", "/v1/messages", body).body.decode()
    assert found.count("event: ping") > 1
    assert found.count("text_delta") == 4


def test_ends_are_told_apart(client, tiny):
    whole = tiny.generate(STORY, max_tokens=20).text
    stop = whole[8:10]
    ended = client.messages.create(
        model="tiny", messages=STORY, max_tokens=20, stop_sequences=["¤", stop]
    )
    assert (ended.stop_reason, ended.stop_sequence) == ("stop_sequence", stop)
    silent = client.messages.create(model="tiny", messages=STORY, max_tokens=0)
    assert (silent.stop_reason, text_of(silent)) == ("max_tokens", "")


def test_a_context_that_is_full_is_told_from_a_limit(tiny):
    from support.serving import serving

    with serving(tiny) as server:
        server.service.context_length = 100
        body = {"model": "tiny", "messages": STORY, "max_tokens": 4000}
        message = server.ask("POST", "/v1/messages", body).json
    assert message["stop_reason"] == "model_context_window_exceeded"
    assert sum(message["usage"].values()) == 100


def test_system_is_text_or_blocks_and_tokens_are_counted(client, tiny):
    system = {"role": "system", "content": "You are a pirate."}
    block = {"type": "text", "text": system["content"], "cache_control": {"type": "ephemeral"}}
    for given in (system["content"], [block]):
        counted = client.messages.count_tokens(model="tiny", messages=STORY, system=given)
        assert counted.input_tokens == len(tiny.encode([system, *STORY]))


def test_blocks_and_messages_of_one_role_are_one_message(client, tiny):
    blocks = [{"type": "text", "text": "France?"}, {"type": "text", "text": "Spain?"}]
    apart = [{"role": "user", "content": blocks}, {"role": "user", "content": "Answer both."}]
    joined = [{"role": "user", "content": "France?\nSpain?\nAnswer both."}]
    counted = client.messages.count_tokens(model="tiny", messages=apart)
    assert counted.input_tokens == len(tiny.encode(joined))


def test_an_assistants_message_at_the_end_is_continued(client, tiny):
    begun = {"role": "assistant", "content": "The capital of Spain is"}
    message = client.messages.create(model="tiny", messages=[*STORY, begun], max_tokens=6)
    prompt = tiny.tokenizer.chat_text(STORY) + begun["content"]
    assert text_of(message) == tiny.generate(prompt, max_tokens=6).text


def test_temperature_draws_and_top_k_holds_it(client, tiny):
    def draw(**sampling: Any) -> str:
        asked = {"model": "tiny", "messages": STORY, "max_tokens": 8}
        return text_of(client.messages.create(**asked, extra_body=sampling))

    assert draw(temperature=1.0, top_k=1) == tiny.generate(STORY, max_tokens=8).text
    assert len({draw(temperature=1.5) for _ in range(3)}) > 1


def test_models_are_listed_page_by_page_and_shown(client, tiny_server):
    import anthropic

    assert [model.id for model in client.models.list()] == ["tiny", "tiny:other"]
    assert [model.id for model in client.models.list(limit=1)] == ["tiny", "tiny:other"]
    first = client.models.list(limit=1)
    assert (first.has_more, first.first_id, first.last_id) == (True, "tiny", "tiny")
    assert [model.id for model in client.models.list(before_id="tiny:other").data] == ["tiny"]
    shown = client.models.retrieve("tiny:other")
    assert (shown.type, shown.display_name, shown.lifecycle) == ("model", "tiny:other", "active")
    assert shown.max_input_tokens == tiny_server.service.context_length
    assert shown.created_at.timestamp() == tiny_server.service.created
    with pytest.raises(anthropic.NotFoundError, match="tiny:other") as refused:
        client.models.retrieve("claude-3")
    assert refused.value.body["type"] == "error"
    for wrong in ({"after_id": "claude-3"}, {"limit": 0}):
        with pytest.raises(anthropic.BadRequestError, match=next(iter(wrong))) as refused:
            client.models.list(**wrong)
        assert refused.value.body["error"]["type"] == "invalid_request_error"
    plain = tiny_server.ask("GET", "/v1/models").json
    assert plain["object"] == "list"


# Tools

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


def test_the_client_reads_calls(client):
    pytest.importorskip("llguidance")
    choice = {"type": "any", "disable_parallel_tool_use": True}
    asked = {"model": "tiny", "messages": STORY, "tools": [WEATHER], "tool_choice": choice}
    with client.messages.stream(**asked, max_tokens=120) as events:
        message = events.get_final_message()
    assert message.stop_reason == "tool_use"
    block = message.content[-1]
    assert (block.type, block.name) == ("tool_use", "get_weather")
    assert block.id.startswith("toolu_")
    assert block.input["city"] in ("Paris", "Rome")


def test_results_of_calls_are_part_of_the_conversation(client, tiny):
    import anthropic

    call = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Paris"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "Snow."}
    messages = [
        *STORY,
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result, {"type": "text", "text": "In one word, then?"}]},
    ]
    counted = client.messages.count_tokens(model="tiny", messages=messages)
    function = {"name": "get_weather", "arguments": {"city": "Paris"}}
    expected = [
        *STORY,
        {"role": "assistant", "content": "", "tool_calls": [{"function": function}]},
        {"role": "tool", "content": "Snow."},
        {"role": "user", "content": "In one word, then?"},
    ]
    assert counted.input_tokens == len(tiny.encode(expected))
    with pytest.raises(anthropic.BadRequestError, match="tool_result"):
        client.messages.count_tokens(
            model="tiny", messages=[*STORY, {"role": "assistant", "content": [result]}]
        )
