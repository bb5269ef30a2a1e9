"""The same scenarios over every API that generates text, each asked through its driver."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import minicpm_mlx as mm
from support.apis import DRIVERS, SMALL, Answer, Driver, merged
from support.leaving import leaves

pytest.importorskip("fastapi")

if TYPE_CHECKING:
    from support.serving import Live

FOX = [{"role": "user", "content": "Tell me a story about a fox."}]
SYSTEM = [{"role": "system", "content": "Answer in one word."}, *FOX]
TURNS = [*FOX, {"role": "assistant", "content": "No."}, {"role": "user", "content": "Do!"}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"name": "weather", "description": "Forecast.", "parameters": CITY}
JSON = "application/json"
streamed = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])

Ask = Callable[..., Answer]


def over(*options: str) -> pytest.MarkDecorator:
    """Runs a test for every API that offers these options."""
    paths = [path for path, driver in DRIVERS.items() if {*options} <= driver.names.keys()]
    return pytest.mark.parametrize("api", paths, indirect=True)


@pytest.fixture(params=DRIVERS)
def api(request: pytest.FixtureRequest, tiny: mm.LM) -> Driver:
    return DRIVERS[request.param](lambda messages: tiny.tokenizer.chat_text([*messages]))


@pytest.fixture
def ask(api: Driver, tiny_server: Live) -> Ask:
    """Asks the API, and reads its answer."""

    def ask(messages: Any = FOX, **options: Any) -> Answer:
        answer = tiny_server.ask("POST", api.path, api.body(messages, **options))
        assert answer.status == 200, answer.body
        return api.read(api.join(answer.body) if options.get("stream") else answer.json)

    return ask


@pytest.fixture(scope="module")
def expected(tiny: mm.LM) -> Callable[..., Any]:
    """What `LM.generate` returns; each reply is computed once."""

    @cache
    def generate(messages: str, max_tokens: int, **sampling: Any) -> Any:
        how = mm.Sampling(**sampling) if sampling else None
        return tiny.generate(json.loads(messages), max_tokens=max_tokens, sampling=how)

    return lambda messages, count, **how: generate(json.dumps(messages), count, **how)


@streamed
@pytest.mark.parametrize("messages", [FOX, SYSTEM, TURNS], ids=["user", "system", "turns"])
def test_a_greedy_reply_is_that_of_generate(ask: Ask, expected: Any, messages: Any, stream: bool):
    answer = ask(messages, max_tokens=9, stream=stream)
    reply = expected(messages, 9)
    assert answer.texts == [reply.text]
    assert answer.finish_reasons == ["length"]
    assert answer.model in ("tiny", None)
    assert answer.prompt_tokens == reply.stats.prompt_tokens
    assert answer.completion_tokens == 9


@streamed
@over("stop")
def test_a_stop_string_ends_the_reply_before_it(ask: Ask, expected: Any, stream: bool):
    whole = expected(FOX, 30).text
    stop = whole[12:14]
    answer = ask(max_tokens=30, stop=["¤", stop], stream=stream)
    assert answer.texts == [whole[: whole.index(stop)]]
    assert answer.finish_reasons == ["stop"]


@streamed
def test_a_stop_string_that_names_a_special_token_ends_the_reply_there(tiny: mm.LM, stream: bool):
    from support.serving import serving

    # A model that writes <s>, which is no end of its own, and nothing else.
    lm = replace(tiny, sampling=mm.Sampling(logit_bias={1: 100.0}))
    with serving(lm) as live:
        for path, make in DRIVERS.items():
            if "stop" in make.names:
                api = make(lambda messages: tiny.tokenizer.chat_text([*messages]))
                body = api.body(FOX, max_tokens=5, stop=["Q", "<s>"], stream=stream)
                answer = live.ask("POST", path, body)
                reply = api.read(api.join(answer.body) if stream else answer.json)
                assert (reply.texts, reply.finish_reasons) == ([""], ["stop"]), path
                assert reply.completion_tokens == 0


NAMES = [
    {"role": "system", "content": "Be <s>brief</s>."},
    {"role": "user", "content": "What is </s>?"},
    {"role": "assistant", "content": "It is </s>."},
    {"role": "user", "content": "</s>"},
]
"""Names of special tokens in a conversation; in all they have 19 characters."""


def test_names_of_special_tokens_stay_text_in_messages(api: Driver, ask: Ask):
    brackets = str.maketrans("<>", "()")
    plain = [{**turn, "content": turn["content"].translate(brackets)} for turn in NAMES]
    lost = ask(plain, max_tokens=1).prompt_tokens - ask(NAMES, max_tokens=1).prompt_tokens
    is_raw = api.path in ("/v1/completions", "/api/generate", "/generate")
    assert lost == (19 - 5 if is_raw else 0)


@over("seed")
def test_a_seed_draws_the_same_reply_alone_and_among_others(ask: Ask, expected: Any):
    draw = lambda seed: ask(max_tokens=8, temperature=0.9, seed=seed).texts[0]  # noqa: E731
    alone = draw(7)
    with ThreadPoolExecutor(4) as pool:
        together = [*pool.map(draw, [5, 7, 6, 8])]
    assert together[1] == alone == expected(FOX, 8, temperature=0.9, seed=7).text
    assert len(set(together)) > 2


@streamed
@over("n")
def test_choice_i_is_drawn_with_seed_plus_i(ask: Ask, expected: Any, stream: bool):
    answer = ask(max_tokens=5, temperature=0.9, seed=40, n=3, stream=stream)
    replies = [expected(FOX, 5, temperature=0.9, seed=40 + i).text for i in range(3)]
    assert answer.texts == replies
    assert answer.finish_reasons == ["length"] * 3
    assert answer.completion_tokens == 15


@streamed
@over("logprobs")
def test_log_probabilities_are_the_models(ask: Ask, expected: Any, tiny: mm.LM, stream: bool):
    import mlx.core as mx

    answer = ask(max_tokens=6, logprobs=2, stream=stream)
    prompt, reply = tiny.encode(FOX), expected(FOX, 6).token_ids
    logits = tiny.model(mx.array([[*prompt, *reply]]))[0, len(prompt) - 1 : -1]
    logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    own = logprobs[np.arange(len(reply)), reply]
    np.testing.assert_allclose(answer.logprobs, own, atol=1e-3)


@streamed
def test_an_adapter_answers_to_its_name(
    ask: Ask, expected: Any, tiny: mm.LM, tiny_adapter: Path, stream: bool
):
    answer = ask(max_tokens=6, model="tiny:other", stream=stream)
    lm = mm.load(str(tiny.card.path), adapter=tiny_adapter)
    assert answer.texts[0] == lm.generate(FOX, max_tokens=6).text != expected(FOX, 6).text
    assert answer.model in ("tiny:other", None)


@streamed
def test_a_schema_is_followed(ask: Ask, stream: bool):
    pytest.importorskip("llguidance")
    answer = ask(max_tokens=60, schema=CITY, stream=stream)
    assert json.loads(answer.texts[0])["city"] in ("Paris", "Rome")
    assert answer.finish_reasons == ["stop"]


@streamed
def test_a_reply_cut_inside_a_character_ends_before_it(ask: Ask, stream: bool):
    pytest.importorskip("llguidance")
    answer = ask(max_tokens=7, schema={"const": "🦊🦊"}, stream=stream)  # a token is a byte
    assert answer.texts == ['"🦊']
    assert answer.finish_reasons == ["length"]
    assert answer.completion_tokens == 7


@streamed
@over("tools", "tool")
def test_a_tool_that_must_be_called_is_called(ask: Ask, stream: bool):
    pytest.importorskip("llguidance")
    answer = ask(max_tokens=120, tools=[WEATHER], tool="weather", stream=stream)
    ((name, arguments), *_) = answer.calls
    assert name == "weather"
    assert arguments["city"] in ("Paris", "Rome")
    assert answer.finish_reasons == ["tool_calls"]


@streamed
def test_a_client_that_leaves_frees_its_slot(api: Driver, tiny_server: Live, stream: bool):
    endless = [{"role": "user", "content": "a"}]  # to which the tiny model's reply has no end
    leaves(tiny_server, api.path, api.body(endless, max_tokens=3900, stream=stream))


# Refusals


@pytest.fixture
def refusal(api: Driver, tiny_server: Live) -> Callable[..., str]:
    """Sends a body that must be refused; its error's message."""

    def refusal(body: dict[str, Any], status: int = 400) -> str:
        answer = tiny_server.ask("POST", api.path, body)
        assert answer.status == status, (body, answer.body)
        return api.error(answer.json)

    return refusal


