"""What is peculiar to OpenAI's completions API: echo and scores; and the tokenizer's routes."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import pytest

import minicpm_mlx as mm
from support.tiny_tokenizer import tiny as tiny_tokenizer

pytest.importorskip("fastapi")

if TYPE_CHECKING:
    from support.serving import Live

FRANCE = "The capital of France is"


def complete(server: Live, prompt: Any, **options: Any) -> Any:
    answer = server.ask("POST", "/v1/completions", {"prompt": prompt, **options})
    assert answer.status == 200, answer.body
    return answer.json


def texts(answer: Any) -> list[str]:
    assert [choice["index"] for choice in answer["choices"]] == [*range(len(answer["choices"]))]
    return [choice["text"] for choice in answer["choices"]]


def own_logprobs(lm: mm.LM, ids: list[int]) -> np.ndarray:
    """(len(ids), V) of what follows each token, by one plain pass of the model."""
    logits = lm.model(mx.array([ids]))[0].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def test_sixteen_tokens_are_the_default(tiny_server):
    assert complete(tiny_server, FRANCE)["usage"]["completion_tokens"] == 16


def test_prompts_may_be_text_or_ids_one_or_many(tiny_server, tiny):
    given = [FRANCE, "1 2 3 4"]
    ids = [tiny.encode(text) for text in given]
    expected = [tiny.generate(text, max_tokens=2).text for text in given]

    def ask(prompt: Any, **options: Any) -> list[str]:
        return texts(complete(tiny_server, prompt, max_tokens=2, **options))

    assert ask(given) == ask(ids) == expected
    assert ask(ids[0]) == ask([given[0]]) == expected[:1]
    assert ask(given, n=2) == [expected[0], expected[0], expected[1], expected[1]]
    echoed = [text + reply for text, reply in zip(given, expected, strict=True)]
    assert ask(given, echo=True) == ask(ids, echo=True) == echoed


@pytest.mark.parametrize("options", [{"echo": True}, {"echo": True, "logprobs": 2, "n": 2}])
def test_a_stream_is_the_whole_in_pieces(tiny_server, options):
    asked = {"prompt": [FRANCE, "1 2 3"], "max_tokens": 5, **options}
    whole = complete(tiny_server, **asked)["choices"]
    body = tiny_server.ask("POST", "/v1/completions", asked | {"stream": True}).body.decode()
    events = [json.loads(line[6:]) for line in body.split("\n\n") if line.startswith("data: {")]
    joined = [{"text": "", "offsets": []} for _ in whole]
    for event in events:
        [choice] = event["choices"]
        joined[choice["index"]]["text"] += choice["text"]
        joined[choice["index"]]["offsets"] += (choice["logprobs"] or {}).get("text_offset", [])
    for found, choice in zip(joined, whole, strict=True):
        assert found["text"] == choice["text"]
        assert found["offsets"] == (choice["logprobs"] or {}).get("text_offset", [])


def test_echoed_logprobs_are_those_of_the_models_logits(server, demo):
    text = "The capital of France is Paris, and 你好 🦊 too."
    choice = complete(server, text, max_tokens=1, echo=True, logprobs=5)["choices"][0]
    found, ids = choice["logprobs"], demo.encode(text)
    rows = own_logprobs(demo, ids)
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    expected = [rows[i, ids[i + 1]] for i in range(len(ids) - 1)] + [rows[-1].max()]
    own = found["token_logprobs"][1:]
    assert own == pytest.approx(expected, abs=1e-3)
    for row, top, logprob in zip(rows, found["top_logprobs"][1:], own, strict=True):
        best = np.sort(row)[::-1][:5]
        assert len(top) in (5, 6)
        assert sorted(top.values())[::-1][:5] == pytest.approx(best, abs=1e-3)
        assert logprob in top.values()
    for name, offset in zip(found["tokens"], found["text_offset"], strict=True):
        if not name.startswith("bytes:"):
            assert choice["text"][offset:].startswith(name)
    assert any(name.startswith("bytes:\\x") for name in found["tokens"])


def test_max_tokens_0_with_echo_only_scores(tiny_server, tiny):
    answer = complete(tiny_server, FRANCE, max_tokens=0, echo=True, logprobs=0)
    assert texts(answer) == [FRANCE]
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == len(tiny.encode(FRANCE))
    assert answer["usage"]["completion_tokens"] == 0


def test_scoring_has_an_entry_for_the_end_of_text_too(server, demo):
    # What follows a finished reply is end of text; lm-eval leaves the last entry out all the same.
    chat = demo.encode([{"role": "user", "content": "What is the capital of France?"}])
    ids = [*chat, *demo.generate(chat, max_tokens=24).token_ids]
    choice = complete(server, ids, max_tokens=1, echo=True, logprobs=1)["choices"][0]
    found = choice["logprobs"]
    assert len(found["tokens"]) == len(ids) + 1
    assert found["tokens"][-1] == "<|im_end|>"
    assert choice["finish_reason"] == "stop"
    assert found["token_logprobs"][-1] == pytest.approx(own_logprobs(demo, ids)[-1].max(), abs=1e-3)


def test_a_text_goes_on_with_its_space_and_a_reply_begins_without(tiny):
    """With a tokenizer of SentencePiece, whose decoder drops the first space of a text."""
    from support.serving import serving

    lm = replace(tiny, tokenizer=tiny_tokenizer())
    word, *_ = lm.tokenizer.encode("a", add_bos=False)
    always = {"logit_bias": {str(word): 100}, "max_tokens": 2}
    sampling = mm.Sampling(logit_bias={word: 100.0})
    assert lm.generate("b", max_tokens=2, sampling=sampling).text == " a a"
    [reply] = lm.generate_batch(["b"], max_tokens=2, sampling=sampling)
    assert reply.text == " a a"
    with serving(lm) as live:
        assert texts(complete(live, "b", **always)) == [" a a"]
        assert texts(complete(live, "b", echo=True, **always)) == ["b a a"]
        scored = complete(live, "b", logprobs=0, **always)["choices"][0]
        assert scored["logprobs"]["text_offset"] == [0, 2]
        params = {"logit_bias": {str(word): 100}, "max_new_tokens": 2}
        body = {"text": "b", "sampling_params": params}
        assert live.ask("POST", "/generate", body).json["text"] == " a a"
        chat = {"messages": [{"role": "user", "content": "b"}], **always}
        answer = live.ask("POST", "/v1/chat/completions", chat).json
        assert answer["choices"][0]["message"]["content"] == "a a"
    messages = [{"role": "user", "content": "b"}]
    assert lm.generate(messages, max_tokens=2, sampling=sampling).text == "a a"


def test_any_64_bits_are_a_seed(tiny_server):
    asked = {"prompt": "A fox", "max_tokens": 8, "temperature": 0.9}
    for seed in (-1, 2**64 - 1):
        first, again = (complete(tiny_server, **asked, seed=seed) for _ in range(2))
        assert texts(first) == texts(again)


def test_guided_text_follows_its_guide(tiny_server):
    pytest.importorskip("llguidance")

    def ask(**guide: Any) -> str:
        return texts(complete(tiny_server, FRANCE, max_tokens=24, **guide))[0]

    assert ask(guided_regex="[A-C]{3}").isupper()
    assert ask(guided_choice=["red", "blue"]) in ("red", "blue")
    assert ask(guided_grammar='start: "yes" | "no"') in ("yes", "no")
    assert int(ask(guided_json={"type": "integer", "minimum": 3, "maximum": 7})) in range(3, 8)


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
    for body in ({}, {"prompt": "a", "messages": []}, {"prompt": 5}):
        assert server.ask("POST", "/tokenize", body).status == 400


def test_text_is_tokenized_with_bos_unless_told_otherwise(server, demo, monkeypatch):
    monkeypatch.setattr(demo.tokenizer, "adds_bos", True)
    bos = demo.tokenizer.bos_id
    plain = server.ask("POST", "/tokenize", {"prompt": "Hi"}).json["tokens"]
    asked = {"prompt": "Hi", "add_special_tokens": False}
    without = server.ask("POST", "/tokenize", asked).json["tokens"]
    assert plain == [bos, *without]
    scored = complete(server, "Hi", max_tokens=0, echo=True, logprobs=0)["choices"][0]
    assert scored["logprobs"]["tokens"] == ["<|im_start|>", "Hi"]
    assert scored["logprobs"]["text_offset"] == [0, 0]
    assert scored["text"] == "Hi"
