"""OpenAI's chat API, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import pytest

import minicpm_mlx as mm

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

if TYPE_CHECKING:
    from support.serving import Live

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
STORY = [{"role": "user", "content": "Tell me a story about a fox."}]


@pytest.fixture
def client(server: Live) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def text_of(answer: Any) -> str:
    return answer.choices[0].message.content


def test_models_are_listed_and_shown(client):
    names = [model.id for model in client.models.list()]
    assert names == ["demo", "demo:pirate"]
    assert client.models.retrieve("demo:pirate").id == "demo:pirate"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_a_greedy_reply_is_what_generate_says(client, demo):
    answer = client.chat.completions.create(model="demo", messages=FRANCE, max_tokens=24)
    expected = demo.generate(FRANCE, max_tokens=24)
    assert text_of(answer) == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason == "stop"
    assert answer.model == "demo"
    assert answer.usage.prompt_tokens == expected.stats.prompt_tokens
    assert answer.usage.completion_tokens == expected.stats.completion_tokens
    assert answer.usage.total_tokens == sum(
        (answer.usage.prompt_tokens, answer.usage.completion_tokens)
    )


def test_a_prompt_that_was_read_before_is_cached(client):
    messages = [{"role": "user", "content": "A question that no other test asks: " + "why? " * 40}]
    first = client.chat.completions.create(model="demo", messages=messages, max_tokens=1)
    again = client.chat.completions.create(model="demo", messages=messages, max_tokens=1)
    assert again.usage.prompt_tokens_details.cached_tokens > 40
    assert text_of(first) == text_of(again)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_reply_is_cut_at_the_length_asked_for(client, demo, name):
    answer = client.chat.completions.create(model="demo", messages=STORY, **{name: 5})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 5
    assert text_of(answer) == demo.generate(STORY, max_tokens=5).text


def test_a_stream_is_the_reply_in_pieces(client):
    asked = {"model": "demo", "messages": STORY, "max_tokens": 16}
    whole = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert len([delta for delta in deltas if delta.content]) > 8
    assert "".join(delta.content or "" for delta in deltas) == text_of(whole)
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "length"]
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage.completion_tokens == 16
    assert len({chunk.id for chunk in (*chunks, last)}) == 1


def test_a_stream_without_usage_has_none(client):
    stream = client.chat.completions.create(
        model="demo", messages=FRANCE, max_tokens=2, stream=True
    )
    assert all(chunk.choices and chunk.usage is None for chunk in stream)


def test_the_clients_stream_helper_puts_it_together(client, demo):
    with client.chat.completions.stream(model="demo", messages=FRANCE, max_tokens=12) as stream:
        for _ in stream:
            pass
        assert text_of(stream.get_final_completion()) == demo.generate(FRANCE, max_tokens=12).text


def test_the_async_client_gets_the_same(server, client):
    async def ask() -> tuple[str, str]:
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as there:
            asked = {"model": "demo", "messages": FRANCE, "max_tokens": 8}
            whole = await there.chat.completions.create(**asked)
            pieces = [
                chunk.choices[0].delta.content or ""
                async for chunk in await there.chat.completions.create(**asked, stream=True)
            ]
            return text_of(whole), "".join(pieces)

    expected = text_of(client.chat.completions.create(model="demo", messages=FRANCE, max_tokens=8))
    assert asyncio.run(ask()) == (expected, expected)


def test_an_adapter_answers_to_its_own_name(client, demo, demo_adapter):
    expected = mm.load("demo", adapter=demo_adapter).generate(FRANCE, max_tokens=8).text
    answer = client.chat.completions.create(model="demo:pirate", messages=FRANCE, max_tokens=8)
    assert text_of(answer) == expected != demo.generate(FRANCE, max_tokens=8).text
    assert answer.model == "demo:pirate"


def test_a_seed_gives_the_same_text_alone_and_among_others(client):
    def ask(seed: int) -> str:
        return text_of(
            client.chat.completions.create(
                model="demo", messages=STORY, max_tokens=16, temperature=0.9, seed=seed
            )
        )

    alone = ask(7)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, [1, 2, 3, 7, 4, 5, 6, 8]))
    assert together[3] == alone
    assert len(set(together)) > 4


def test_choice_i_is_drawn_with_seed_plus_i(client):
    def ask(**options: Any) -> list[str]:
        answer = client.chat.completions.create(
            model="demo", messages=STORY, max_tokens=8, temperature=0.9, **options
        )
        assert [choice.index for choice in answer.choices] == list(range(options.get("n", 1)))
        return [choice.message.content for choice in answer.choices]

    several = ask(seed=40, n=3)
    assert several == [*ask(seed=40), *ask(seed=41), *ask(seed=42)]
    assert len(set(several)) > 1


def test_choices_stream_side_by_side(client):
    asked = {"model": "demo", "messages": STORY, "max_tokens": 6, "temperature": 0.9, "seed": 3}
    whole = client.chat.completions.create(**asked, n=3)
    texts = ["", "", ""]
    reasons: list[Any] = [None] * 3
    for chunk in client.chat.completions.create(**asked, n=3, stream=True):
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == ["length"] * 3
    assert whole.usage.completion_tokens == 18


@pytest.mark.parametrize("stop", [" of", [" of", "zebra"]])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_reply_before_them(client, stop, stream):
    asked = {"model": "demo", "messages": FRANCE, "max_tokens": 12, "stop": stop}
    if stream:
        chunks = list(client.chat.completions.create(**asked, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        answer = client.chat.completions.create(**asked)
        text, reason = text_of(answer), answer.choices[0].finish_reason
    assert (text, reason) == ("The capital", "stop")


def test_logprobs_are_the_models_own(client, demo):
    answer = client.chat.completions.create(
        model="demo", messages=FRANCE, max_tokens=4, logprobs=True, top_logprobs=3
    )
    prompt = demo.encode(FRANCE)
    reply = demo.generate(FRANCE, max_tokens=4).token_ids
    logits = demo.model(mx.array([[*prompt, *reply]]))[0, len(prompt) - 1 : -1]
    logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    content = answer.choices[0].logprobs.content
    assert len(content) == len(reply)
    for entry, token, row in zip(content, reply, logprobs, strict=True):
        assert entry.logprob == pytest.approx(row[token], abs=1e-3)
        assert bytes(entry.bytes).decode() == entry.token == demo.tokenizer.decode([token])
        best = np.sort(row)[::-1][:3]
        assert [other.logprob for other in entry.top_logprobs] == pytest.approx(best, abs=1e-3)


def test_logprobs_of_a_stream_are_those_of_the_whole(client):
    asked = {"model": "demo", "messages": FRANCE, "max_tokens": 6, "logprobs": True}
    whole = client.chat.completions.create(**asked, top_logprobs=2).choices[0].logprobs.content
    streamed = [
        entry
        for chunk in client.chat.completions.create(**asked, top_logprobs=2, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in whole]
    for one, other in zip(streamed, whole, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)


def test_bytes_of_half_characters_are_told(client):
    # An emoji is several tokens: with its bytes alone allowed, each is no text by itself.
    answer = client.chat.completions.create(
        model="demo",
        messages=FRANCE,
        max_tokens=8,
        logprobs=True,
        extra_body={"guided_regex": "🦊"},
    )
    content = answer.choices[0].logprobs.content
    assert text_of(answer) == "🦊"
    assert b"".join(bytes(entry.bytes) for entry in content) == "🦊".encode()
    assert all(entry.token.startswith("bytes:\\x") for entry in content if len(content) > 1)


def test_logit_bias_forbids_and_forces_tokens(client, demo):
    [paris] = demo.tokenizer.encode(" Paris", add_bos=False)
    asked = {"model": "demo", "messages": FRANCE, "max_tokens": 12}
    assert "Paris" in text_of(client.chat.completions.create(**asked))
    without = client.chat.completions.create(**asked, logit_bias={str(paris): -100})
    assert "Paris" not in text_of(without)
    always = client.chat.completions.create(**asked, logit_bias={str(paris): 100})
    assert text_of(always).startswith(" Paris Paris")


def test_penalties_change_what_is_said(client):
    asked = {"model": "demo", "messages": STORY, "max_tokens": 24}
    plain = text_of(client.chat.completions.create(**asked))
    for name in ("frequency_penalty", "presence_penalty"):
        assert text_of(client.chat.completions.create(**asked, **{name: 2.0})) != plain


def test_options_of_vllm_are_known(client, demo):
    [paris] = demo.tokenizer.encode(" Paris", add_bos=False)

    def ask(**options: Any) -> Any:
        return client.chat.completions.create(
            model="demo", messages=FRANCE, max_tokens=12, extra_body=options
        )

    assert ask(min_tokens=10).usage.completion_tokens >= 10
    assert ask(ignore_eos=True).usage.completion_tokens == 12
    stopped = ask(stop_token_ids=[paris])
    assert text_of(stopped) == "The capital of France is"
    assert stopped.choices[0].finish_reason == "stop"
    assert ask(top_k=-1, min_p=0.1, repetition_penalty=1.05, skip_special_tokens=True)
    assert text_of(ask(guided_choice=["Berlin", "Paris"])) in ("Berlin", "Paris")


def test_content_may_be_parts_of_text(client):
    parts = [
        {"type": "text", "text": "What is the capital"},
        {"type": "text", "text": " of France?"},
    ]
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": parts}], max_tokens=8
    )
    plain = client.chat.completions.create(model="demo", messages=FRANCE, max_tokens=8)
    assert text_of(answer) == text_of(plain)


def test_an_answer_can_be_sent_back_as_it_came(client, demo):
    first = client.chat.completions.create(model="demo", messages=FRANCE, max_tokens=12)
    question = {"role": "user", "content": "And of Italy?"}
    said = first.choices[0].message
    answer = client.chat.completions.create(
        model="demo", messages=[*FRANCE, said, question], max_tokens=8
    )
    dumped = client.chat.completions.create(
        model="demo", messages=[*FRANCE, said.model_dump(), question], max_tokens=8
    )
    turns = [*FRANCE, {"role": "assistant", "content": said.content}, question]
    assert text_of(answer) == text_of(dumped) == demo.generate(turns, max_tokens=8).text


def test_a_developer_speaks_as_the_system(client):
    def ask(role: str) -> str:
        turns = [{"role": role, "content": "Answer in one word."}, *FRANCE]
        return text_of(client.chat.completions.create(model="demo", messages=turns, max_tokens=8))

    assert ask("developer") == ask("system")


def test_json_formats_are_kept(client):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "big": {"type": "boolean"}},
        "required": ["city", "big"],
        "additionalProperties": False,
    }
    asked = {"model": "demo", "messages": FRANCE, "max_tokens": 60}
    named = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    found = json.loads(text_of(client.chat.completions.create(**asked, response_format=named)))
    assert set(found) == {"city", "big"}
    assert isinstance(found["big"], bool)
    guided = client.chat.completions.create(**asked, extra_body={"guided_json": schema})
    assert json.loads(text_of(guided)) == found
    plain = {"type": "text"}
    assert "Paris" in text_of(client.chat.completions.create(**asked, response_format=plain))
    anything = client.chat.completions.create(**asked, response_format={"type": "json_object"})
    assert text_of(anything).lstrip().startswith("{")


def test_the_clients_own_parse_gets_its_model(client):
    import pydantic

    class City(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=16)
        capital: bool

    answer = client.chat.completions.parse(
        model="demo", messages=FRANCE, max_tokens=60, response_format=City
    )
    assert isinstance(answer.choices[0].message.parsed, City)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 0}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 2.5}, "max_tokens"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop": ""}, "stop"),
    ({"seed": 1.5}, "seed"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"logit_bias": {"word": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"function_call": "auto"}, "function_call"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"verbosity": "low"}, "verbosity"),
    ({"prediction": {"type": "content", "content": ""}}, "prediction"),
    ({"web_search_options": {"a": 1}}, "web_search_options"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"beam_width": 4}, "beam_width"),
]


@pytest.mark.parametrize(("options", "field"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_honoured_is_refused_by_name(client, options, field):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model="demo", messages=FRANCE, extra_body={"max_tokens": 2, **options}
        )
    error = refused.value
    assert error.param == field
    assert field in error.message
    assert error.type == "invalid_request_error"


def test_what_changes_nothing_is_accepted(client):
    options = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "safety_identifier": "x",
        "prompt_cache_key": "x",
        "parallel_tool_calls": True,
        "modalities": ["text"],
        "tools": [],
        "tool_choice": "none",
        "stop": None,
        "n": 1,
        "reasoning_effort": None,
    }
    asked = {"model": "demo", "messages": FRANCE, "max_tokens": 4}
    plain = client.chat.completions.create(**asked)
    assert text_of(client.chat.completions.create(**asked, extra_body=options)) == text_of(plain)


def test_tools_that_must_not_be_called_need_no_template(client):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    asked = {"model": "demo", "messages": FRANCE, "max_tokens": 4}
    without = client.chat.completions.create(**asked, tools=tools, tool_choice="none")
    assert text_of(without) == text_of(client.chat.completions.create(**asked))


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": 5}], "content"),
        ([{"role": "user", "content": None}], "content"),
        ([{"role": "robot", "content": "Hi"}], "messages"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "text"),
        ([{"role": "assistant", "content": "Hi", "audio": {"id": "x"}}], "audio"),
    ],
    ids=str,
)
def test_messages_that_cannot_be_read_are_refused(client, messages, field):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="demo", messages=messages, max_tokens=2)
    assert field in refused.value.message


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="../demo", messages=FRANCE)
    assert refused.value.code == "model_not_found"
    assert "demo" in refused.value.message


def test_a_prompt_beyond_the_context_says_so(client):
    long = [{"role": "user", "content": "word " * 9000}]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="demo", messages=long)
    assert refused.value.code == "context_length_exceeded"


def test_a_full_queue_is_a_rate_limit(
    serving: Callable[..., AbstractContextManager[Live]],
):
    with (
        serving(width=1, queue=1) as live,
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client,
    ):
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(model="demo", messages=STORY, n=8, max_tokens=2)
        assert refused.value.response.headers["retry-after"]
        assert client.chat.completions.create(model="demo", messages=FRANCE, max_tokens=1)


def test_leaving_a_stream_early_ends_its_work(server, client):
    stream = client.chat.completions.create(
        model="demo",
        messages=STORY,
        stream=True,
        max_tokens=4000,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    for _ in range(100):
        if not server.service.state()["running"]:
            return
        time.sleep(0.05)
    pytest.fail("the reply that nobody reads goes on")


# What errors name

USER = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("path", "body", "field", "said"),
    [
        (
            "chat/completions",
            {"messages": USER, "response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "is missing",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": None}]},
            "messages[0].content",
            "expected text, or a list of parts",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "messages[0].content[0].text",
            "valid string",
        ),
        (
            "chat/completions",
            {"messages": USER, "tools": [{"type": "function"}]},
            "tools[0].function",
            "is missing",
        ),
        (
            "chat/completions",
            {"messages": USER, "guided_regex": "[a-z"},
            "guided_regex",
            "cannot follow this form: unclosed character class",
        ),
        (
            "chat/completions",
            {"messages": USER, "guided_json": {"type": "foo"}},
            "guided_json",
            "Invalid type: foo",
        ),
        ("completions", {"prompt": "a", "guided_grammar": "start: b"}, "guided_grammar", '"b"'),
        (
            "completions",
            {"prompt": "a", "guided_regex": "a", "guided_choice": ["b"]},
            "guided_choice",
            "give one",
        ),
        (
            "chat/completions",
            {"messages": USER, "logit_bias": {"999999": 1}},
            "logit_bias",
            "token ids must be",
        ),
        ("completions", {"prompt": [999999]}, "prompt", "token ids must be"),
        ("completions", {"prompt": 5}, "prompt", "expected text, token ids"),
        ("completions", {"prompt": [5] * 9000}, "prompt", "9000 tokens"),
        ("embeddings", {"input": [5] * 9000}, "input", "9000 tokens"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "a " * 9000}]},
            "messages",
            "shorten it",
        ),
        ("responses", {"input": "a " * 9000}, "input", "shorten it"),
    ],
)
def test_an_error_names_the_field_as_the_client_wrote_it(
    server: Live, path: str, body: dict[str, object], field: str, said: str
) -> None:
    answer = server.ask("POST", f"/v1/{path}", {"model": "demo", **body})
    assert answer.status == 400
    error = answer.json["error"]
    assert error["param"] == field
    assert said in error["message"]
    assert "llguidance" not in error["message"]


def test_a_reply_without_a_number_has_the_servers(serving: Callable[..., Any]) -> None:
    story = {"model": "demo", "messages": [{"role": "user", "content": "Tell me a long story."}]}
    with serving(max_tokens=3) as live:
        for more, expected in (({}, 3), ({"max_tokens": 5}, 5)):
            reply = live.ask("POST", "/v1/chat/completions", story | more).json
            assert reply["usage"]["completion_tokens"] == expected
            assert reply["choices"][0]["finish_reason"] == "length"