def test_what_is_unknown_or_too_long_is_refused_in_the_apis_own_form(
    api: Driver, refusal: Callable[..., str]
):
    body = api.body(FOX, max_tokens=2)
    assert "no_such_field is not known here" in refusal(body | {"no_such_field": 1})
    for name in ("tiny:nobody", "../tiny", "other:tiny"):
        assert "there is tiny, tiny:other" in refusal(api.body(FOX, model=name), 404)
    long = [{"role": "user", "content": "word " * 900}]
    assert "shorten it" in refusal(api.body(long, max_tokens=2))


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
FUNCTION = {"name": "f", "parameters": {"type": "object"}}
REFUSED: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "/v1/chat/completions": [
        ("max_completion_tokens", {"max_completion_tokens": 5}),
        ("logit_bias", {"logit_bias": {"word": 1}}),
        ("logit_bias: token ids must be", {"logit_bias": {"999999": 1}}),
        ("logit_bias", {"logit_bias": {"5": 101}}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
        ("functions", {"functions": [FUNCTION]}),
        ("function_call", {"function_call": "auto"}),
        ("audio", {"audio": {"voice": "x"}}),
        ("modalities", {"modalities": ["text", "audio"]}),
        ("moderation", {"moderation": {"model": "m"}}),
        ("reasoning_effort", {"reasoning_effort": "high"}),
        ("verbosity", {"verbosity": "low"}),
        ("prediction", {"prediction": {"type": "content", "content": ""}}),
        ("web_search_options", {"web_search_options": {"a": 1}}),
        ("response_format", {"response_format": {"type": "xml"}}),
        ("response_format.json_schema is missing", {"response_format": {"type": "json_schema"}}),
        ("tool_choice", {"tool_choice": "required"}),
        ("tools[0].function is missing", {"tools": [{"type": "function"}]}),
        ("guided_regex: cannot follow this form: unclosed", {"guided_regex": "[a-z"}),
        ("guided_json: cannot follow this form: Invalid type", {"guided_json": {"type": "foo"}}),
        ("messages[0].content", {"messages": [{"role": "user", "content": None}]}),
        ("messages[0].content[0]", {"messages": [{"role": "user", "content": [IMAGE]}]}),
        ("messages", {"messages": [{"role": "robot", "content": "Hi"}]}),
        ("audio", {"messages": [{"role": "assistant", "content": "Hi", "audio": {"id": "x"}}]}),
    ],
    "/v1/completions": [
        ("prompt", {"prompt": ["a", ""]}),
        ("prompt", {"prompt": [[]]}),
        ("prompt", {"prompt": [1, "a"]}),
        ("token ids", {"prompt": [1, -1]}),
        ("prompt: token ids must be", {"prompt": [999999]}),
        ("9000 tokens", {"prompt": [5] * 9000}),
        ("9000 tokens", {"prompt": [5] * 9000, "max_tokens": 0}),
        ("4096 tokens", {"prompt": [5] * 4096}),
        ("suffix", {"suffix": "end"}),
        ("best_of", {"best_of": 3}),
        ("guided_grammar", {"guided_grammar": "start: b"}),
        ("give one", {"guided_regex": "a", "guided_choice": ["b"]}),
        ("top_logprobs", {"top_logprobs": 3}),
    ],
    "/v1/responses": [
        ("previous_response_id", {"previous_response_id": "resp_1"}),
        ("background", {"background": True}),
        ("conversation", {"conversation": "c"}),
        ("truncation", {"truncation": "auto"}),
        ("include", {"include": ["file_search_call.results"]}),
        ("prompt", {"prompt": {"id": "p"}}),
        ("reasoning.effort", {"reasoning": {"effort": "high"}}),
        ("text.verbosity", {"text": {"verbosity": "low"}}),
        ("tools", {"tools": [{"type": "file_search"}]}),
        ("input", {"input": []}),
        ("only text", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}),
        ("seed", {"seed": 1}),
    ],
    "/v1/messages": [
        ("image", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
        ("document", {"messages": [{"role": "user", "content": [{"type": "document"}]}]}),
        ("thinking", {"thinking": {"type": "enabled", "budget_tokens": 1024}}),
        ("output_config.effort", {"output_config": {"effort": "huge"}}),
        ("context_management", {"context_management": {"edits": [{"type": "compact_20260112"}]}}),
        ("container", {"container": "somewhere"}),
        ("tools", {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}),
        ("white space", {"messages": [*FOX, {"role": "assistant", "content": "Paris "}]}),
    ],
    "/api/chat": [
        ("messages[0].images", {"messages": [{**FOX[0], "images": ["aGk="]}]}),
        ("role", {"messages": [{"role": "owner", "content": "hi"}]}),
        ("think", {"think": "high"}),
        ("format", {"format": "yaml"}),
        ("top_logprobs", {"top_logprobs": 3}),
        ("options.mirostat", {"options": {"mirostat": 2}}),
        ("options.tfs_z", {"options": {"tfs_z": 0.5}}),
        ("options.typical_p", {"options": {"typical_p": 0.5}}),
        ("options.repeat_last_n", {"options": {"repeat_last_n": 64, "repeat_penalty": 1.1}}),
        ("options.penalize_newline", {"options": {"penalize_newline": False}}),
        ("options.wisdom", {"options": {"wisdom": 1}}),
        ("options.repeat_penalty", {"options": {"repeat_penalty": -1.0}}),
        ("options.temperature", {"options": {"temperature": -1.0}}),
    ],
    "/api/generate": [
        ("template", {"template": "{{ .Prompt }}"}),
        ("suffix", {"suffix": "the end"}),
        ("images", {"images": ["aGk="]}),
        ("width", {"width": 512}),
        ("system", {"raw": True, "system": "You are a pirate."}),
        ("context", {"raw": True, "context": [1, 2]}),
        ("token ids", {"context": [10**6]}),
    ],
    "/generate": [
        ("text", {"input_ids": [1]}),
        ("text", {"text": []}),
        ("token ids", {"text": None, "input_ids": [-1]}),
        ("image_data", {"image_data": "http://example.invalid/a.png"}),
        ("input_embeds", {"input_embeds": [[0.0]]}),
        ("custom_logit_processor", {"custom_logit_processor": "pickle"}),
        ("session_params", {"session_params": {"id": "1"}}),
        ("token_ids_logprob", {"token_ids_logprob": [1]}),
        ("return_hidden_states", {"return_hidden_states": True}),
        ("logprob_start_len", {"return_logprob": True, "logprob_start_len": 9}),
        ("top_logprobs_num", {"text": ["a", "b"], "top_logprobs_num": [1]}),
        ("no_stop_trim", {"sampling_params": {"no_stop_trim": True}}),
        ("structural_tag", {"sampling_params": {"structural_tag": "{}"}}),
        ("top_k", {"sampling_params": {"top_k": 0}}),
        ("json_schema", {"sampling_params": {"json_schema": "["}}),
        ("sampling_params", {"sampling_params": {"regex": "a", "ebnf": 'root ::= "a"'}}),
        ("regex", {"sampling_params": {"regex": "("}}),
    ],
}
"""What an API has that cannot be honoured here, and words of its refusal."""

