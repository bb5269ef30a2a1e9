"""SGLang's API, asked by SGLang's own frontend and by plain HTTP."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import pytest

import minicpm_mlx as mm
from support.data import need_shared
from support.leaving import leaves

pytest.importorskip("fastapi")

if TYPE_CHECKING:
    from support.serving import Live

FRANCE = "The capital of France is"
SPAIN = "The capital of Spain is"
FOX = "Once upon a time there was a fox"


def generate(server: Live, method: str = "POST", **body: Any) -> Any:
    answer = server.ask(method, "/generate", body)
    assert answer.status == 200, answer.body
    return answer.json


def events(server: Live, **body: Any) -> list[Any]:
    answer = server.ask("POST", "/generate", {**body, "stream": True})
    *found, last, rest = answer.body.decode().split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in found]


def refusal(server: Live, **body: Any) -> str:
    answer = server.ask("POST", "/generate", body)
    assert answer.status == 400, answer.body
    assert answer.json.keys() == {"error"}
    return str(answer.json["error"]["message"])


def logprobs(demo: mm.LM, text: str) -> np.ndarray:
    """(T - 1,) log probabilities of a text's tokens but the first, by the model alone."""
    ids = demo.encode(text)
    logits = demo.model(mx.array([ids]))[0, :-1].astype(mx.float32)
    own = mx.take_along_axis(logits, mx.array(ids[1:])[:, None], axis=-1)[:, 0]
    return np.array(own - mx.logsumexp(logits, axis=-1))


# Plain HTTP.


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_a_greedy_reply_is_what_generate_says(server, demo, method):
    found = generate(server, method, text=FRANCE, sampling_params={"max_new_tokens": 6})
    expected = demo.generate(FRANCE, max_tokens=6)
    assert found["text"] == expected.text
    meta = found["meta_info"]
    assert meta["finish_reason"] == {"type": "length", "length": 6}
    assert meta["prompt_tokens"] == expected.stats.prompt_tokens
    assert meta["completion_tokens"] == 6
    assert 0 <= meta["cached_tokens"] < meta["prompt_tokens"]
    assert meta["e2e_latency"] > 0
    assert "input_token_logprobs" not in meta


def test_ids_are_answered_like_their_text(server, demo):
    short = {"max_new_tokens": 4}
    by_text = generate(server, text=FRANCE, sampling_params=short)
    by_ids = generate(server, input_ids=demo.encode(FRANCE), sampling_params=short)
    assert by_ids["text"] == by_text["text"]


def test_lists_are_answered_with_lists(server, demo):
    texts = [FRANCE, SPAIN]
    expected = [demo.generate(text, max_tokens=4).text for text in texts]
    short = {"max_new_tokens": 4}
    found = generate(server, text=texts, sampling_params=short)
    assert [one["text"] for one in found] == expected
    found = generate(server, input_ids=[demo.encode(t) for t in texts], sampling_params=short)
    assert [one["text"] for one in found] == expected
    (found,) = generate(server, text=[FRANCE], sampling_params=short, rid="mine")
    assert (found["text"], found["meta_info"]["id"]) == (expected[0], "mine")


def test_each_prompt_may_have_its_own_parameters(server, demo):
    params = [{"max_new_tokens": 2}, {"max_new_tokens": 5}]
    found = generate(
        server,
        text=[FRANCE, SPAIN],
        sampling_params=params,
        return_logprob=[True, False],
        rid=["a", "b"],
    )
    assert [one["meta_info"]["completion_tokens"] for one in found] == [2, 5]
    assert ["output_token_logprobs" in one["meta_info"] for one in found] == [True, False]
    assert [one["meta_info"]["id"] for one in found] == ["a", "b"]


def test_n_replies_differ_by_their_seeds(server, demo):
    params = {"max_new_tokens": 6, "temperature": 1.5, "n": 3, "sampling_seed": 5}
    found = [one["text"] for one in generate(server, text=FOX, sampling_params=params)]
    expected = [
        demo.generate(
            FOX,
            max_tokens=6,
            sampling=mm.Sampling(temperature=1.5, seed=5 + i, repetition_penalty=1.05),
        ).text
        for i in range(3)
    ]
    assert demo.sampling.repetition_penalty == 1.05
    assert found == expected


