"""What is peculiar to OpenAI's responses API; OpenAI's own client checks the events' types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import pytest

from support.apis import sse

pytest.importorskip("fastapi")

if TYPE_CHECKING:
    from support.serving import Live

QUESTION = "What is the capital of France?"
FRANCE = [{"role": "user", "content": QUESTION}]


@pytest.fixture
def client(tiny_server: Live) -> Iterator[Any]:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{tiny_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_output_can_be_sent_back_as_input(client, tiny):
    first = client.responses.create(model="tiny", input=QUESTION, max_output_tokens=12)
    assert first.store is False
    given: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}]
    more = {"role": "user", "content": "And of Italy?"}
    second = client.responses.create(
        model="tiny", input=[*given, *first.output, more], max_output_tokens=3
    )
    turns = [*FRANCE, {"role": "assistant", "content": first.output_text}, more]
    assert second.output_text == tiny.generate(turns, max_tokens=3).text
    assert second.status == second.output[0].status == "incomplete"
    assert second.incomplete_details.reason == "max_output_tokens"


def test_events_are_named_and_of_one_item(tiny_server):
    asked = {"input": QUESTION, "max_output_tokens": 4, "stream": True}
    body = tiny_server.ask("POST", "/v1/responses", asked).body
    data = sse(body)
    names = [line[7:] for line in body.decode().split("\n") if line.startswith("event: ")]
    assert names == [event["type"] for event in data]
    assert names[-1] == "response.incomplete"
    items = {event["item_id"] for event in data if "item_id" in event}
    assert items == {data[-1]["response"]["output"][0]["id"]}


def test_log_probabilities_are_included_where_asked(tiny_server):
    asked = {"input": QUESTION, "max_output_tokens": 4}
    include = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    for more, count in ((include, 4), ({}, 0)):
        answer = tiny_server.ask("POST", "/v1/responses", asked | more).json
        found = answer["output"][0]["content"][0]["logprobs"]
        assert [len(entry["top_logprobs"]) for entry in found] == [2] * count


def test_the_client_reads_events_and_forms(client):
    pytest.importorskip("llguidance")
    import pydantic

    class Answer(pydantic.BaseModel):
        capital: Literal["Paris", "Rome"]

    whole = client.responses.parse(model="tiny", input=QUESTION, text_format=Answer)
    with client.responses.stream(model="tiny", input=QUESTION, text_format=Answer) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    begin = "created in_progress output_item.added content_part.added"
    end = "output_text.done content_part.done output_item.done completed"
    assert " ".join(kinds[:4]).replace("response.", "") == begin
    assert " ".join(kinds[-4:]).replace("response.", "") == end
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert isinstance(final.output_parsed, Answer)
    assert final.output_parsed == whole.output_parsed


def test_nothing_is_kept(client):
    import openai

    answer = client.responses.create(
        model="tiny", input=QUESTION, max_output_tokens=1, store=True, metadata={"a": "b"}
    )
    assert answer.metadata == {"a": "b"}
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)