ACCEPTED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"user": "me", "metadata": {"a": "b"}, "store": True, "stop": None}
    | {"service_tier": "auto", "safety_identifier": "x", "prompt_cache_key": "x"}
    | {"parallel_tool_calls": True, "modalities": ["text"], "reasoning_effort": None}
    | {"tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "none"},
    "/v1/completions": {"user": "me", "metadata": {}, "best_of": 1},
    "/v1/responses": {"store": True, "metadata": {"a": "b"}, "user": "me"}
    | {"truncation": "disabled", "service_tier": "auto"},
    "/v1/messages": {"metadata": {"user_id": "somebody"}, "service_tier": "auto", "tools": []}
    | {"thinking": {"type": "disabled"}, "cache_control": {"type": "ephemeral", "ttl": "1h"}},
    "/api/chat": {"keep_alive": "5m", "truncate": True, "shift": True}
    | {
        "options": {"num_gpu": 1, "num_thread": 4, "num_batch": 8, "num_keep": 4, "use_mmap": True}
        | {"mirostat": 0, "tfs_z": 1.0, "typical_p": 1.0, "repeat_last_n": -1, "num_ctx": 10**6}
    },
    "/api/generate": {"keep_alive": 5, "images": [], "template": "", "format": ""},
    "/generate": {"log_metrics": False, "rid": "mine", "modalities": ["text"]}
    | {"stream": None, "return_text_in_logprobs": None, "return_hidden_states": None}
    | {"sampling_params": {"min_new_tokens": None, "no_stop_trim": None}},
}
"""Fields that change nothing."""