def test_a_stream_says_all_of_the_text_each_time(server):
    params = {"max_new_tokens": 6}
    whole = generate(server, text=FOX, sampling_params=params)
    found = events(server, text=FOX, sampling_params=params)
    texts = [event["text"] for event in found]
    assert len(set(texts)) == 6
    assert all(later.startswith(text) for text, later in pairwise(texts))
    assert texts[-1] == whole["text"]
    reasons = [event["meta_info"]["finish_reason"] for event in found]
    assert reasons == [None] * (len(found) - 1) + [{"type": "length", "length": 6}]
    assert "index" not in found[0]


def test_a_stream_of_several_says_which_is_which(server, demo):
    found = events(server, text=[FRANCE, SPAIN], sampling_params={"max_new_tokens": 4})
    last = {event["index"]: event["text"] for event in found}
    assert last == {
        i: demo.generate(text, max_tokens=4).text for i, text in enumerate([FRANCE, SPAIN])
    }


def test_log_probabilities_are_the_models(server, demo):
    found = generate(
        server,
        text=FRANCE,
        sampling_params={"max_new_tokens": 3},
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=2,
        return_text_in_logprobs=True,
    )
    meta = found["meta_info"]
    expected = logprobs(demo, FRANCE + found["text"])
    read, said = meta["input_token_logprobs"], meta["output_token_logprobs"]
    assert read[0][0] is None
    np.testing.assert_allclose([one[0] for one in [*read[1:], *said]], expected, atol=2e-3)
    assert "".join(one[2] for one in [*read, *said]) == FRANCE + found["text"]
    assert [one[1] for one in read] == demo.encode(FRANCE)
    assert meta["input_top_logprobs"][0] is None
    for best in [*meta["input_top_logprobs"][1:], *meta["output_top_logprobs"]]:
        assert len(best) == 2
        assert best[0][0] >= best[1][0]


def test_log_probabilities_of_the_prompt_begin_where_it_is_said(server):
    def positions(**more: Any) -> int:
        asked = {"text": FRANCE, "return_logprob": True, "sampling_params": {"max_new_tokens": 1}}
        meta = generate(server, **(asked | more))["meta_info"]
        return len(meta["input_token_logprobs"])

    assert positions() == positions(logprob_start_len=-1) == 1
    assert positions(logprob_start_len=2) == 3
    # With nothing to say there is nothing else to tell.
    assert positions(sampling_params={"max_new_tokens": 0}) == 5


