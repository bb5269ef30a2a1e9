"""OpenAI's completions API, which lm-eval reads log probabilities from; and the tokenizer's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import pytest

import minicpm_mlx as mm

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

if TYPE_CHECKING:
    from support.serving import Live

FRANCE = "The capital of France is"


@pytest.fixture
def client(server: Live) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def own_logprobs(demo: mm.LM, ids: list[int]) -> np.ndarray:
    """(len(ids), V) of what follows each token, by one plain pass of the model."""
    logits = demo.model(mx.array([ids]))[0].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def test_text_is_continued_as_generate_does(client, demo):
    answer = client.completions.create(model="demo", prompt=FRANCE, max_tokens=8)
    assert answer.choices[0].text == demo.generate(FRANCE, max_tokens=8).text
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs is None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 8)


def test_sixteen_tokens_are_the_default(client):
    answer = client.completions.create(model="demo", prompt=FRANCE)
    assert answer.usage.completion_tokens == 16


def test_prompts_may_be_text_or_ids_one_or_many(client, demo):
    texts = [FRANCE, "1 2 3 4"]
    ids = [demo.encode(text) for text in texts]
    expected = [demo.generate(text, max_tokens=2).text for text in texts]

    def ask(prompt: Any, **options: Any) -> list[str]:
        answer = client.completions.create(model="demo", prompt=prompt, max_tokens=2, **options)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    assert ask(texts) == ask(ids) == expected
    assert ask(ids[0]) == ask([texts[0]]) == expected[:1]
    assert ask(texts, n=2) == [expected[0], expected[0], expected[1], expected[1]]
    echoed = [text + reply for text, reply in zip(texts, expected, strict=True)]
    assert ask(texts, extra_body={"echo": True}) == ask(ids, echo=True) == echoed


@pytest.mark.parametrize("options", [{}, {"echo": True}, {"echo": True, "logprobs": 2, "n": 2}])
def test_a_stream_is_the_whole_in_pieces(client, options):
    asked = {"model": "demo", "prompt": [FRANCE, "1 2 3"], "max_tokens": 5, **options}
    whole = client.completions.create(**asked)
    texts: dict[int, str] = {}
    offsets: dict[int, list[int]] = {}
    reasons: dict[int, str] = {}
    *chunks, last = client.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    for chunk in chunks:
        [choice] = chunk.choices
        texts[choice.index] = texts.get(choice.index, "") + choice.text
        if choice.logprobs:
            offsets.setdefault(choice.index, []).extend(choice.logprobs.text_offset)
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    assert [texts[choice.index] for choice in whole.choices] == [
        choice.text for choice in whole.choices
    ]
    if "logprobs" in options:
        assert [offsets[choice.index] for choice in whole.choices] == [
            choice.logprobs.text_offset for choice in whole.choices
        ]
    assert set(reasons.values()) == {"length"}
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens == 10


def test_echoed_logprobs_are_those_of_the_models_logits(client, demo):
    text = "The capital of France is Paris, and 你好 too."
    answer = client.completions.create(
        model="demo", prompt=text, max_tokens=1, echo=True, logprobs=5
    )
    found = answer.choices[0].logprobs
    ids = demo.encode(text)
    rows = own_logprobs(demo, ids)
    assert found.token_logprobs[0] is None
    assert found.top_logprobs[0] is None
    assert len(found.tokens) == len(ids) + 1
    expected = [rows[i, ids[i + 1]] for i in range(len(ids) - 1)] + [rows[-1].max()]
    assert found.token_logprobs[1:] == pytest.approx(expected, abs=1e-3)
    for row, top, own in zip(rows, found.top_logprobs[1:], found.token_logprobs[1:], strict=True):
        best = np.sort(row)[::-1][:5]
        assert len(top) in (5, 6)
        assert sorted(top.values())[::-1][:5] == pytest.approx(best, abs=1e-3)
        assert own in top.values()


def test_offsets_point_into_the_text(client, demo):
    text = "Hello there, 你好 🦊."
    answer = client.completions.create(
        model="demo", prompt=text, max_tokens=3, echo=True, logprobs=0
    )
    choice = answer.choices[0]
    for name, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        if not name.startswith("bytes:"):
            assert choice.text[offset:].startswith(name)
    assert any(name.startswith("bytes:\\x") for name in choice.logprobs.tokens)


def test_max_tokens_0_with_echo_only_scores(client, demo):
    answer = client.completions.create(
        model="demo", prompt=FRANCE, max_tokens=0, echo=True, logprobs=0
    )
    choice = answer.choices[0]
    assert choice.text == FRANCE
    assert len(choice.logprobs.tokens) == len(demo.encode(FRANCE))
    assert answer.usage.completion_tokens == 0


def test_scoring_has_an_entry_for_the_end_of_text_too(client, demo):
    # What follows a finished reply is end of text; lm-eval leaves the last entry out all the same.
    chat = demo.encode([{"role": "user", "content": "What is the capital of France?"}])
    ids = [*chat, *demo.generate(chat, max_tokens=24).token_ids]
    answer = client.completions.create(
        model="demo", prompt=ids, max_tokens=1, echo=True, logprobs=1
    )
    choice = answer.choices[0]
    assert len(choice.logprobs.tokens) == len(ids) + 1
    assert choice.logprobs.tokens[-1] == "<|im_end|>"
    assert choice.finish_reason == "stop"
    assert choice.logprobs.token_logprobs[-1] == pytest.approx(
        own_logprobs(demo, ids)[-1].max(), abs=1e-3
    )


def test_a_seed_draws_choice_i_with_seed_plus_i(client):
    def ask(**options: Any) -> list[str]:
        answer = client.completions.create(
            model="demo", prompt="A fox", max_tokens=8, temperature=0.9, **options
        )
        return [choice.text for choice in answer.choices]

    assert ask(seed=9, n=2) == [*ask(seed=9), *ask(seed=10)]
    assert ask(seed=-1) == ask(seed=-1)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [1, -1]}, "token ids"),
        ({"prompt": [49152]}, "token ids"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"echo": "yes"}, "echo"),
        ({"top_logprobs": 3}, "top_logprobs"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_by_name(client, options, field):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="demo", prompt="A", extra_body={"max_tokens": 1, **options})
    assert field in refused.value.message


def test_best_of_n_is_n(client):
    assert client.completions.create(model="demo", prompt="A", max_tokens=1, best_of=2, n=2)


def test_guided_text_follows_its_guide(client):
    def ask(**guide: Any) -> str:
        return (
            client.completions.create(model="demo", prompt=FRANCE, max_tokens=24, extra_body=guide)
            .choices[0]
            .text
        )

    assert ask(guided_regex="[A-C]{3}").isupper()
    assert ask(guided_choice=["red", "blue"]) in ("red", "blue")
    assert ask(guided_grammar='start: "yes" | "no"') in ("yes", "no")
    assert json.loads(ask(guided_json={"type": "integer", "minimum": 3, "maximum": 7})) in range(
        3, 8
    )
    for wrong in ({"guided_regex": "("}, {"guided_regex": "a", "guided_choice": ["b"]}):
        with pytest.raises(openai.BadRequestError):
            ask(**wrong)


def test_the_tokenizer_is_served(server, demo):
    info = server.ask("GET", "/tokenizer_info").json
    assert info["eos_token"] == "<|im_end|>"
    assert info["chat_template"] == demo.tokenizer.template.source
    found = server.ask("POST", "/tokenize", {"prompt": "Hello <|im_end|>你好"}).json
    assert found["tokens"] == demo.encode("Hello <|im_end|>你好")
    assert found["count"] == len(found["tokens"])
    back = server.ask("POST", "/detokenize", {"tokens": found["tokens"]}).json
    assert back == {"prompt": "Hello <|im_end|>你好"}
    turns = [{"role": "user", "content": "Hi"}]
    asked = {"messages": turns, "return_token_strs": True}
    chat = server.ask("POST", "/tokenize", asked).json
    assert chat["tokens"] == demo.encode(turns)
    assert "".join(chat["token_strs"]) == demo.tokenizer.chat_text(turns)


def test_text_is_tokenized_with_bos_unless_told_otherwise(server, demo, monkeypatch):
    monkeypatch.setattr(demo.tokenizer, "adds_bos", True)
    bos = demo.tokenizer.bos_id
    plain = server.ask("POST", "/tokenize", {"prompt": "Hi"}).json["tokens"]
    asked = {"prompt": "Hi", "add_special_tokens": False}
    without = server.ask("POST", "/tokenize", asked).json["tokens"]
    assert plain == [bos, *without]
    scored = {"prompt": "Hi", "max_tokens": 0, "echo": True, "logprobs": 0}
    found = server.ask("POST", "/v1/completions", scored).json["choices"][0]
    assert found["logprobs"]["tokens"] == ["<|im_start|>", "Hi"]
    assert found["logprobs"]["text_offset"] == [0, 0]
    assert found["text"] == "Hi"


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": []}, {"prompt": 5}])
def test_nothing_to_tokenize_is_refused(server, body):
    assert server.ask("POST", "/tokenize", body).status == 400