def test_what_cannot_be_honoured_is_refused_by_name(api: Driver, refusal: Callable[..., str]):
    for words, more in REFUSED[api.path]:
        message = refusal(merged(SMALL[api.path], more))
        assert words in message, more
        assert "llguidance" not in message


def test_what_changes_nothing_is_accepted(api: Driver, tiny_server: Live):
    body = api.body(FOX, max_tokens=4)
    plain = tiny_server.ask("POST", api.path, body)
    answer = tiny_server.ask("POST", api.path, merged(body, ACCEPTED[api.path]))
    assert answer.status == 200, answer.body
    assert api.read(answer.json).texts == api.read(plain.json).texts


NOISE = {"id": "x", "timestamp": 1.5, "reasoning_content": "Hm.", "provider_specific_fields": {}}
"""Fields that servers and clients put into replies and results, and that no model reads."""


def _text(kind: str, **more: Any) -> list[dict[str, Any]]:
    return [{"type": kind, "text": "No.", **more}]


def _openai_turns(noise: dict[str, Any]) -> dict[str, Any]:
    function = {"name": "f", "arguments": "{}", **noise}
    call = {"id": "1", "type": "function", "function": function, **noise}
    reply = {"role": "assistant", "content": _text("text", **noise), **noise}
    result = {"role": "tool", "tool_call_id": "1", "content": _text("text", **noise), **noise}
    return {"messages": [*FOX, {**reply, "tool_calls": [call | noise]}, result, *FOX]}


