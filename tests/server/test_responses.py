"""OpenAI's responses API, asked by OpenAI's own client, which checks the events' types."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

if TYPE_CHECKING:
    from support.serving import Live

QUESTION = "What is the capital of France?"
FRANCE = [{"role": "user", "content": QUESTION}]


@pytest.fixture
def client(server: Live) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_text_is_answered_as_generate_does(client, demo):
    expected = demo.generate(FRANCE, max_tokens=24)
    answer = client.responses.create(model="demo", input=QUESTION, max_output_tokens=24)
    assert answer.output_text == expected.text
    assert answer.status == "completed"
    assert answer.usage.input_tokens == expected.stats.prompt_tokens
    assert answer.usage.output_tokens == expected.stats.completion_tokens
    assert answer.store is False


def test_a_reply_that_is_cut_is_incomplete(client):
    answer = client.responses.create(model="demo", input=QUESTION, max_output_tokens=3)
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output[0].status == "incomplete"


def test_instructions_are_the_systems(client, demo):
    turns = [{"role": "system", "content": "Answer in French."}, *FRANCE]
    answer = client.responses.create(
        model="demo", instructions="Answer in French.", input=FRANCE, max_output_tokens=8
    )
    assert answer.output_text == demo.generate(turns, max_tokens=8).text


def test_output_can_be_sent_back_as_input(client, demo):
    first = client.responses.create(model="demo", input=QUESTION, max_output_tokens=24)
    given: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}]
    given += first.output
    given.append({"role": "user", "content": "And of Italy?"})
    second = client.responses.create(model="demo", input=given, max_output_tokens=8)
    turns = [
        *FRANCE,
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And of Italy?"},
    ]
    assert second.output_text == demo.generate(turns, max_tokens=8).text


def test_events_build_the_response(client):
    whole = client.responses.create(model="demo", input=QUESTION, max_output_tokens=24)
    with client.responses.stream(model="demo", input=QUESTION, max_output_tokens=24) as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == final.output_text == whole.output_text
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.id != whole.id


def test_events_are_numbered_and_named(server):
    asked = {"input": QUESTION, "max_output_tokens": 4, "stream": True}
    body = server.ask("POST", "/v1/responses", asked).body.decode()
    events = [part.split("\n") for part in body.strip().split("\n\n")]
    data = [json.loads(lines[1].removeprefix("data: ")) for lines in events]
    assert [lines[0] for lines in events] == [f"event: {one['type']}" for one in data]
    assert [one["sequence_number"] for one in data] == list(range(len(data)))
    assert data[-1]["type"] == "response.incomplete"
    items = {one["item_id"] for one in data if "item_id" in one}
    assert items == {data[-1]["response"]["output"][0]["id"]}


def test_log_probabilities_are_included_where_asked(client):
    answer = client.responses.create(
        model="demo",
        input=QUESTION,
        max_output_tokens=4,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
    )
    found = answer.output[0].content[0].logprobs
    assert len(found) == 4
    assert all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in found)
    without = client.responses.create(model="demo", input=QUESTION, max_output_tokens=4)
    assert without.output[0].content[0].logprobs == []


def test_a_schema_is_followed(client):
    import pydantic

    class Answer(pydantic.BaseModel):
        capital: str = pydantic.Field(max_length=12)

    answer = client.responses.parse(
        model="demo", input=QUESTION, text_format=Answer, max_output_tokens=40
    )
    assert isinstance(answer.output_parsed, Answer)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"text": {"verbosity": "low"}}, "verbosity"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {}}]}, "tools"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "text"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 101}, "temperature"),
        ({"seed": 1}, "seed"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_by_name(client, options, field):
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(
            model="demo", input=QUESTION, extra_body={"max_output_tokens": 2, **options}
        )
    assert field in refused.value.message


def test_what_changes_nothing_is_accepted(client):
    options = {"store": True, "metadata": {"a": "b"}, "user": "me", "truncation": "disabled"}
    answer = client.responses.create(
        model="demo", input=QUESTION, max_output_tokens=2, extra_body=options
    )
    assert answer.metadata == {"a": "b"}
    with pytest.raises(openai.NotFoundError):  # nothing was kept
        client.responses.retrieve(answer.id)
