"""What is peculiar to OpenAI's chat API; OpenAI's own client reads it."""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, Any, Literal

import pytest

pytest.importorskip("fastapi")

if TYPE_CHECKING:
    from support.serving import Live

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
STORY = [{"role": "user", "content": "Tell me a story about a fox."}]


def chat(server: Live, messages: Any = STORY, **options: Any) -> Any:
    answer = server.ask("POST", "/v1/chat/completions", {"messages": messages, **options})
    assert answer.status == 200, answer.body
    return answer.json


def text_of(answer: Any) -> str:
    return str(answer["choices"][0]["message"]["content"])


def test_the_client_reads_models_wholes_streams_and_forms(tiny_server, tiny):
    openai = pytest.importorskip("openai")
    import pydantic

    class City(pydantic.BaseModel):
        name: Literal["Paris", "Rome"]

    whole = tiny.generate(STORY, max_tokens=16).text
    stop = whole[8:10]  # the client's helpers want replies that end before their length
    expected = whole[: whole.index(stop)]
    at = {"base_url": f"{tiny_server.url}/v1", "api_key": "none", "max_retries": 0}
    asked = {"model": "tiny", "messages": STORY, "stop": stop}

    async def ask() -> str:
        async with openai.AsyncOpenAI(**at) as client:
            stream = await client.chat.completions.create(**asked, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    with openai.OpenAI(**at) as client:
        assert [model.id for model in client.models.list()] == ["tiny", "tiny:other"]
        assert client.models.retrieve("tiny:other").id == "tiny:other"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-4")
        first = client.chat.completions.create(**asked).choices[0].message
        with client.chat.completions.stream(**asked) as stream:
            list(stream)
            last = stream.get_final_completion().choices[0].message
        assert first.content == last.content == asyncio.run(ask()) == expected
        parsed = client.chat.completions.parse(model="tiny", messages=STORY, response_format=City)
        assert isinstance(parsed.choices[0].message.parsed, City)
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(**asked, temperature=-1)
        assert refused.value.param == "temperature"
        # An answer can be sent back as it came.
        more = {"role": "user", "content": "And of Italy?"}
        turns = [*STORY, {"role": "assistant", "content": expected}, more]
        for said in (first, first.model_dump()):
            answer = client.chat.completions.create(
                model="tiny", messages=[*STORY, said, more], max_tokens=6
            )
            assert answer.choices[0].message.content == tiny.generate(turns, max_tokens=6).text


def test_a_prompt_that_was_read_before_is_cached_unless_nothing_is(tiny_server, tiny):
    from support.serving import serving

    messages = [{"role": "user", "content": "A question that no other test asks: " + "why? " * 40}]

    def cached(live: Live) -> list[int]:
        replies = [chat(live, messages, max_tokens=3) for _ in range(2)]
        assert text_of(replies[0]) == text_of(replies[1])
        return [reply["usage"]["prompt_tokens_details"]["cached_tokens"] for reply in replies]

    assert cached(tiny_server)[1] > 200
    with serving(tiny, cache_bytes=0) as forgetful:
        assert cached(forgetful) == [0, 0]


def test_a_reply_without_a_number_has_the_servers(tiny):
    from support.serving import serving

    with serving(tiny, max_tokens=3) as live:
        for more, expected in (({}, 3), ({"max_completion_tokens": 5}, 5)):
            reply = chat(live, **more)
            assert reply["usage"]["completion_tokens"] == expected
            assert reply["choices"][0]["finish_reason"] == "length"


def test_log_probabilities_name_tokens_and_the_likeliest_others(server, demo):
    answer = chat(server, FRANCE, max_tokens=4, logprobs=True, top_logprobs=3)
    reply = demo.generate(FRANCE, max_tokens=4).token_ids
    content = answer["choices"][0]["logprobs"]["content"]
    for entry, token in zip(content, reply, strict=True):
        assert bytes(entry["bytes"]).decode() == entry["token"] == demo.tokenizer.decode([token])
        best = [other["logprob"] for other in entry["top_logprobs"]]
        assert best == sorted(best, reverse=True)
        assert entry["logprob"] == best[0]  # the reply is greedy
        assert len(best) == 3


def test_bytes_of_half_characters_are_told(tiny_server):
    pytest.importorskip("llguidance")
    answer = chat(tiny_server, max_tokens=8, logprobs=True, guided_regex="🦊")
    content = answer["choices"][0]["logprobs"]["content"]
    assert text_of(answer) == "🦊"
    assert b"".join(bytes(entry["bytes"]) for entry in content) == "🦊".encode()
    assert [entry["token"][:8] for entry in content[:4]] == ["bytes:\\x"] * 4


def test_logit_bias_and_penalties_change_what_is_said(tiny_server, tiny):
    first, second, *_ = tiny.generate(STORY, max_tokens=2).token_ids
    plain = text_of(chat(tiny_server, max_tokens=12))
    without = chat(tiny_server, max_tokens=1, logit_bias={str(first): -100})
    assert text_of(without) != tiny.tokenizer.decode([first])
    always = chat(tiny_server, max_tokens=3, logit_bias={str(second): 100})
    assert text_of(always) == tiny.tokenizer.decode([second] * 3)
    for name in ("frequency_penalty", "presence_penalty"):
        assert text_of(chat(tiny_server, max_tokens=12, **{name: 2.0})) != plain


def test_options_of_vllm_are_known(tiny_server, tiny):
    def ask(**options: Any) -> tuple[str, str, int]:
        answer = chat(tiny_server, max_tokens=6, **options)
        reason = answer["choices"][0]["finish_reason"]
        return text_of(answer), reason, answer["usage"]["completion_tokens"]

    reply, (eos,) = tiny.generate(STORY, max_tokens=6), tiny.tokenizer.eos_ids
    end_at = {"logit_bias": {str(eos): 100}}
    assert ask(**end_at) == ("", "stop", 0)
    assert ask(**end_at, ignore_eos=True)[1:] == ("length", 6)
    assert ask(**end_at, min_tokens=3)[2] == 3
    before = tiny.tokenizer.decode(reply.token_ids[:2])
    assert ask(stop_token_ids=[reply.token_ids[2]]) == (before, "stop", 2)
    assert ask(top_k=-1, min_p=0.1, skip_special_tokens=True)[0] == reply.text


def test_a_last_message_is_continued_if_it_is_said(tiny_server, tiny):
    begun = {"role": "assistant", "content": "The capital of Spain is "}
    expected = tiny.generate(tiny.tokenizer.chat_text(STORY) + begun["content"], max_tokens=6).text
    for more in ({}, {"add_generation_prompt": False}):
        reply = chat(
            tiny_server, [*STORY, begun], max_tokens=6, continue_final_message=True, **more
        )
        assert text_of(reply) == expected
    plain = chat(tiny_server, [*STORY, begun], max_tokens=6, add_generation_prompt=True)
    assert text_of(plain) == tiny.generate([*STORY, begun], max_tokens=6).text
    for messages, more, field in (
        (STORY, {"continue_final_message": True}, "continue_final_message"),
        ([*STORY, begun], {"add_generation_prompt": False}, "add_generation_prompt"),
        (
            [*STORY, begun],
            {"continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt",
        ),
    ):
        answer = tiny_server.ask("POST", "/v1/chat/completions", {"messages": messages, **more})
        assert (answer.status, answer.json["error"]["param"]) == (400, field)


def test_roles_and_parts_are_read(tiny_server):
    parts = [{"type": "text", "text": "Tell me a story"}, {"type": "text", "text": " about a fox."}]
    apart = chat(tiny_server, [{"role": "user", "content": parts}], max_tokens=6)
    assert text_of(apart) == text_of(chat(tiny_server, max_tokens=6))
    system, developer = (
        chat(tiny_server, [{"role": role, "content": "One word."}, *STORY], max_tokens=6)
        for role in ("system", "developer")
    )
    assert text_of(system) == text_of(developer) != text_of(apart)


def test_a_form_is_given_in_several_ways(tiny_server):
    pytest.importorskip("llguidance")
    for form, fits in (
        ({"response_format": {"type": "json_object"}}, "{.*"),
        ({"guided_json": {"enum": [1, 2]}}, "1|2"),
        ({"guided_choice": ["Berlin", "Paris"]}, "Berlin|Paris"),
    ):
        text = text_of(chat(tiny_server, max_tokens=9, **form))
        assert re.fullmatch(fits, text.strip(), re.DOTALL)


def test_an_error_names_the_field_as_the_client_wrote_it(tiny_server):
    for path, body, field in (
        ("chat/completions", {"response_format": {"type": "json_schema"}}, "response_format"),
        ("chat/completions", {"messages": [{"role": "user", "content": None}]}, "messages[0]."),
        ("chat/completions", {"messages": [{"role": "user", "content": "a" * 9000}]}, "messages"),
        ("chat/completions", {"model": "../tiny"}, "model"),
        ("completions", {"prompt": [5] * 9000}, "prompt"),
        ("embeddings", {"input": "a" * 9000}, "input"),
        ("responses", {"input": "a " * 9000}, "input"),
    ):
        messages = {"messages": STORY} if path.startswith("chat") else {}
        error = tiny_server.ask("POST", f"/v1/{path}", messages | body).json["error"]
        assert error["param"].startswith(field)
        unknown, long = field == "model", "9000" in json.dumps(error) or "shorten" in str(error)
        assert error["type"] == "not_found_error" if unknown else "invalid_request_error"
        code = "model_not_found" if unknown else "context_length_exceeded" if long else None
        assert code in (error["code"], None)


def test_without_a_chat_template_the_api_that_needs_none_is_named(tiny_server, monkeypatch):
    monkeypatch.setattr(tiny_server.service.lm.tokenizer, "template", None)
    answer = tiny_server.ask("POST", "/v1/chat/completions", {"messages": FRANCE})
    assert answer.status == 400
    assert "no chat template" in answer.json["error"]["message"]
    assert "/v1/completions" in answer.json["error"]["message"]