def _response_items(noise: dict[str, Any]) -> dict[str, Any]:
    reply = {"role": "assistant", "content": _text("output_text", **noise), **noise}
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}", **noise}
    result = {"type": "function_call_output", "call_id": "1", "output": "No.", **noise}
    thoughts = [{"type": "reasoning", "summary": []}] if noise else []
    return {"input": [*FOX, *thoughts, reply, call, result, *FOX]}


def _anthropic_turns(noise: dict[str, Any]) -> dict[str, Any]:
    thoughts = [{"type": "thinking", "thinking": "Hm.", "signature": "x"}] if noise else []
    call = {"type": "tool_use", "id": "1", "name": "f", "input": {}, **noise}
    content = [*thoughts, *_text("text", **noise), call]
    result = {"type": "tool_result", "tool_use_id": "1", "content": _text("text", **noise), **noise}
    reply = {"role": "assistant", "content": content, **noise}
    return {"messages": [*FOX, reply, {"role": "user", "content": [result]}]}


def _ollama_turns(noise: dict[str, Any]) -> dict[str, Any]:
    call = {"function": {"name": "f", "arguments": {}, **noise}, **noise}
    thoughts = {"thinking": "Hm."} if noise else {}
    reply = {"role": "assistant", "content": "No.", "tool_calls": [call], **noise, **thoughts}
    return {"messages": [*FOX, reply, {"role": "tool", "content": "No.", **noise}, *FOX]}