def test_ends_are_told_apart(server, demo):
    chat = demo.tokenizer.chat_text([{"role": "user", "content": "What is the capital of France?"}])
    ended = generate(server, text=chat, sampling_params={"max_new_tokens": 24})
    assert ended["meta_info"]["finish_reason"]["type"] == "stop"
    whole = demo.generate(FOX, max_tokens=12).text
    stop = whole.split()[3]
    cut = generate(server, text=FOX, sampling_params={"max_new_tokens": 12, "stop": ["¤", stop]})
    assert cut["text"] == whole[: whole.index(stop)]
    assert cut["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


def test_tokens_end_a_reply_or_do_not(server, demo):
    chat = demo.tokenizer.chat_text([{"role": "user", "content": "What is the capital of France?"}])
    whole = demo.generate(chat, max_tokens=24)
    count = whole.stats.completion_tokens
    params: dict[str, Any] = {"max_new_tokens": count + 4}
    longer = generate(server, text=chat, sampling_params={**params, "ignore_eos": True})
    assert longer["meta_info"]["completion_tokens"] == count + 4
    longer = generate(server, text=chat, sampling_params={**params, "min_new_tokens": count + 2})
    assert longer["meta_info"]["completion_tokens"] >= count + 2
    params["stop_token_ids"] = [whole.token_ids[2]]
    assert generate(server, text=chat, sampling_params=params)["text"] == demo.tokenizer.decode(
        whole.token_ids[:2]
    )
    shown = {**params, "stop_token_ids": [], "ignore_eos": True, "skip_special_tokens": False}
    assert "<|im_end|>" in generate(server, text=chat, sampling_params=shown)["text"]


def test_grammars_are_followed(server):
    pytest.importorskip("llguidance")

    def said(**grammar: str) -> str:
        return generate(server, text=FRANCE, sampling_params={"max_new_tokens": 24, **grammar})[
            "text"
        ]

    assert re.fullmatch(r"(Rome|Madrid)\.", said(regex=r"(Rome|Madrid)\."))
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    assert json.loads(said(json_schema=json.dumps({**schema, "additionalProperties": False})))
    assert said(ebnf='root ::= "yes" | "no"') in ("yes", "no")


def test_an_adapter_answers_by_its_name(server):
    asked = {"text": FOX, "sampling_params": {"max_new_tokens": 6}}
    plain, pirate = generate(server, **{**asked, "text": [FOX, FOX], "lora_path": [None, "pirate"]})
    assert plain["text"] == generate(server, **asked)["text"] != pirate["text"]
    answer = server.ask("POST", "/generate", {**asked, "lora_path": "../pirate"})
    assert answer.status == 404


def test_the_server_tells_what_it_is(server):
    assert server.ask("GET", "/get_model_info").json["model_path"] == "demo"
    for path in ("/server_info", "/get_server_info"):
        assert server.ask("GET", path).json["context_length"] == 8192
    assert server.ask("GET", "/health_generate").status == 200


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_was_read_can_be_forgotten(server, method):
    asked = {"text": "A text of its own. " * 8, "sampling_params": {"max_new_tokens": 1}}
    generate(server, **asked)
    assert generate(server, **asked)["meta_info"]["cached_tokens"] > 0
    assert server.ask(method, "/flush_cache").status == 200
    assert generate(server, **asked)["meta_info"]["cached_tokens"] == 0


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("text", {}),
        ("text", {"text": FOX, "input_ids": [1]}),
        ("text", {"text": []}),
        ("text", {"text": 5}),
        ("input_ids", {"input_ids": []}),
        ("input_ids", {"input_ids": ["a"]}),
        ("token ids", {"input_ids": [-1]}),
        ("image_data", {"text": FOX, "image_data": "http://example.invalid/a.png"}),
        ("custom_logit_processor", {"text": FOX, "custom_logit_processor": "pickle"}),
        ("session_params", {"text": FOX, "session_params": {"id": "1"}}),
        ("return_hidden_states", {"text": FOX, "return_hidden_states": True}),
        ("logprob_start_len", {"text": "Fox", "return_logprob": True, "logprob_start_len": 9}),
        ("top_logprobs_num", {"text": [FOX, FOX], "top_logprobs_num": [1]}),
        ("wisdom", {"text": FOX, "wisdom": 1}),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(server, field, body):
    assert field in refusal(server, **body)


@pytest.mark.parametrize(
    ("field", "params"),
    [
        ("no_stop_trim", {"no_stop_trim": True}),
        ("structural_tag", {"structural_tag": "{}"}),
        ("top_k", {"top_k": 0}),
        ("top_p", {"top_p": 0.0}),
        ("max_new_tokens", {"max_new_tokens": -1}),
        ("n", {"n": 10**9}),
        ("json_schema", {"json_schema": "["}),
        ("sampling_params", {"regex": "a", "ebnf": 'root ::= "a"'}),
        ("regex", {"regex": "("}),
        ("frequency_penalty", {"frequency_penalty": 3.0}),
        ("wisdom", {"wisdom": 1}),
    ],
)
def test_parameters_that_cannot_be_honoured_are_refused_by_name(server, field, params):
    assert field in refusal(server, text=FOX, sampling_params=params)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_not_answered_on(server, stream):
    body = {
        "text": FOX,
        "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True},
        "stream": stream,
    }
    leaves(server, "/generate", body)


# SGLang's frontend.


@pytest.fixture
def backend(server: Live, sglang: Any) -> Iterator[Any]:
    before = sglang.global_config.default_backend
    sglang.set_default_backend(sglang.RuntimeEndpoint(server.url))
    yield sglang
    sglang.set_default_backend(before)


def test_the_readmes_script_runs_unchanged(demo, serving, sglang, capsys):
    readme = need_shared("minicpm-1.0-README.md").read_text(encoding="utf-8")
    (script,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
        if "text_qa" in block
    )
    with serving() as server:
        server.service.context_length = 32  # a small model may go on for all of the 1024 tokens
        exec(script.replace("http://localhost:30000", server.url), {})
    sglang.set_default_backend(None)
    assert capsys.readouterr().out.strip()


def test_gen_continues_what_was_said(backend, demo):
    @backend.function
    def capital(s, country):
        s += f"The capital of {country} is"
        s += backend.gen("answer", max_tokens=6, temperature=0)

    state = capital.run(country="France")
    assert state["answer"] == demo.generate(FRANCE, max_tokens=6, sampling=plain(demo)).text
    assert state.text() == FRANCE + state["answer"]
    assert state.get_meta_info("answer")["completion_tokens"] == 6


def plain(demo: mm.LM) -> mm.Sampling:
    """What the frontend asks for, greedily: it leaves the model its own repetition penalty."""
    return mm.Sampling(temperature=0.0, repetition_penalty=demo.sampling.repetition_penalty)


def test_a_program_is_streamed(backend, demo):
    @backend.function
    def story(s):
        s += FOX
        s += backend.gen("rest", max_tokens=8, temperature=0)

    pieces = list(story.run(stream=True).text_iter(var_name="rest"))
    assert len([piece for piece in pieces if piece]) > 3
    assert "".join(pieces) == demo.generate(FOX, max_tokens=8, sampling=plain(demo)).text


def test_forks_go_their_own_ways(backend, demo):
    @backend.function
    def countries(s):
        s += "The capital of"
        forks = s.fork(2)
        for fork, country in zip(forks, ("France", "Spain"), strict=True):
            fork += f" {country} is" + backend.gen("city", max_tokens=4, temperature=0)
        s += " ".join(fork["city"] for fork in forks)

    text = countries.run().text()
    for prompt in (FRANCE, SPAIN):
        assert demo.generate(prompt, max_tokens=4, sampling=plain(demo)).text in text


def test_select_takes_the_likeliest(backend):
    @backend.function
    def capital(s):
        s += FRANCE
        s += backend.select("city", [" Madrid", " Paris", " Rome"])

    state = capital.run()
    assert state["city"] == " Paris"
    assert len(state.get_meta_info("city")["input_token_logprobs"]) == 3


@pytest.mark.parametrize(
    "method",
    ["token_length_normalized", "greedy_token_selection", "unconditional_likelihood_normalized"],
)
def test_gen_with_choices_takes_one_by_every_method(backend, method):
    choices_method = getattr(backend, method)

    @backend.function
    def capital(s):
        s += FRANCE + " "
        s += backend.gen("city", choices=["Madrid", "Paris"], choices_method=choices_method)

    assert capital.run()["city"] == "Paris"


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"dtype": int}, r"[-+]?\d+"),
        ({"dtype": float}, r"[-+]?\d*\.?\d+"),
        ({"dtype": bool}, "True|False"),
        ({"dtype": str}, r'"[\w\s]*"?'),
        ({"regex": r"[a-z]{3}-[0-9]{2}"}, r"[a-z]{3}-[0-9]{2}"),
    ],
)
def test_gen_follows_types_and_expressions(backend, options, pattern):
    pytest.importorskip("llguidance")

    @backend.function
    def answer(s):
        s += "Q: How many legs have two cats together?\nA: "
        s += backend.gen("answer", max_tokens=8, temperature=0, **options)

    assert re.fullmatch(pattern, answer.run()["answer"].strip())


def test_a_batch_of_programs_is_answered_in_order(backend, demo):
    @backend.function
    def capital(s, country):
        s += f"The capital of {country} is"
        s += backend.gen("answer", max_tokens=4, temperature=0)

    countries = ["France", "Spain", "Italy", "Japan"]
    states = capital.run_batch([{"country": country} for country in countries])
    for country, state in zip(countries, states, strict=True):
        prompt = f"The capital of {country} is"
        expected = demo.generate(prompt, max_tokens=4, sampling=plain(demo)).text
        assert state["answer"] == expected


def test_the_frontend_is_told_of_refusals(backend):
    @backend.function
    def nothing(s):
        s += FRANCE
        s += backend.gen("answer", max_tokens=4, stop=[""])

    with pytest.raises(RuntimeError, match="stop"):
        nothing.run(use_thread=False)  # in a thread of its own it waits for ever
