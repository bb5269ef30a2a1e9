"""What is peculiar to SGLang's API, asked by plain HTTP and by SGLang's own frontend."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from support.apis import sse

pytest.importorskip("fastapi")

if TYPE_CHECKING:
    from support.serving import Live

FRANCE = "The capital of France is"
SPAIN = "The capital of Spain is"
FOX = "Once upon a time there was a fox"
SHORT = {"max_new_tokens": 4}


def generate(server: Live, method: str = "POST", **body: Any) -> Any:
    answer = server.ask(method, "/generate", body)
    assert answer.status == 200, answer.body
    return answer.json


# Plain HTTP


def test_texts_and_ids_may_be_one_or_lists(tiny_server, tiny):
    texts = [FRANCE, SPAIN]
    expected = [tiny.generate(text, max_tokens=4).text for text in texts]
    ids = [tiny.encode(text) for text in texts]
    for prompts in ({"text": texts}, {"input_ids": ids}):
        found = generate(tiny_server, **prompts, sampling_params=SHORT)
        assert [reply["text"] for reply in found] == expected
    assert (
        generate(tiny_server, "PUT", input_ids=ids[0], sampling_params=SHORT)["text"] == expected[0]
    )
    (found,) = generate(tiny_server, text=[FRANCE], sampling_params=SHORT, rid="mine")
    assert (found["text"], found["meta_info"]["id"]) == (expected[0], "mine")


def test_each_prompt_may_have_its_own_parameters(tiny_server, tiny):
    found = generate(
        tiny_server,
        text=[FRANCE, SPAIN],
        sampling_params=[{"max_new_tokens": 2}, {"max_new_tokens": 5}],
        return_logprob=[True, False],
        rid=["a", "b"],
        lora_path=[None, "other"],
    )
    metas = [reply["meta_info"] for reply in found]
    assert [meta["completion_tokens"] for meta in metas] == [2, 5]
    assert ["output_token_logprobs" in meta for meta in metas] == [True, False]
    assert [meta["id"] for meta in metas] == ["a", "b"]
    assert found[1]["text"] != tiny.generate(SPAIN, max_tokens=5).text
    assert metas[0]["finish_reason"] == {"type": "length", "length": 2}
    assert metas[0]["e2e_latency"] > 0


def test_a_stream_of_several_says_which_is_which(tiny_server, tiny):
    body = {"text": [FRANCE, SPAIN], "sampling_params": SHORT, "stream": True}
    events = sse(tiny_server.ask("POST", "/generate", body).body)
    last = {event["index"]: event["text"] for event in events}
    texts = enumerate([FRANCE, SPAIN])
    assert last == {i: tiny.generate(text, max_tokens=4).text for i, text in texts}


def test_log_probabilities_of_the_prompt_begin_where_it_is_said(tiny_server, tiny):
    import mlx.core as mx

    def meta(**more: Any) -> Any:
        asked = {"text": FRANCE, "return_logprob": True, "sampling_params": {"max_new_tokens": 1}}
        return generate(tiny_server, **(asked | more))["meta_info"]

    ids = tiny.encode(FRANCE)
    found = meta(logprob_start_len=0, top_logprobs_num=2, return_text_in_logprobs=True)
    read = found["input_token_logprobs"]
    logits = tiny.model(mx.array([ids]))[0, :-1].astype(mx.float32)
    own = mx.take_along_axis(logits, mx.array(ids[1:])[:, None], axis=-1)[:, 0]
    expected = np.array(own - mx.logsumexp(logits, axis=-1))
    assert read[0][0] is None
    np.testing.assert_allclose([entry[0] for entry in read[1:]], expected, atol=2e-3)
    assert [entry[1] for entry in read] == ids
    assert "".join(entry[2] for entry in read) == FRANCE
    assert found["input_top_logprobs"][0] is None
    for best in [*found["input_top_logprobs"][1:], *found["output_top_logprobs"]]:
        assert len(best) == 2
        assert best[0][0] >= best[1][0]

    def count(**more: Any) -> int:
        return len(meta(**more)["input_token_logprobs"])

    assert count() == count(logprob_start_len=-1) == 1
    assert count(logprob_start_len=2) == len(ids) - 2
    # With nothing to say there is nothing else to tell.
    assert count(sampling_params={"max_new_tokens": 0}) == len(ids)


def test_ends_are_told_apart(tiny_server, tiny):
    def end(**params: Any) -> tuple[Any, int]:
        meta = generate(tiny_server, text=FOX, sampling_params=params)["meta_info"]
        return meta["finish_reason"], meta["completion_tokens"]

    whole = tiny.generate(FOX, max_tokens=12)
    stop, (eos,) = whole.text[5:7], tiny.tokenizer.eos_ids
    ended, _ = end(max_new_tokens=12, stop=["¤", stop])
    assert ended == {"type": "stop", "matched": stop}
    end_at = {"max_new_tokens": 6, "logit_bias": {str(eos): 100}}
    assert end(**end_at) == ({"type": "stop", "matched": eos}, 0)
    assert end(**end_at, ignore_eos=True) == ({"type": "length", "length": 6}, 6)
    assert end(**end_at, min_new_tokens=3)[1] == 3
    assert end(max_new_tokens=6, stop_token_ids=[whole.token_ids[2]])[1] == 2
    shown = {**end_at, "ignore_eos": True, "skip_special_tokens": False}
    assert "</s>" in generate(tiny_server, text=FOX, sampling_params=shown)["text"]


def test_grammars_are_followed(tiny_server):
    pytest.importorskip("llguidance")

    def said(**grammar: str) -> str:
        params = {"max_new_tokens": 24, **grammar}
        return str(generate(tiny_server, text=FRANCE, sampling_params=params)["text"])

    assert said(regex=r"(Rome|Madrid)\.") in ("Rome.", "Madrid.")
    assert said(ebnf='root ::= "yes" | "no"') in ("yes", "no")
    assert said(json_schema="$$ANY$$").lstrip().startswith("{")


def test_the_server_tells_what_it_is(tiny_server):
    assert tiny_server.ask("GET", "/get_model_info").json["model_path"] == "tiny"
    for path in ("/server_info", "/get_server_info"):
        assert tiny_server.ask("GET", path).json["context_length"] == 4096
    assert tiny_server.ask("GET", "/health_generate").status == 200


def test_what_was_read_can_be_forgotten(tiny_server):
    asked = {"text": "A text of its own. " * 8, "sampling_params": {"max_new_tokens": 1}}
    for method in ("GET", "POST"):
        generate(tiny_server, **asked)
        assert generate(tiny_server, **asked)["meta_info"]["cached_tokens"] > 0
        assert tiny_server.ask(method, "/flush_cache").status == 200
        assert generate(tiny_server, **asked)["meta_info"]["cached_tokens"] == 0


# SGLang's frontend


@pytest.fixture
def backend(tiny_server: Live, sglang: Any) -> Iterator[Any]:
    before = sglang.global_config.default_backend
    sglang.set_default_backend(sglang.RuntimeEndpoint(tiny_server.url))
    yield sglang
    sglang.set_default_backend(before)


def test_gen_continues_what_was_said(backend, tiny):
    @backend.function
    def capital(s, country):
        s += f"The capital of {country} is"
        s += backend.gen("answer", max_tokens=6, temperature=0)

    states = capital.run_batch([{"country": country} for country in ("France", "Spain")])
    for prompt, state in zip((FRANCE, SPAIN), states, strict=True):
        assert state["answer"] == tiny.generate(prompt, max_tokens=6).text
        assert state.text() == prompt + state["answer"]
        assert state.get_meta_info("answer")["completion_tokens"] == 6


def test_a_program_is_streamed(backend, tiny):
    @backend.function
    def story(s):
        s += FOX
        s += backend.gen("rest", max_tokens=8, temperature=0)

    pieces = list(story.run(stream=True).text_iter(var_name="rest"))
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces) == tiny.generate(FOX, max_tokens=8).text


def test_select_takes_the_likeliest_by_every_method(server, backend):
    @backend.function
    def capital(s, method):
        s += FRANCE
        s += backend.select("city", [" Madrid", " Paris", " Rome"], choices_method=method)

    for name in ("token_length_normalized", "greedy_token_selection"):
        for_demo = backend.RuntimeEndpoint(server.url)
        state = capital.run(method=getattr(backend, name), backend=for_demo)
        assert state["city"] == " Paris"
        assert len(state.get_meta_info("city")["input_token_logprobs"]) == 3
    method = backend.unconditional_likelihood_normalized
    assert capital.run(method=method, backend=for_demo)["city"] == " Paris"


def test_gen_follows_types_and_expressions(backend):
    pytest.importorskip("llguidance")

    @backend.function
    def answer(s, options):
        s += "Q: How many legs have two cats together?\nA: "
        s += backend.gen("answer", max_tokens=8, temperature=0, **options)

    for options, pattern in (
        ({"dtype": int}, r"[-+]?\d+"),
        ({"dtype": float}, r"[-+]?\d*\.?\d+"),
        ({"dtype": bool}, "True|False"),
        ({"dtype": str}, r'"[\w\s\ufffd]*"?'),
        ({"regex": r"[a-z]{3}-[0-9]{2}"}, r"[a-z]{3}-[0-9]{2}"),
    ):
        assert re.fullmatch(pattern, answer.run(options=options)["answer"].strip()), options


def test_the_frontend_is_told_of_refusals(backend):
    @backend.function
    def nothing(s):
        s += FRANCE
        s += backend.gen("answer", max_tokens=4, stop=[""])

    with pytest.raises(RuntimeError, match="stop"):
        nothing.run(use_thread=False)  # in a thread of its own it waits for ever