@pytest.mark.parametrize(
    ("api", "turns"),
    [
        ("/v1/chat/completions", _openai_turns),
        ("/v1/responses", _response_items),
        ("/v1/messages", _anthropic_turns),
        ("/api/chat", _ollama_turns),
    ],
    indirect=["api"],
)
def test_fields_of_earlier_replies_and_results_that_no_model_reads_are_accepted(
    api: Driver, tiny_server: Live, turns: Callable[..., dict[str, Any]]
):
    body = api.body(FOX, max_tokens=4)
    answers = [tiny_server.ask("POST", api.path, body | turns(noise)) for noise in (NOISE, {})]
    assert [answer.status for answer in answers] == [200, 200], answers[0].body
    noisy, plain = (api.read(answer.json) for answer in answers)
    assert (noisy.texts, noisy.prompt_tokens) == (plain.texts, plain.prompt_tokens)


def _openai_call(call: dict[str, Any]) -> dict[str, Any]:
    calls = [{"id": "1", "type": None, "function": {"name": "f", **call}}]
    return {"messages": [*FOX, {"role": "assistant", "tool_calls": calls}, *FOX]}


def _response_call(call: dict[str, Any]) -> dict[str, Any]:
    return {"input": [*FOX, {"type": "function_call", "call_id": "1", "name": "f", **call}]}


def _anthropic_call(call: dict[str, Any]) -> dict[str, Any]:
    block = {"type": "tool_use", "id": "1", "name": "f", **call}
    return {"messages": [*FOX, {"role": "assistant", "content": [block]}, *FOX]}


def _ollama_call(call: dict[str, Any]) -> dict[str, Any]:
    calls = [{"function": {"name": "f", **call}}]
    return {"messages": [*FOX, {"role": "assistant", "tool_calls": calls}, *FOX]}


NO_TEXT: list[dict[str, Any]] = [{}, *({"arguments": text} for text in (None, "", " ", "null"))]


@pytest.mark.parametrize(
    ("api", "turns", "empty", "nothing"),
    [
        ("/v1/chat/completions", _openai_call, {"arguments": "{}"}, NO_TEXT),
        ("/v1/responses", _response_call, {"arguments": "{}"}, NO_TEXT),
        ("/v1/messages", _anthropic_call, {"input": {}}, [{}, {"input": None}]),
        ("/api/chat", _ollama_call, {"arguments": {}}, [{}, {"arguments": None}]),
    ],
    indirect=["api"],
)
def test_an_earlier_call_without_arguments_has_none(
    api: Driver, tiny_server: Live, turns: Any, empty: dict[str, Any], nothing: Any
):
    body = api.body(FOX, max_tokens=1)
    answers = [tiny_server.ask("POST", api.path, body | turns(call)) for call in (empty, *nothing)]
    assert {answer.status for answer in answers} == {200}, answers[-1].body
    assert len({api.read(answer.json).prompt_tokens for answer in answers}) == 1


def _with_nulls(value: Any) -> Any:
    """The same JSON with a null field that nobody knows in every object."""
    if isinstance(value, list):
        return [_with_nulls(item) for item in value]
    if isinstance(value, dict):
        return {name: _with_nulls(inner) for name, inner in value.items()} | {"no_such": None}
    return value


def test_null_for_an_unknown_field_changes_nothing(api: Driver, tiny_server: Live):
    body = api.body(FOX, max_tokens=4)
    answers = [tiny_server.ask("POST", api.path, asked) for asked in (body, _with_nulls(body))]
    assert [answer.status for answer in answers] == [200, 200], answers[1].body
    assert api.read(answers[0].json).texts == api.read(answers[1].json).texts


PART = {"type": "text", "text": "Hi"}
CACHED = {"cache_control": {"type": "ephemeral"}}
NAMED: list[tuple[str, str, dict[str, Any]]] = [
    ("/v1/chat/completions", "messages[0].content[1].cache_control", {"messages": [
        {"role": "user", "content": [PART, {**PART, **CACHED}]}]}),
    ("/v1/chat/completions", "messages[0].content[0].text", {"messages": [
        {"role": "user", "content": [{"type": "text", "text": 5}]}]}),
    ("/v1/chat/completions", "messages[0].user", {"messages": [
        {"role": "user", "content": "Hi", "user": "me"}]}),
    ("/v1/chat/completions", "messages[1].tool_calls[0].function.arguments", {"messages": [
        *FOX, {"role": "assistant", "tool_calls": [
            {"id": "1", "function": {"name": "f", "arguments": "["}}]}]}),
    ("/v1/chat/completions", "response_format.text", {
        "response_format": {"type": "text", "text": "x"}}),
    ("/v1/chat/completions", "response_format.json_schema.schema", {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}),
    ("/v1/chat/completions", "tools[0].function.function", {
        "tools": [{"type": "function", "function": {"name": "f", "function": {}}}]}),
    ("/v1/responses", "input[0].content[0].input_text", {"input": [
        {"role": "user", "content": [{**PART, "type": "input_text", "input_text": "x"}]}]}),
    ("/v1/responses", "text.format.schema", {
        "text": {"format": {"type": "json_schema", "name": "x"}}}),
    ("/v1/messages", "messages[0].content[0].cache_control.text", {"messages": [
        {"role": "user", "content": [{**PART, "cache_control": {"type": "ephemeral", "text": 1}}]}
    ]}),
    ("/v1/messages", "messages[0].content[0].text2", {"messages": [
        {"role": "user", "content": [{**PART, "text2": "x"}]}]}),
    ("/v1/messages", "messages[0].content[1]", {"messages": [
        {"role": "user", "content": [PART, {"type": "thinking", "thinking": "Hm."}]}]}),
    ("/v1/messages", "messages[0].id", {"messages": [{**FOX[0], "id": "x"}]}),
    ("/api/chat", "messages[0].id", {"messages": [{**FOX[0], "id": "x"}]}),
    ("/generate", "sampling_params.temperature", {"sampling_params": {"temperature": -1}}),
]  # fmt: skip
"""Bodies with one wrong field, and its name."""


@pytest.mark.parametrize(("path", "field", "more"), NAMED)
def test_the_wrong_field_is_the_one_that_is_named(
    tiny_server: Live, path: str, field: str, more: dict[str, Any]
):
    answer = tiny_server.ask("POST", path, SMALL[path] | more)
    assert answer.status == 400
    error = answer.json["error"]
    if "param" in error:
        assert error["param"] == field
    message = error if isinstance(error, str) else error["message"]
    assert message.split()[0].rstrip(":") == field


@pytest.mark.parametrize("path", ["{}/", "/{}", "{}//"])
def test_slashes_around_a_path_mean_nothing(api: Driver, tiny_server: Live, path: str):
    for body in (api.body(FOX, max_tokens=2), api.body(FOX) | {"no_such_field": 1}):
        plain, other = (
            tiny_server.ask("POST", way, body) for way in (api.path, path.format(api.path))
        )
        assert other.status == plain.status
        if plain.status == 200:
            assert api.read(other.json).texts == api.read(plain.json).texts
        else:
            assert api.error(other.json) == api.error(plain.json)


def test_keys_and_queues_are_refused_in_the_apis_own_form(tiny: mm.LM):
    from support.serving import serving

    def error(live: Live, path: str, **headers: str) -> tuple[int, str]:
        api = DRIVERS[path](lambda messages: "Hi")
        answer = live.ask("POST", path, api.body(FOX, max_tokens=2), headers)
        api.error(answer.json)
        assert (answer.status == 429) == ("retry-after" in answer.headers)
        return answer.status, answer.json.get("error", {})

    with serving(tiny, settings={"api_key": "secret"}, width=1, queue=1) as live:
        key = {"x-api-key": "secret"}
        kinds = {path: error(live, path) for path in DRIVERS}
        assert {status for status, _ in kinds.values()} == {401}
        for path in ("/v1/chat/completions", "/v1/messages"):
            assert kinds[path][1]["type"] == "authentication_error"
        endless = {"prompt": "a", "stream": True, "max_tokens": 4000, "ignore_eos": True, "n": 2}
        connection = http.client.HTTPConnection(*live.place, timeout=60)
        connection.request(
            "POST", "/v1/completions", json.dumps(endless), key | {"Content-Type": JSON}
        )
        connection.getresponse().read(1)
        full = {path: error(live, path, **key) for path in DRIVERS}
        connection.close()
        assert {status for status, _ in full.values()} == {429}
        for path in ("/v1/chat/completions", "/v1/messages"):
            assert full[path][1]["type"] == "rate_limit_error"
